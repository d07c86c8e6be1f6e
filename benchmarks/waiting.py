"""`python -m benchmarks.waiting`: what threads that wait should do, alone and beside other busy processes.

The tiny preset's training, by one process and by two of torchrun's, the demo's image tokenizer and drawing, each by
OpenMP's ways of waiting (GNU's: by default it spins a millisecond or so), with no, one and two processes of normal
priority that only count. Fresh processes each, the ways in turn: median, least and most of the rounds. Writes
results/waiting/<device>.json, in a quarter of an hour or so.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cogview.cli import SPINS
from cogview.config import TrainConfig
from cogview.data.files import write_json
from cogview.demo.demo import IMAGE
from cogview.generate import generate
from cogview.recipes import preset
from cogview.recipes.cogview import CogView
from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.train_image import TRAINING, Pictures, PictureTask
from cogview.train.loop import Trainer
from cogview.train.ranks import ALONE, Ranks, joined, launched
from cogview.train.sharding import built
from cogview.train.token_task import TokenTask
from cogview_ops.bench import machine

from .report import RESULTS
from .stability import Scenes

WAYS: dict[str, dict[str, str]] = {
    "default": {},
    f"GOMP_SPINCOUNT={SPINS}": {"GOMP_SPINCOUNT": str(SPINS)},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
WORK = ("training, sequences/s", "image tokenizer, images/s", "one picture, tokens/s", "32 pictures, tokens/s")
SPREAD = "training by two processes, sequences/s"


def trainer(ranks: Ranks) -> Trainer:
    """Of the tiny preset."""
    config, training = preset("tiny")
    # scenes have the bytes of their captions for text, too many for the preset
    training = dataclasses.replace(training, seconds=None, steps=10**6, truncate_text=True)
    recipe = CogView(config)
    model = built(recipe, torch.device("cpu"), training, ranks, lambda model: None)
    scenes = Scenes(256, config.image_grid)
    return Trainer(TokenTask(recipe, model, scenes, training, ranks=ranks), training, Path("unused"))


def measure_spread(seconds: float) -> list[float]:
    """Of SPREAD, as one of torchrun's processes; nothing but on the first."""
    with joined(torch.device("cpu")) as ranks:
        gpt = trainer(ranks)
        gpt.step(), gpt.step()
        steps, spent, begun = 0, 0.0, time.perf_counter()
        while spent < seconds:
            gpt.step()
            spent, *_ = gpt._agreed(time.perf_counter() - begun, False, False)  # all stop alike
            steps += 1
        return [gpt.config.batch_size * steps / spent] if ranks.first else []


def measure(seconds: float) -> list[float]:
    """Of each WORK, in this process."""
    gpt = trainer(ALONE)
    task: Any = gpt.task
    recipe, model, config = task.recipe, task.model, task.recipe.config
    pictures = torch.randint(256, (256, 3, 64, 64), dtype=torch.uint8)
    images = TrainConfig(steps=10**6, **TRAINING)
    vqvae = Trainer(PictureTask(VQVAE(IMAGE), Pictures(pictures)), images, Path("unused"))
    trained = [_rate(t.step, seconds) * t.config.batch_size for t in (gpt, vqvae)]
    model.float()
    drawn = []
    for count in (1, 32):
        rate = _rate(partial(generate, recipe, model, [[1, 2]] * count), seconds)
        drawn.append(rate * count * config.image_tokens)
    return trained + drawn


def _rate(call: Callable[[], Any], seconds: float) -> float:
    """Calls a second, after two to warm up."""
    call(), call()
    begun, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < seconds:
        call()
        calls += 1
    return calls / spent


@contextmanager
def busy(processes: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def rounds(count: int, seconds: float) -> dict[tuple[str, int], list[list[float]]]:
    """What `measure` found in each round, by the way of waiting and the busy processes beside it."""
    clean = {name: value for name, value in os.environ.items() if name not in machine.WAITING}
    child = ["-m", "benchmarks.waiting", "--child", "--seconds", str(seconds)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(count):
        for others, (way, variables) in itertools.product((0, 1, 2), WAYS.items()):
            rates: list[float] = []
            for command in (child, [*torchrun, *child]):
                with busy(others):
                    how: Any = {"env": clean | variables, "stdout": subprocess.PIPE, "check": True}
                    run = subprocess.run([sys.executable, *command], **how)
                rates += [rate for line in run.stdout.splitlines() for rate in json.loads(line)]
            found.setdefault((way, others), []).append(rates)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description="How threads should wait.")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4, help="of each work (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "waiting", help="folder (default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if rates := (measure_spread if launched() else measure)(options.seconds):
            print(json.dumps(rates), flush=True)  # by one process: lines of several could run together
        return 0
    with Console().status("measuring"):
        found = rounds(options.rounds, options.seconds)
    rows = [
        {"way": way, "busy processes": others, "rounds": options.rounds}
        | {
            name: [round(value, 1) for value in (statistics.median(x), min(x), max(x))]
            for name, x in zip((*WORK, SPREAD), zip(*rates, strict=True), strict=True)
        }
        for (way, others), rates in found.items()
    ]
    facts = machine.facts()
    path = options.out / f"{machine.slug(facts['device'])}.json"
    write_json(path, {"facts": facts, "rows": rows})
    table = Table("threads that wait", "busy processes beside it", *WORK, SPREAD)
    for row in rows:
        cells = (f"{row[name][0]:.0f}" for name in (*WORK, SPREAD))
        table.add_row(row["way"], str(row["busy processes"]), *cells)
    Console().print(table)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
