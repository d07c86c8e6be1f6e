"""`cogview style`: a run's model finetuned to pictures of a style (CogView paper, section 3.3)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.config import require

FEW = 2  # pictures of a style, at least
LONGEST = 60  # letters of its name
MANY = 100  # from so many on nothing is said; the paper takes 1,000
_NAME = re.compile(r"[^\w]+")


@dataclass(frozen=True)
class Style:
    """Finetune a run's model to pictures of a style, which need no captions: all are called "an image of STYLE style".
    Things that the model knows are then drawn in it: cogview generate --name NAME --style STYLE --captions "a fox"."""

    pictures: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="STYLE=PATH [STYLE=PATH ...]", help_behavior_hint="(required)"),
    ]
    """A style's name, as sketch, "oil painting" or 油画, and a folder of pictures or a .zip, .tar or .tar.gz of them.
    Several are learned by one model."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/mine")
    """Folder of the run: both tokenizers and the model."""
    source: Annotated[Path | None, option("PATH", "the run's gpt", name="from")] = None
    """Model folder to begin with."""
    name: Annotated[str | None, option("NAME", "the style's, or styles")] = None
    """Of the new model, beside the one that it begins with."""
    steps: Annotated[int | None, option("INT", "as recipe style has them")] = None
    """Of the finetuning. More are nearer to the style and forget more of what was known."""
    learning_rate: Annotated[float | None, option("FLOAT", "as recipe style has it")] = None
    """The highest, behind the warm-up."""
    batch_size: Annotated[int | None, option("INT", "as recipe style has it")] = None
    """Pictures a step."""
    seed: int = 0
    """Of the order of the pictures."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    def run(self) -> None:
        from cogview.commands.tokenize import Tokenize
        from cogview.commands.train import Train
        from cogview.runs import folder_of, model_of

        sets = sets_of(self.pictures)
        name = self.name or (_slug(next(iter(sets))) if len(sets) == 1 else "styles")
        source = model_of(self.run_folder if self.source is None else self.source)
        other = folder_of(self.run_folder, name).resolve() != source.resolve()
        require(other, "name", "another than that of the model to begin with", name)
        given = {key: getattr(self, key) for key in ("steps", "learning_rate", "batch_size", "seed", "device")}
        mix = tuple(f"{split_of(style)}=1" for style in sets)
        train = Train(self.run_folder, name, source, recipe="style", mix=mix, hold_out=0, **given)
        train.check()
        size = _size(source, self.run_folder)
        for style, path in sets.items():
            shards = packed(style, path, self.run_folder / "shards" / _slug(style))
            Tokenize(tuple(shards), self.run_folder, split=split_of(style), image_size=size).run()
        if train.run().finished:
            drawing = f'--run {self.run_folder} --name {name} --style "{next(iter(sets))}"'
            console.print(f'next: cogview generate {drawing} --captions "a fox"')


def _size(source: Path, run: Path) -> int:
    """Pixels of a side of the pictures that a model draws."""
    from cogview.models import recipe_of
    from cogview.tokenizers.load import load_image_tokenizer
    from cogview.train import checkpoint

    found = next(checkpoint.readable(source), None)
    if found is None:
        raise ValueError(f"from: expected a trained model in {source}, got none")
    return recipe_of(*found).grids[-1] * load_image_tokenizer(run / "vqvae.safetensors").config.downsample


def sets_of(given: tuple[str, ...]) -> dict[str, Path]:
    """Paths by style; ValueError in a sentence for what names none."""
    sets: dict[str, Path] = {}
    for item in given:
        style, _, path = item.partition("=")
        require(bool(style.strip()) and bool(path), "pictures", "STYLE=PATH, as sketch=drawings", item)
        require(1 <= len(_slug(style)) <= LONGEST, "pictures", f"a style's name of 1 to {LONGEST} letters", style)
        known = [_slug(other) for other in sets]
        require(_slug(style) not in known, "pictures", f"one path for style {style}", list(given))
        require(Path(path).exists(), f"pictures of {style}", "a folder or an archive", path)
        sets[style.strip()] = Path(path)
    require(bool(sets), "pictures", "at least one STYLE=PATH", list(given))
    return sets


def packed(style: str, path: Path, out: Path) -> list[Path]:
    """Shards of a style's pictures with its caption; ValueError where these are too few to be a style."""
    from cogview.data.pack import Packed, pack
    from cogview.progress import progress
    from cogview.recipes.style import learned

    found = Packed()
    with progress(f"packing {style}") as update:
        pack(path, out, update, found, every=learned(style), least=FEW)
    for kind, count in sorted(found.report.counts.items()):
        console.print(f"  {count:,} {kind}, first {found.report.first()[kind].where}")
    console.print(f"{found.pairs:,} pictures of {style}")
    if found.pairs < MANY:
        console.print(
            f"  few: the paper takes 1,000; fewer --steps keep a model from learning {found.pairs:,} by heart"
        )
    return found.shards


def split_of(style: str) -> str:
    """The name of its tokens."""
    return f"style-{_slug(style)}"


def _slug(style: str) -> str:
    return _NAME.sub("-", style.strip().lower()).strip("-")
