"""`cogview style`: a run's model finetuned to pictures of a style (CogView paper, section 3.3)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option
from cogview.config import require

if TYPE_CHECKING:
    from cogview.recipes import Recipe
    from cogview.runs import Source

FEW = 2  # pictures of a style, at least
LONGEST = 60  # letters of its name
MANY = 100  # from so many on nothing is said; the paper takes 1,000
_NAME = re.compile(r"[^\w]+")
_SPLIT = "style-"
_NEVER = 10**9  # steps


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
        from cogview.recipes.style import thing
        from cogview.runs import folder_of, model_of
        from cogview.tokenizers.load import load_image_tokenizer

        sets = sets_of(self.pictures)
        name = self.name or (_slug(next(iter(sets))) if len(sets) == 1 else "styles")
        source = model_of(self.run_folder if self.source is None else self.source)
        other = folder_of(self.run_folder, name).resolve() != source.resolve()
        require(other, "name", "another than that of the model to begin with", name)
        given = {key: getattr(self, key) for key in ("steps", "learning_rate", "batch_size", "seed", "device")}
        mix, recipe = tuple(f"{split_of(style)}=1" for style in sets), _recipe(source)
        given["dropout"] = recipe.config.dropout  # not that of so few pictures, with which it would be another model
        given["validate_every"] = _NEVER  # on what was held out before, where the best had learned nothing of the style
        train = Train(self.run_folder, name, source, recipe="style", mix=mix, hold_out=0, **given)
        train.check()
        size = recipe.grids[-1] * load_image_tokenizer(self.run_folder / "vqvae.safetensors").config.downsample
        shards = {style: packed(style, path, self.run_folder) for style, path in sets.items()}
        for style, paths in shards.items():
            Tokenize(tuple(paths), self.run_folder, split=split_of(style), image_size=size).run()
        if train.run().finished:
            style = next(iter(sets))
            drawing = f'--run {self.run_folder} --name {name} --style "{style}"'
            console.print(f'next: cogview generate {drawing} --captions "{thing(style)}"')


def _recipe(source: Path) -> "Recipe":
    """Of a model folder."""
    from cogview.models import recipe_of
    from cogview.train import checkpoint

    found = next(checkpoint.readable(source), None)
    if found is None:
        raise ValueError(f"from: expected a trained model in {source}, got none")
    return recipe_of(*found)


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


def packed(style: str, path: Path, run: Path) -> list[Path]:
    """Shards of a style's pictures with its caption; ValueError where these are too few to be a style."""
    from cogview.data.pack import OtherShards, Packed, pack
    from cogview.progress import progress
    from cogview.recipes.style import learned

    found, out = Packed(), run / "shards" / _slug(style)
    try:
        with progress(f"packing {style}") as update:
            pack(path, out, update, found, every=learned(style), least=FEW)
    except OtherShards as error:
        before = f"{out} and {run / 'tokens' / split_of(style)}"
        raise ValueError(f"pictures of {style}: {path} is not what they were before; remove {before} first") from error
    except ValueError as error:
        raise ValueError(f"pictures of {style}: {error}") from error
    for kind, count in sorted(found.report.counts.items()):
        console.print(f"  {count:,} {kind}, first {found.report.first()[kind].where}")
    console.print(f"{found.pairs:,} pictures of {style}")
    if found.pairs < MANY:
        console.print(
            f"  few: the paper takes 1,000; fewer --steps keep a model from learning {found.pairs:,} by heart"
        )
    return found.shards


def check_learned(source: "Source", style: str) -> None:
    """ValueError unless that model was finetuned to the style, as its checkpoint tells."""
    from cogview.train import checkpoint

    mix = checkpoint.read_header(source.path).get("mix", {})
    known = ", ".join(name.removeprefix(_SPLIT) for name in mix if name.startswith(_SPLIT))
    expected = f"one that {source.path.parent.name} was finetuned to ({known or 'none'})"
    require(split_of(style) in mix, "style", f"{expected}, or captions that tell it themselves", style)


def split_of(style: str) -> str:
    """The name of its tokens."""
    return f"{_SPLIT}{_slug(style)}"


def _slug(style: str) -> str:
    return _NAME.sub("-", style.strip().lower()).strip("-")
