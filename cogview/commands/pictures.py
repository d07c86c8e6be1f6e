"""Pictures that commands are given as files and leave as files, and the run whose models take and make them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.config import require
from cogview.labels import file_name

if TYPE_CHECKING:
    from cogview.system import System

Files = Annotated[
    tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)", metavar="PICTURE ...")
]
RunFolder = Annotated[Path | None, option("FOLDER", "trained last in runs/", name="run")]
Step = Annotated[int | None, option("INT", "the best, or newest")]
SHEET_PIXELS = 40_000_000  # of all pictures that may come onto a sheet


# no docstring, which help would rule off from the options: how models are loaded
@dataclass(frozen=True)
class Models:
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model: 16 bits take half the memory and less time."""
    int8: bool = False
    """Keep the weights of its linear layers in 8 bits (torchao)."""
    compile: bool = False
    """Compile the step that draws a token, half a minute for each size of a batch: worth it for many pictures."""

    def options(self) -> dict[str, Any]:
        """As `System.load` takes them."""
        return vars(self) | {"dtype": getattr(torch, self.dtype)}


def load(run: Path | None, name: str | None, step: int | None, draws: str, **how: Any) -> "System":
    """The model of a run that draws captions, or larger pictures; says which it is. how: see `System.load`."""
    from cogview.runs import last_run
    from cogview.system import System

    system = System.load(last_run() if run is None else run, name=name, step=step, draws=draws, **how)
    console.print(str(system.source))
    return system


def labels_of(system: "System", path: Path | None) -> torch.Tensor:
    """Clusters of a system's codes, int64 [V], of a file, or by k-means of its codebook."""
    from cogview.clusters import k_means, read_labels

    return k_means(system.image.codebook) if path is None else read_labels(path, system.recipe.config.image_vocab)


def report(paths: Sequence[Path], bad: dict[int, str]) -> int:
    """Names the pictures that are left out; how many they are."""
    for number, reason in bad.items():
        console.print(f"left out: {reason if str(paths[number]) in reason else f'{paths[number]}: {reason}'}")
    return len(bad)


def check_kept(given: Sequence[Path | None], out: Path, *folders: Path) -> None:
    """ValueError if one of the given files is what is written, or stands in one of the folders."""
    places = {place.resolve() for place in (out, *folders)}
    for file in filter(None, given):
        kept = places.isdisjoint((file.resolve(), file.resolve().parent))
        require(kept, "out", f"a place where {file} is not written over", str(out))


def make_places(sheet: Path, given: Sequence[Path | None] = ()) -> None:
    """Makes the folders of the sheet and of the single pictures; OSError if nothing can be written there, ValueError
    if one of the given files is the sheet or stands in that folder, where it could be written over."""
    from cogview.pictures import check_place

    folder = sheet.with_suffix("")
    check_kept(given, sheet, folder)
    for path in (sheet, folder / "001.png"):
        check_place(path)


def picture_paths(names: Sequence[str], sheet: Path, count: int | None = None) -> Iterator[Path]:
    """In the sheet's folder, `001-fox.png`: a number and a name, in letters that files can have. With a count of
    pictures of each, `001-1-fox.png`, theirs too."""
    digits = max(3, len(str(len(names))))
    for number, name in enumerate(names, 1):
        words = file_name(name)
        for k in range(1, 1 + (count or 1)):
            of_several = "" if count is None else f"-{k:0{len(str(count))}d}"
            file = f"{number:0{digits}d}{of_several}{words and '-'}{words}{sheet.suffix.lower()}"
            yield sheet.with_suffix("") / file
