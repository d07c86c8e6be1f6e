"""Models of the demo and of studies: trained in so many steps, from where they were stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogview.config import TrainConfig
from cogview.data.tokens import Rows, TokenDataset
from cogview.models import load_model
from cogview.pipeline import sizes_of
from cogview.recipes.cogview import CogView
from cogview.recipes.recipe import Recipe
from cogview.train import checkpoint
from cogview.train.damage import aside
from cogview.train.finetune import start_from
from cogview.train.interrupts import Interrupted
from cogview.train.loop import Result, Trainer
from cogview.train.task import Task
from cogview.train.token_task import TokenTask

Tokens = TokenDataset | Rows


def drawing(folder: Path, steps: int, data: TokenDataset, held_out: TokenDataset) -> Result:
    """A model of the preset tiny, which draws pictures."""
    return new(folder, CogView, steps, data, held_out)


def new(
    folder: Path,
    kind: type[Recipe],
    steps: int,
    data: Tokens,
    held_out: Tokens,
    *,
    preset: str = "tiny",
    **of: Any,
) -> Result:
    """A model of a recipe's preset. of: fields of its training, instead of the preset's."""
    config, training = kind.presets[preset]
    recipe, training = kind(kind.fit(config, **sizes_of(data, held_out))), replace(training, steps=steps, **of)
    torch.manual_seed(training.seed)
    return trained(folder, TokenTask(recipe, recipe.model(), data, training, held_out), training)


def finetuned(
    folder: Path,
    kind: type[Recipe],
    source: Path,
    steps: int,
    data: Tokens,
    held_out: Tokens | None,
    *,
    seconds: float | None = None,
    **of: Any,
) -> Result:
    """One of another recipe that begins with the best weights of the model in `source`; one that began with other
    weights of it is set aside. seconds: that it may take. of: fields of its training, instead of the preset's."""
    best = checkpoint.best(source)
    assert best is not None
    about = {"from": {"folder": source.name, "step": checkpoint.step_of(best)}}
    if (begun := next(checkpoint.readable(folder), None)) is not None and begun[1].get("from") != about["from"]:
        folder.rename(aside(folder))
    before, training = load_model(best)[0], replace(kind.presets["tiny"][1], steps=steps, **of)
    recipe = kind(kind.begun(before.config))
    torch.manual_seed(training.seed)
    model = recipe.model()
    start_from(best, before, recipe, model)
    return trained(folder, TokenTask(recipe, model, data, training, held_out), training, about, seconds)


def trained(
    folder: Path, task: Task, training: TrainConfig, about: dict[str, Any] | None = None, seconds: float | None = None
) -> Result:
    """To its end; the steps say when that is, unless it comes to so many seconds. about: what else its checkpoints
    say."""
    trainer = Trainer(task, replace(training, seconds=seconds), folder, about)
    trainer.resume()
    result = trainer.run()
    if not result.finished:
        raise Interrupted
    return result


def fact(result: Result) -> dict[str, Any]:
    return {"steps": result.state.step, "seconds": result.state.elapsed, "held_out": result.validation}
