"""What several processes do in the tests of training: small runs of test_train_run's pairs, each in a folder."""

import dataclasses
import os
import resource
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import preloaded
from test_train_run import CONFIG, TRAIN, Pairs

from cogview.config import TrainConfig
from cogview.recipes.cogview import CogView
from cogview.train import loss_scale
from cogview.train.feed import Feed
from cogview.train.loop import Trainer
from cogview.train.ranks import ALONE, Ranks, joined, local
from cogview.train.sharding import built
from cogview.train.token_task import TokenTask

CPU = torch.device("cpu")
SHARED = dataclasses.replace(TRAIN, steps=20, batch_size=8, hide_context=0.5, drop_text=0.2, accumulate=2)
BLOCKS: dict[str, Any] = {"dtype": "float16", "gradient_scaling": "blocks"}


def in_processes(count: int, work: Callable[..., Any], *args: Any, heard: bool = False) -> list[Any]:
    """What work(*args), a function of a module, gives in each, as torchrun starts them. heard: they print where this
    process does."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    how = "spawn" if heard else preloaded()
    config = LaunchConfig(1, 1, count, run_id=uuid.uuid4().hex, max_restarts=0, start_method=how, **rendezvous)
    return list(elastic_launch(config, _one)(work, *args).values())


def _one(work: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(1)
    return work(*args)


def trainer(ranks: Ranks, folder: Path, training: TrainConfig, config: Any = CONFIG) -> Trainer:
    recipe = CogView(config)
    model = built(recipe, CPU, training, ranks, lambda model: None)
    return Trainer(TokenTask(recipe, model, Pairs(40), training, Pairs(7, seed=1), ranks), training, folder)


def losses(folder: Path, training: TrainConfig, steps: int, ranks: Ranks = ALONE, save: bool = False) -> list[Any]:
    """Of some steps of a run, resumed where there is something to resume, and the validation behind them."""
    t = trainer(ranks, folder, training)
    t.resume()
    found: list[Any] = [t.step() for _ in range(steps)]
    if save:
        t.save()
    return [*found, t.validation.measure(), t.optimizer.loss_scale]


def halves(folder: Path, ranks: Ranks = ALONE) -> list[Any]:
    """In float16, with a loss scale at which no gradient overflows, in parts of any size."""
    loss_scale.FIRST = 2.0**8
    return losses(folder, dataclasses.replace(SHARED, dtype="float16"), 3, ranks)


def blocks(folder: Path, ranks: Ranks = ALONE) -> list[Any]:
    """In float16 with a scale for each block and an average of the parameters, saved and resumed; the scales, and the
    first values of the average."""
    how = dataclasses.replace(SHARED, **BLOCKS, checkpoint_activations="full", average=0.5)
    found = losses(folder, how, 2, ranks, save=True)[:2]
    t = trainer(ranks, folder, how)
    t.resume()
    found.append(t.step())
    with t.optimizer.averaged():
        found.append(t.validation.measure())
    found.append(t.step())  # with the parameters themselves
    assert t.optimizer.scale is not None
    assert t.optimizer.average is not None
    part = {name: local(value).flatten()[:2].tolist() for name, value in t.optimizer.average.values.items()}
    return [*found, t.optimizer.scale.tensor().tolist(), part["embedding.words.weight"] if ranks.first else []]


def begun_later(folder: Path, ranks: Ranks = ALONE) -> float:
    """How far an average that begins when a run is resumed is from the parameters, at most."""
    losses(folder, SHARED, 2, ranks, save=True)
    t = trainer(ranks, folder, dataclasses.replace(SHARED, average=0.9))
    t.resume()
    assert t.optimizer.average is not None
    pairs = [(local(value), local(t.optimizer.master[name])) for name, value in t.optimizer.average.values.items()]
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


def sharing(ranks: Ranks, tensor: int) -> Ranks:
    """The same processes, so many of which share the heads of a layer."""
    sizes = ranks.count // tensor, tensor
    mesh = torch.distributed.init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
    return dataclasses.replace(ranks, tensor=tensor, mesh=mesh)


def refusal(ranks: Ranks, folder: Path, config: Any = CONFIG, **changes: Any) -> str:
    """What a run is refused with before its first step."""
    try:
        trainer(ranks, folder, dataclasses.replace(SHARED, **changes), config).resume()
    except ValueError as error:
        return str(error)
    return ""


def gathers(ranks: Ranks, folder: Path, reshard: bool) -> int:
    """How often a step of two parts gathers parameters."""
    t = trainer(ranks, folder, dataclasses.replace(SHARED, reshard=reshard))
    t.step()
    with torch.profiler.profile() as seen:
        t.step()
    return sum(event.count for event in seen.key_averages() if event.key == "c10d::_allgather_base_")


def meanwhile(ranks: Ranks, folder: Path) -> list[Any]:
    """Steps, behind the first of which a checkpoint is begun that is not written before the third, and those of a run
    that goes on from it."""
    from cogview.train.shards import Writer

    t, write, go_on = trainer(ranks, folder, SHARED), Writer.write_data, threading.Event()
    found: list[Any] = [t.step()]
    Writer.write_data = lambda *args: go_on.wait() and write(*args)  # type: ignore[method-assign]
    t._begin_save()
    found += [t.step(), t.step(), t.saver.done]
    go_on.set()
    t.saver.end()
    Writer.write_data = write  # type: ignore[method-assign]
    return [*found, *losses(folder, SHARED, 2, ranks)[:2]]


def refused_by_one(ranks: Ranks) -> str:
    """What all are told where one of them has an error."""

    def work() -> None:
        if ranks.rank == 1:
            raise OSError("the second cannot read it")

    try:
        ranks.alike(work)
    except OSError as error:
        return str(error)
    return ""


def of_two(folder: Path) -> dict[str, Any]:
    """What two processes do, one thing after the other."""
    with joined(CPU) as ranks:
        found: dict[str, Any] = {"float32": losses(folder / "float32", SHARED, 3, ranks)}
        found["bfloat16"] = losses(folder / "bfloat16", dataclasses.replace(SHARED, dtype="bfloat16"), 3, ranks)
        found["float16"] = halves(folder / "float16", ranks)
        found["blocks"] = blocks(folder / "blocks", ranks)
        found["begun later"] = begun_later(folder / "later", ranks)
        found["straight"] = losses(folder / "straight", SHARED, 4, ranks)
        found["meanwhile"] = meanwhile(ranks, folder / "meanwhile")
        found["parts"] = losses(folder / "parts", SHARED, 2, ranks, save=True)[:2]
        found["parts"] += losses(folder / "parts", SHARED, 2, ranks)
        selective, heads = dataclasses.replace(SHARED, checkpoint_activations="selective"), sharing(ranks, 2)
        found["heads"] = losses(folder / "heads", selective, 3, heads)
        found["heads, float16"] = halves(folder / "heads-16", heads)
        found["muon"] = losses(folder / "muon", dataclasses.replace(SHARED, optimizer="muon"), 3, ranks, save=True)
        found["gathers"] = [gathers(ranks, folder / "x", reshard) for reshard in (True, False)]
        found["refused"] = [
            refusal(ranks, folder / "x", batch_size=6),
            refusal(heads, folder / "x", dataclasses.replace(CONFIG, num_heads=1)),
            refusal(ranks, folder / "x", learning_rate=1e-3 * (1 + ranks.rank)),
            refusal(ranks, folder / "parts", dataclasses.replace(CONFIG, hidden_size=64)),
            refused_by_one(ranks),
            refusal(
                ranks, folder / "x", dtype="float16", gradient_scaling="blocks", checkpoint_activations="selective"
            ),
        ]
    return found


def faults(folder: Path) -> dict[str, Any]:
    """Of two processes: a batch that is no number on one of them, then a disk on which the second's checkpoint has no
    room, then one on which the first's has none, nor its log."""
    with joined(CPU) as ranks:
        t = trainer(ranks, folder, dataclasses.replace(SHARED, steps=11, save_every=3, keep=9))
        made = t.task.batch

        def broken(samples: Any, indices: Any, *draws: Any, **how: Any) -> Any:
            batch = made(samples, indices, *draws, **how)
            return dataclasses.replace(batch, weights=batch.weights * (torch.nan if ranks.rank else 1))

        t.task.batch = broken  # type: ignore[method-assign]
        found = {"broken": t.step()}
        t.feed.wait()
        t.task.batch = made  # type: ignore[method-assign]
        t.feed = Feed(t.task, t.config)
        begin = t._begin_save

        def begin_save() -> Path:
            full = t.state.step < 9 and ranks.rank == (1 if t.state.step < 5 else 0)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (1000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            return begin()

        t._begin_save = begin_save  # type: ignore[method-assign]
        result = t.run()
        return found | {"finished": result.finished, "skipped": result.state.skipped, "loss": result.validation["loss"]}


def mortal(folder: Path) -> None:
    """As torchrun starts it: a run to its end, of which the second process dies once."""
    with joined(CPU) as ranks:
        t = trainer(ranks, folder, dataclasses.replace(SHARED, steps=30, save_every=3))
        t.resume()
        step = t.step

        def last() -> dict[str, float]:
            if ranks.rank == 1 and t.state.step == 7 and not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(float(os.environ.get("SECONDS_A_STEP", "0")))
            return step()

        t.step = last  # type: ignore[method-assign]
        result = t.run()
        if ranks.first:
            print(f"came to step {result.state.step}, finished {result.finished}", flush=True)


def to_its_end(folder: Path) -> None:
    """A run of one process that is nearly always writing a checkpoint, resumed where there is one."""
    torch.set_num_threads(1)
    hours: Any = {"seconds": 36_000.0, "save_seconds": 36_000.0}  # which only a clock that jumps comes to
    every: Any = {"save_every": 2, "validate_every": 7, "log_every": 3}
    t = trainer(ALONE, folder, dataclasses.replace(SHARED, steps=60, **every, **hours))
    t.resume()
    t.run()


def of_four(folder: Path) -> list[Any]:
    """Two steps of a run whose checkpoint others go on from."""
    full = dataclasses.replace(SHARED, accumulate=1, checkpoint_activations="full", reshard=False)
    with joined(CPU, 2) as ranks:
        return losses(folder, full, 2, ranks, save=True)


def onward(folder: Path) -> dict[str, Any]:
    """Two processes go on from a checkpoint of four, from one of a process alone, and past one that is damaged."""
    with joined(CPU) as ranks:
        found = {name: losses(folder / name, SHARED, 2, ranks) for name in ("of four", "of one")}
        return found | {name: losses(folder / name, SHARED, 1, ranks) for name in ("damaged", "cut")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mortal(Path(sys.argv[1]))
