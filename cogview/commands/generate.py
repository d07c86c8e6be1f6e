"""`cogview generate`."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from cogview.commands.console import console
from cogview.commands.device import available
from cogview.config import require

MAX_CAPTIONS_BYTES = 16 << 20
_SHOWN, _WIDE = 128, 1100  # pixels: of a small picture on the sheet, and how wide sheets are, about
_SHEET_PIXELS = 40_000_000  # of all pictures that may come onto the sheet


@dataclass(frozen=True)
class Generate:
    """Draw pictures for captions with a trained run: a file each, and a sheet of all."""

    captions: Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="TEXT ...")] = ()
    """What to draw. Several may follow, and the option may be repeated."""
    captions_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """More captions, one a line (UTF-8); blank lines are skipped."""
    run_folder: Annotated[
        Path | None, tyro.conf.arg(name="run", metavar="FOLDER", help_behavior_hint="(default: trained last in runs/)")
    ] = None
    """Folder of the run: both tokenizers and its models."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: trained last)")] = None
    """Which of the run's models."""
    step: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the best, or newest)")] = (
        None
    )
    """Which of its checkpoints. The best has the lowest held-out loss."""
    out: Path = Path("pictures.png")
    """The sheet. Its suffix says the format: png, jpg, webp, bmp, gif or tif. The single pictures come into a folder
    beside it of the same name without the suffix."""
    count: int = 4
    """Pictures for each caption."""
    temperature: float = 0.9
    """Below 1 likely tokens become likelier, above 1 less likely."""
    top_k: int = 200
    """Of the likeliest tokens so many may be drawn; 1: always the likeliest."""
    seed: int = 0
    """Of each caption's first picture; the others have the following ones. The same seed draws the same picture."""
    batch_size: int = 32
    """Pictures drawn at once: more are faster and take more memory."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1."""

    def run(self) -> None:
        from cogview.generate import Sampling, check_seeds
        from cogview.runs import last_run
        from cogview.system import System

        captions = [caption.strip() for group in self.captions for caption in group]
        captions += [] if self.captions_file is None else read_captions(self.captions_file)
        require(bool(captions), "captions", "at least one, of --captions or --captions-file", captions)
        require(self.count >= 1, "count", "at least 1", self.count)
        seeds = check_seeds([self.seed + n for n in range(self.count)], self.count)
        how = Sampling(self.temperature, self.top_k, self.batch_size)
        sheet = sheet_path(self.out)

        folder = last_run() if self.run_folder is None else self.run_folder
        system = System.load(folder, available(self.device), name=self.name, step=self.step)
        system.encode(captions)  # what is wrong with them is said before a folder is made
        make_places(sheet)
        say(str(system.source))
        self._draw(system, captions, seeds, how, sheet)

    def _draw(self, system, captions: Sequence[str], seeds: Sequence[int], how, sheet: Path) -> None:
        from cogview.pictures import image_of, save_image
        from cogview.progress import progress

        repeated = [caption for caption in captions for _ in seeds]
        paths, kept = picture_paths(captions, self.count, sheet), list[Tensor]()
        total = len(repeated) * system.recipe.config.image_tokens
        with progress("drawing", total) as update:
            batches = system.draw_batches(repeated, how, seeds=list(seeds) * len(captions), update=update)
            for picture in (picture for batch in batches for picture in batch):
                save_image(image_of(picture), next(paths))
                if len(kept) * picture[0].numel() < _SHEET_PIXELS:
                    kept.append(picture)
        groups = [kept[n : n + self.count] for n in range(0, len(kept), self.count)]
        try:
            shown = self._sheet(list(zip(captions, groups, strict=False)), sheet)
        except Exception as error:  # whatever it is, the pictures are there
            raise ValueError(
                f"no sheet could be made ({error}); the pictures are in {sheet.with_suffix('')}"
            ) from error
        some = "all of them" if shown == len(captions) else f"those of the first {shown:,} captions"
        say(f"{len(repeated):,} pictures in {sheet.with_suffix('')}{os.sep}, {some} on {sheet}")

    def _sheet(self, rows: list, sheet: Path) -> int:
        from cogview.pictures import contact_sheet

        side = rows[0][1][0].shape[-1]
        zoom = max(1, round(_SHOWN / side))
        return contact_sheet(rows, sheet, columns=max(1, _WIDE // (min(self.count, 8) * side * zoom)), zoom=zoom)


def read_captions(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CAPTIONS_BYTES + 1)
    except OSError as error:
        raise ValueError(f"captions-file: cannot read {path} ({error.strerror})") from error
    limit = f"at most {MAX_CAPTIONS_BYTES:,} bytes"
    require(len(data) <= MAX_CAPTIONS_BYTES, "captions-file", limit, f"more in {path}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"captions-file: expected UTF-8, got something else in line {line} of {path}") from error
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def sheet_path(out: Path) -> Path:
    """Where the sheet goes; ValueError if its format is none that can be written."""
    from cogview.pictures import format_of

    require(out.name.strip(".") != "", "out", "a file's name", str(out))
    sheet = out if out.suffix else out.with_name(out.name + ".png")
    format_of(sheet)
    return sheet


def make_places(sheet: Path) -> None:
    """Makes the folders of the sheet and of the single pictures; OSError if nothing can be written there."""
    folder = sheet.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if sheet.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        for path in (sheet, folder / "001.png"):
            beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            beside.touch()
            beside.unlink()
    except OSError as error:
        raise OSError(f"out: cannot write {sheet} and pictures in {folder} ({error.strerror})") from error


def picture_paths(captions: Sequence[str], count: int, sheet: Path) -> Iterator[Path]:
    """`001-1-a-fox-above-a-tree.png`: the caption's number, the picture's, and the caption."""
    from cogview.labels import file_name

    digits = max(3, len(str(len(captions)))), len(str(count))
    for number, caption in enumerate(captions, 1):
        words = file_name(caption)
        for k in range(1, count + 1):
            name = f"{number:0{digits[0]}d}-{k:0{digits[1]}d}{words and '-'}{words}"
            yield sheet.with_suffix("") / f"{name}{sheet.suffix.lower()}"


def say(words: str) -> None:
    """A line for people; what their terminal cannot show is no reason to fail."""
    encoding = console.encoding
    console.print(words.encode(encoding, "replace").decode(encoding), soft_wrap=True)
