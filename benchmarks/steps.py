"""`python -m benchmarks.steps`: a training step with three-region attention beside the same model with dense attention.

CogView with 64 x 64 image tokens behind 125 of text and 3 commands: 4,224 are fed, and a batch is one sequence; or with
the 50 x 50 of the fashion model, of which 2,560 are fed. Dense attention once by SDPA and once as CogView's own code
trains, with all scores in memory. All contestants share weights and the optimizer's state, and take steps in turn;
forward (with the loss), backward and optimizer (AdamW) are timed apart. Memory is what a step takes at its peak beside
weights and the optimizer's state. Writes results/steps/<device>.json.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview.config import TrainConfig
from cogview.flops import model_flops
from cogview.hardware import peak_flops
from cogview.parts.attend import Attention
from cogview.parts.transformer import Transformer
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.recipe import Recipe
from cogview.sequence import Batch
from cogview.train.optimizer import Optimizer
from cogview_ops.bench import machine

from . import report

PARTS = ("forward", "backward", "optimizer", "step")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_FEW: dict[str, Any] = {"image_vocab": 512, "text_vocab": 500}  # those of CogView are 8,192 and 50,000


_FASHION: dict[str, Any] = {"image_grid": 50, "max_positions": 2561}  # of the preset fashion-3b


def _config(layers: int, hidden: int, **sizes: Any) -> CogViewConfig:
    heads = hidden // 64
    long = {"image_grid": 64, "max_positions": 4225, "num_heads": heads, "dropout": 0.0}
    return CogViewConfig(num_layers=layers, hidden_size=hidden, **long | sizes)


CASES = {
    "4x512": _config(4, 512, **_FEW),
    "4x512-58240-words": _config(4, 512),
    "4x512-50x50": _config(4, 512, **_FEW, **_FASHION),
    "1x2560": _config(1, 2560, **_FEW),
    "1x2560-50x50": _config(1, 2560, **_FEW, **_FASHION),
    "1x2560-58240-words": _config(1, 2560),
    "quick": _config(1, 128, **_FEW, image_grid=8, max_positions=97, block_size=16, num_pivots=48),
}


def materialised(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention as CogView's own code trains it (standard_attention of its mpu/sparse_transformer.py); mask: 0 or 1."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    return (scores * mask - 10000.0 * (1.0 - mask)).softmax(dim=-1) @ v


class Materialised(Attention):
    """The same, causal."""

    def attend(self, q, k, v, context):
        return materialised(q, k, v, torch.ones(q.shape[2], q.shape[2], device=q.device, dtype=q.dtype).tril())


class Vanilla(CogView):
    def attention(self, index: int) -> Attention:
        return Materialised(self.config, index)


def recipes(config: CogViewConfig) -> dict[str, CogView]:
    sparse = dataclasses.replace(config, attention="three_region")
    return {
        "three_region": CogView(sparse),
        "window-2": CogView(dataclasses.replace(sparse, window_blocks=2)),
        "SDPA": CogView(config),
        "materialised scores": Vanilla(config),
    }


class Contestant(NamedTuple):
    recipe: Recipe
    attentions: list[Attention]
    batch: Batch


class Steps:
    """One model whose layers take the attention of any contestant, recipes that differ in it alone."""

    def __init__(self, recipes: Mapping[str, Recipe], dtype: str, device: torch.device):
        torch.manual_seed(0)
        self.device, first = device, next(iter(recipes.values()))
        self.model: Transformer = first.model().to(device)
        self.optimizer = Optimizer(self.model, TrainConfig(steps=1, batch_size=1, dtype=dtype))  # type: ignore[arg-type]
        self.layers: list[Any] = list(self.model.stack.layers)
        text = torch.randint(500, (1, first.config.max_text))
        codes = [torch.randint(512, (1, grid**2)) for grid in first.grids]
        self.contestants = {name: self._made(recipe, text, codes) for name, recipe in recipes.items()}

    def _made(self, recipe: Recipe, text: Tensor, codes: Sequence[Tensor]) -> Contestant:
        attentions = []
        for n, layer in enumerate(self.layers):
            with torch.device("meta"):
                attention = recipe.attention(n)
            for name, projection in layer.attention.named_children():
                setattr(attention, name, projection)
            attentions.append(attention)
        return Contestant(recipe, attentions, recipe.batch(text, *codes).to(self.device))

    def take(self, name: str) -> list[float]:
        """Seconds of each of PARTS."""
        _, attentions, batch = self.contestants[name]
        for layer, attention in zip(self.layers, attentions, strict=True):
            layer.attention = attention
        self.model.takes = frozenset(attentions[0].takes)
        times = [machine.now(self.device)]
        total, _ = self.model(batch.inputs, batch.context, targets=batch.targets, weights=batch.weights)
        loss = total / batch.weights.sum()
        times.append(machine.now(self.device))
        self.optimizer.backward(loss)
        times.append(machine.now(self.device))
        self.optimizer.step(1e-6)
        times.append(machine.now(self.device))
        return [after - before for before, after in pairwise(times)] + [times[-1] - times[0]]

    def states(self) -> int:
        """Bytes of weights and of the optimizer's state."""
        tensors = {x.data_ptr(): x for x in (*self.model.parameters(), *self.optimizer.tensors().values())}
        return sum(x.nbytes for x in tensors.values())

    def extra(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call takes at its peak beside those that are there."""
        if self.device.type != "cuda":
            return machine.peak_extra_bytes(call)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before


def rows(
    steps: Steps, ours: Mapping[str, str], dtype: str, rounds: int, *, same_result: bool = False
) -> list[dict[str, Any]]:
    """One for each part and each of ours, names of contestants with their rows' shapes; the other contestants are their
    baselines."""
    names, device = list(steps.contestants), steps.device
    extra = {}
    for name in names:
        steps.take(name)  # warms up
        extra[name] = steps.extra(partial(steps.take, name))
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(steps.take(name))
    facts = machine.facts_of(device)
    peak, states = peak_flops(device, getattr(torch, DTYPES[dtype])), steps.states()
    found = []
    for name, case in ours.items():
        for part, seconds in enumerate(zip(*(_by_part(times[n]) for n in names), strict=True)):
            of = dict(zip(names, seconds, strict=True))
            mine = median(of[name])
            low, _, high = quantiles(of[name], n=4)
            row = {"op": "training", "shape": case, "dtype": dtype, "direction": PARTS[part], **facts, "rounds": rounds}
            row |= {"median_s": mine, "iqr_s": high - low, "tokens": steps.contestants[name].recipe.length}
            row["baselines"] = {
                other: {"median_s": median(x), "ratio": median(x) / mine, "same_result": same_result}
                for other, x in of.items()
                if other not in ours
            }
            if PARTS[part] == "step":
                for n, into in ((name, row), *row["baselines"].items()):
                    flops = model_flops(steps.contestants[n].recipe)
                    into |= {"extra_bytes": extra[n], "states_bytes": states, "flops": flops}
                    into["mfu"] = flops / into["median_s"] / peak
            found.append(row)
    return found


def _by_part(times: list[list[float]]) -> list[tuple[float, ...]]:
    return list(zip(*times, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "steps", help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of each contestant, at least 2 (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES)[:-1], help="(default: all but quick)")
    parser.add_argument("--quick", action="store_true", help="one small case in two rounds, to see that it runs")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape in ["quick"] if options.quick else options.cases:
        for dtype in options.dtypes:
            steps = Steps(recipes(CASES[shape]), DTYPES[dtype], device)
            ours = {"three_region": shape, "window-2": f"{shape}-window-2"}
            for row in rows(steps, ours, dtype, 2 if options.quick else options.rounds):
                path = report.save(row, options.out)
                if row["direction"] == "step":
                    print(line(row), flush=True)
    print(path)


def line(row: dict[str, Any]) -> str:
    """A step in words."""
    words = [f"{row['shape']} {row['dtype']}: {report.seconds(row['median_s'])}, MFU {row['mfu']:.2f}"]
    for name, other in row["baselines"].items():
        words.append(f"{name} {other['ratio']:.2f} times as long, MFU {other['mfu']:.2f}")
        if row["extra_bytes"] is not None:
            mine, theirs, states = row["extra_bytes"], other["extra_bytes"], row["states_bytes"]
            less, all_less = (1 - (mine + n) / (theirs + n) for n in (0, states))
            words[-1] += f", {less:.0%} less memory of a step, {all_less:.0%} of all"
    return "; ".join(words)


if __name__ == "__main__":
    main()
