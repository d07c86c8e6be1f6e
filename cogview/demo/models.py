"""Models of the demo and of studies: trained in so many steps, from where they were stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogview.config import TrainConfig
from cogview.data.tokens import TokenDataset
from cogview.models import load_model
from cogview.pipeline import sizes_of
from cogview.recipes import preset
from cogview.recipes.cogview import CogView
from cogview.recipes.recipe import Recipe
from cogview.train import checkpoint
from cogview.train.finetune import start_from
from cogview.train.interrupts import Interrupted
from cogview.train.loop import Result, Trainer
from cogview.train.task import Task
from cogview.train.token_task import TokenTask


def drawing(folder: Path, steps: int, data: TokenDataset, held_out: TokenDataset) -> Result:
    """A model of the preset tiny, which draws pictures."""
    config, training = preset("tiny")
    recipe, training = CogView(CogView.fit(config, **sizes_of(data, held_out))), replace(training, steps=steps)
    torch.manual_seed(training.seed)
    return trained(folder, TokenTask(recipe, recipe.model(), data, training, held_out), training)


def finetuned(
    folder: Path, kind: type[Recipe], source: Path, steps: int, data: TokenDataset, held_out: TokenDataset
) -> Result:
    """One of another recipe that begins with the best weights of the model in `source`."""
    best = checkpoint.best(source)
    assert best is not None
    before, training = load_model(best)[0].config, replace(preset("tiny", kind.name)[1], steps=steps)
    recipe = kind(kind.begun(before))
    torch.manual_seed(training.seed)
    model = recipe.model()
    start_from(best, before, model)
    return trained(folder, TokenTask(recipe, model, data, training, held_out), training)


def trained(folder: Path, task: Task, training: TrainConfig) -> Result:
    """To its end; the steps say when that is."""
    trainer = Trainer(task, replace(training, seconds=None), folder)
    trainer.resume()
    result = trainer.run()
    if not result.finished:
        raise Interrupted
    return result


def fact(result: Result) -> dict[str, Any]:
    return {"steps": result.state.step, "seconds": result.state.elapsed, "held_out": result.validation}
