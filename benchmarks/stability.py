"""`python -m benchmarks.stability`: which float16 training survives a large learning rate, with and without Sandwich-LN
and PB-relax (CogView, arXiv 2105.13290, section 2.4, figure 4(b)).

Weights and activations are float16, master weights and optimizer float32, the loss scale dynamic: the trainer's own
float16. Data are the demo's scenes: their captions' bytes, their pictures' pixels in 512 colours. Without PB-relax
attention is the plain float16 formula, softmax(q kᵀ / √d), and the norms are plain; the statistics of all norms are
float32. There is no dropout.
A run ends when its loss was not finite PATIENCE times in a row: the forward pass overflows, no loss scale can help.

Writes results/stability/<preset>-<device>.json and .png after every run. Ctrl-C stops; the same command goes on.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig
from cogview.data.shuffle import permutation
from cogview.demo.scenes import caption, render, sample_scenes
from cogview.parts.attend import Attention
from cogview.parts.stack import Layer
from cogview.parts.transformer import Transformer
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.sequence import pad_text
from cogview.train.loop import Trainer
from cogview.train.token_task import TokenTask
from cogview_ops import layer_norm, pb_relax_softmax
from cogview_ops.bench import machine

from . import stability_report
from .report import RESULTS

ALPHA = 32.0  # of PB-relax attention, as in the paper
PATIENCE = 5
PLACES = ("scores", "branch", "main", "branch", "main")  # what a layer tells, in this order
NAMES = ("attention scores", "attention branch", "main branch", "MLP branch", "main branch")

Watch = Callable[[Tensor], None]


@dataclass(frozen=True)
class Variant:
    name: str
    sandwich: bool
    relax: bool


VARIANTS = (
    Variant("pre-LN", False, False),
    Variant("pre-LN + PB-relax", False, True),
    Variant("Sandwich-LN", True, False),
    Variant("Sandwich-LN + PB-relax", True, True),
)


@dataclass(frozen=True)
class Preset:
    hidden: int
    heads: int
    grid: int
    """Pixels per side of a picture, each a token."""
    text: int
    """Bytes of a caption at most."""
    steps: int
    rates: tuple[float, ...] = (0.1, 0.01)
    layers: int = 64
    batch: int = 4
    scenes: int = 512


# Adam moves every weight by the rate, so what a matrix adds to an activation grows as rate x width: 0.1 at width 128 is
# like 0.0125 at width 1024.
PRESETS = {
    "cpu": Preset(hidden=128, heads=2, grid=8, text=28, steps=40),
    "full": Preset(hidden=1024, heads=16, grid=16, text=60, steps=200, scenes=1024),
    "tiny": Preset(hidden=32, heads=2, grid=4, text=12, steps=3, layers=2, batch=2, scenes=6),  # a rehearsal
}


class Scenes:
    """The demo's scenes as tokens that need no tokenizer; what `TokenTask` takes as data."""

    tokenizers = property(lambda self: ["bytes", "colours"])

    def __init__(self, count: int, grid: int):
        scenes = sample_scenes("train", count)
        pixels = np.stack([np.asarray(render(scene).resize((grid, grid))) for scene in scenes]) // 32
        self.codes = torch.from_numpy(pixels.astype(np.int64) @ [64, 8, 1]).flatten(1)
        self.text = pad_text([list(caption(s, ("en", "zh")[i % 2]).encode()) for i, s in enumerate(scenes)])

    def __len__(self) -> int:
        return len(self.codes)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.text[indices], self.codes[indices]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return permutation(len(self), seed, epoch)


class WatchedAttention(Attention):
    """Causal attention by the formula, all in the input's dtype, that shows its scores before anything hides them."""

    def __init__(self, config: ModelConfig, index: int, watch: Watch):
        super().__init__(config, index)
        self.relax, self.watch = config.relax, watch

    def attend(self, q, k, v, context):
        scale = self.head_dim**-0.5
        if self.relax:
            scores = (q * (scale / ALPHA)) @ k.mT
            p = pb_relax_softmax(scores, alpha=ALPHA, causal=True)
        else:
            scores = q @ k.mT
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            p = (scores * scale).masked_fill(hidden, -math.inf).softmax(-1)
        self.watch(scores.detach().tril())
        return p @ v


class WatchedLayer(Layer):
    """A layer, with or without its norms after the branches, that shows branches and main branch."""

    def __init__(self, config: ModelConfig, index: int, sandwich: bool, watch: Watch):
        super().__init__(config, WatchedAttention(config, index, watch))
        self.sandwich, self.watch = sandwich, watch

    def join(self, branch, h, post, pre, seed):
        self.watch(branch.detach())
        if self.sandwich:
            h, x = super().join(branch, h, post, pre, seed)
        else:
            h = h + branch
            x = layer_norm(h, pre.weight, pre.bias, eps=pre.eps, relax=self.relax)
        self.watch(h.detach())
        return h, x


def build(preset: Preset, variant: Variant, watch: Watch) -> tuple[CogView, Transformer]:
    """A variant's model; all variants start from the same weights."""
    config = CogViewConfig(
        num_layers=preset.layers,
        hidden_size=preset.hidden,
        num_heads=preset.heads,
        image_grid=preset.grid,
        max_positions=preset.grid**2 + preset.text + 4,
        image_vocab=512,
        text_vocab=256,
        attention="dense_pb_relax",
        relax="row" if variant.relax else None,
        dropout=0.0,
    )
    torch.manual_seed(0)
    recipe = CogView(config)
    model = recipe.model()
    layers = model.stack.layers
    for i, layer in enumerate(layers):
        layers[i] = WatchedLayer(config, i, variant.sandwich, watch)
        layers[i].load_state_dict(layer.state_dict())
    return recipe, model


def train(preset: Preset, variant: Variant, rate: float, data: Scenes, device: str) -> Iterator[dict[str, Any]]:
    """Yields of every step the loss and the largest absolute values `scores`, `branch` and `main`, lists over layers,
    None where not finite; `skipped`, steps not taken so far; `overflow`, what was not finite first, None if all was."""
    seen: list[Tensor] = []  # largest absolute values in the order of their computation

    def watch(x: Tensor) -> None:
        low, high = x.aminmax()
        seen.append(torch.maximum(-low, high))

    recipe, model = build(preset, variant, watch)
    model.to(device).train()
    settings = TrainConfig(
        steps=preset.steps,
        batch_size=preset.batch,
        learning_rate=rate,
        final_rate=1.0,
        dtype="float16",
        truncate_text=True,
    )
    trainer = Trainer(TokenTask(recipe, model, data, settings), settings, Path("unused"))
    bad = 0
    while bad < PATIENCE and trainer.progress() < 1:
        seen.clear()
        loss = trainer.step()["loss"]
        del seen[preset.layers * len(PLACES) :]  # of a forward that looks for what was not finite
        values = torch.stack(seen).float().view(preset.layers, len(PLACES)).cpu()
        bad = 0 if math.isfinite(loss) else bad + 1
        places = {place: values[:, [p == place for p in PLACES]].amax(1) for place in dict.fromkeys(PLACES)}
        yield {
            "loss": _number(loss),
            "skipped": trainer.state.skipped,
            "overflow": first_overflow(values, loss),
            **{place: [_number(x) for x in row.tolist()] for place, row in places.items()},
        }


def first_overflow(values: Tensor, loss: float) -> dict[str, Any] | None:
    """Where values [L, places], or else the loss, were not finite first; layers counted from 1."""
    found = (~values.isfinite()).nonzero()
    if len(found):
        layer, place = found[0].tolist()
        return {"layer": layer + 1, "place": NAMES[place], "value": str(float(values[layer, place]))}
    return None if math.isfinite(loss) else {"layer": len(values), "place": "logits", "value": str(loss)}


def _number(x: float) -> float | None:
    """Four digits are enough; JSON has no infinity."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stability", description="Figure 4(b) of the paper.")
    gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=PRESETS, default="full" if gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to run now (default: the preset's)")
    parser.add_argument("--out", type=Path, default=RESULTS / "stability", help="folder (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="forget runs that are done")
    options = parser.parse_args()
    preset, device, console = PRESETS[options.preset], "cuda" if gpu else "cpu", Console()
    torch.set_num_threads(1)  # of the CPU: for matrices as small as the preset's, more of them wait for each other
    facts = machine.facts()
    name = torch.cuda.get_device_name() if gpu else facts["device"]
    path = options.out / f"{options.preset}-{machine.slug(name)}.json"
    results = {"preset": asdict(preset), "facts": facts | {"device": name}, "runs": []}
    if path.exists() and not options.again:
        results |= {"runs": stability_report.load(path, asdict(preset))["runs"]}
    rates = preset.rates if options.rates is None else tuple(options.rates)
    if not set(rates) <= set(preset.rates):
        parser.error(f"--rates: expected some of {preset.rates}, got {rates}")
    status = 0
    try:
        _run_missing(results, preset, rates, device, path)
    except KeyboardInterrupt:
        console.print(f"{len(results['runs'])} runs are in {path}; the same command goes on")
        status = 130
    if results["runs"]:
        picture = stability_report.draw(results, path.with_suffix(".png"))
        console.print(f"{stability_report.text(results)}\n{path}, {picture.name}", highlight=False, soft_wrap=True)
    return status


def _run_missing(results: dict[str, Any], preset: Preset, rates: Sequence[float], device: str, path: Path) -> None:
    data, runs = Scenes(preset.scenes, preset.grid), results["runs"]
    done = {(run["rate"], run["variant"]) for run in runs}
    columns = TextColumn("{task.description:33}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}")) as bar:
        for rate, variant in ((r, v) for r in rates for v in VARIANTS if (r, v.name) not in done):
            task = bar.add_task(f"{variant.name}, rate {rate:g}", total=preset.steps, note="")
            start, steps = time.perf_counter(), []
            for step in train(preset, variant, rate, data, device):
                steps.append(step)
                bar.update(task, advance=1, note=stability_report.note(step))
            seconds = round(time.perf_counter() - start, 1)
            commit = results["facts"]["commit"]  # another one, maybe, than of the runs before
            runs.append({"rate": rate, "variant": variant.name, "commit": commit, "seconds": seconds, "steps": steps})
            stability_report.save(results, path)


if __name__ == "__main__":
    sys.exit(main())
