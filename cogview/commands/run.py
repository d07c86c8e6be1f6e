"""Commands about runs: the demo, training, drawing, and what there is."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from cogview.config import TrainConfig, require
from cogview.data.tokens import TokenDataset
from cogview.recipes import RECIPES, named, preset
from cogview.recipes.cogview import Kind

console = Console(highlight=False)


@dataclass(frozen=True)
class Demo:
    """Train a small CogView on composed scenes and look at what it draws for captions it never saw."""

    out: Path = Path("runs/demo")
    """Folder for everything; a stopped demo goes on in it."""
    minutes: float = 15
    """Of the whole, four of installation included. Where the machine is slower than planned, training may take three
    times as long. A longer demo in the same folder goes on from a shorter one."""

    def run(self) -> None:
        from cogview.demo import demo

        verdict = demo.run(self.out, self.minutes, console)
        console.print(verdict)
        console.print(f"Look at {self.out / 'samples.png'} and read {self.out / 'report.md'}")


@dataclass(frozen=True)
class Train:
    """Train a GPT on tokens; the same command goes on where it was stopped."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/mine")
    """Folder of the run, with tokens/train and maybe tokens/test; checkpoints go to its gpt folder."""
    recipe: Literal[*RECIPES] = "cogview"  # type: ignore[valid-type]
    """The system or task."""
    preset: Literal[*dict.fromkeys(name for r in RECIPES.values() for name in r.presets)] = "tiny"  # type: ignore[valid-type]
    """Of the recipe: sizes and training."""
    steps: int | None = None
    """Length of the run in steps; bit for bit repeatable."""
    minutes: float | None = None
    """Or its length in minutes; with both it ends at whichever comes first."""
    attention: Kind | None = None
    """Of CogView. Default: the preset's, like all that is not given."""
    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    learning_rate: float | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    text_weight: float | None = None
    image_weight: float | None = None
    checkpoint_activations: bool | None = None
    compile: bool | None = None
    seed: int | None = None
    device: str = "cpu"

    def run(self) -> None:
        from cogview.pipeline import sizes_of
        from cogview.train.loop import Trainer
        from cogview.train.token_task import TokenTask

        folders = [self.run_folder / "tokens" / split for split in ("train", "test")]
        data, device = TokenDataset(folders[0]), available(self.device)
        held_out = TokenDataset(folders[1]) if folders[1].exists() else None
        if held_out is not None and held_out.tokenizers != data.tokenizers:
            raise ValueError(f"{folders[1]} was made with other tokenizers than {folders[0]}: tokenize it again")
        (config, training), recipe_type = preset(self.preset, self.recipe), named(self.recipe)
        has = self.attention is None or hasattr(config, "attention")
        require(has, "attention", f"none with recipe {self.recipe}, which has its own", self.attention)
        shape = {"num_layers": self.layers, "hidden_size": self.hidden_size, "num_heads": self.heads}
        config = _replace(config, **shape, attention=self.attention)
        sizes = sizes_of(data) if held_out is None else sizes_of(data, held_out)
        recipe, training = recipe_type(recipe_type.fit(config, **sizes)), self._training(training)
        torch.manual_seed(training.seed)
        model = recipe.model().to(device)
        trainer = Trainer(TokenTask(recipe, model, data, training, held_out), training, self.run_folder / "gpt")
        console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} sequences")
        if trainer.resume():
            console.print(f"going on at step {trainer.state.step}")
        result = trainer.run()
        console.print(f"{'done' if result.finished else 'stopped'} at step {result.state.step}: {result.checkpoint}")
        for name, value in result.validation.items():
            console.print(f"  held-out {name} {value:.3f}")

    def _training(self, base: TrainConfig) -> TrainConfig:
        if self.steps is not None or self.minutes is not None:
            seconds = None if self.minutes is None else 60 * self.minutes
            base = dataclasses.replace(base, steps=self.steps, seconds=seconds)
        names = {f.name for f in dataclasses.fields(base)} - {"steps", "seconds"}
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return _replace(base, **given)


def available(device: str) -> torch.device:
    """A device that torch can compute on here."""
    try:
        torch.zeros(1, device=device).item()  # what torch was built without comes as any of these
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"device: expected one that torch can use here, got {device!r} ({reason})") from error
    return torch.device(device)


def _replace(base, **values):
    """A dataclass with those values that are not None."""
    return dataclasses.replace(base, **{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Generate:
    """Draw pictures for captions with a trained run."""

    captions: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Repeat for several captions."""
    run_folder: Annotated[Path, tyro.conf.arg(name="run")] = Path("runs/demo")
    """Folder of the run: both tokenizers and the GPT's checkpoints."""
    out: Path = Path("pictures.png")
    """The contact sheet (PNG)."""
    count: int = 4
    """Pictures for each caption."""
    temperature: float = 0.9
    top_k: int = 200
    seed: int = 0
    device: str = "cpu"

    def run(self) -> None:
        from cogview.pictures import contact_sheet
        from cogview.system import System

        if not self.captions or self.count < 1:
            raise ValueError("captions, count: expected at least one caption and one picture")
        system = System.load(self.run_folder, available(self.device))
        repeated = [caption for caption in self.captions for _ in range(self.count)]
        seeds = [self.seed + n for _ in self.captions for n in range(self.count)]
        with console.status("drawing"):
            pictures = system.draw(repeated, seeds=seeds, temperature=self.temperature, top_k=self.top_k)
        rows = list(zip(self.captions, pictures.split(self.count), strict=True))
        contact_sheet([(caption, list(group)) for caption, group in rows], self.out, columns=2, zoom=2)
        console.print(f"{len(pictures)} pictures in {self.out}")


@dataclass(frozen=True)
class Info:
    """Versions, the operators that run here, and the presets."""

    def run(self) -> None:
        from cogview_ops import info

        info.main()
        print(f"\n{'preset':<24}{'layers':>8}{'hidden':>8}{'heads':>8}{'tokens':>8}{'parameters':>16}  attention")
        for name, recipe in RECIPES.items():
            for preset_name, (c, _) in recipe.presets.items():
                with torch.device("meta"):
                    count = sum(p.numel() for p in recipe(c).model().parameters())
                sizes = f"{c.num_layers:>8}{c.hidden_size:>8}{c.num_heads:>8}{c.max_positions - 1:>8}"
                title = f"{name} {preset_name}"
                print(f"{title:<24}{sizes}{count:>16,}  {getattr(c, 'attention', name)}")
