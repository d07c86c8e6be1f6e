"""What several processes do in the tests of training: small runs of test_train_run's pairs, by their folder."""

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_train_run import CONFIG, Pairs

from cogview.config import TrainConfig
from cogview.recipes import RECIPES
from cogview.train.loop import Trainer
from cogview.train.ranks import Ranks, joined
from cogview.train.sharding import built
from cogview.train.token_task import TokenTask

CPU = torch.device("cpu")


def trainer(
    ranks: Ranks, folder: Path, training: TrainConfig, config: Any = CONFIG, recipe: str = "cogview"
) -> Trainer:
    chosen = RECIPES[recipe](config)
    model = built(chosen, CPU, training, ranks, lambda model: None)
    return Trainer(TokenTask(chosen, model, Pairs(40), training, Pairs(7, seed=1), ranks), training, folder)


def in_processes(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(*args), a function of a module, gives in each, as torchrun starts them."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    return list(elastic_launch(config, _one)(work, *args).values())


def _one(work: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(1)
    return work(*args)


def losses(
    folder: Path, training: TrainConfig, steps: int, tensor: int = 1, save: bool = False, **model: Any
) -> list[Any]:
    """Of some steps of a run, resumed where there is something to resume, and the validation behind them."""
    config = dataclasses.replace(CONFIG, **model)
    with joined(CPU, tensor) as ranks:
        t = trainer(ranks, folder, training, config)
        t.resume()
        found = [t.step() for _ in range(steps)]
        if save:
            t.save()
        return [*found, t.validation.measure(), t.optimizer.loss_scale]
