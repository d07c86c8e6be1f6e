"""`cogview train`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from cogview.commands.device import available
from cogview.config import TrainConfig, require
from cogview.data.tokens import TokenDataset
from cogview.recipes import RECIPES, named, preset
from cogview.recipes.cogview import Kind

console = Console(highlight=False)


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


def _replace(base, **values):
    """A dataclass with those values that are not None."""
    return dataclasses.replace(base, **{name: value for name, value in values.items() if value is not None})
