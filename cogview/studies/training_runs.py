"""Trainings of a preset tiny that differ in a setting or two, and what each came to."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from cogview.config import TrainConfig
from cogview.data.files import write_json
from cogview.data.tokens import TokenDataset
from cogview.pipeline import sizes_of
from cogview.recipes import named, preset
from cogview.recipes.cogview import CogView
from cogview.tokenizers.text import TextTokenizer
from cogview.train.block_scales import BlockScales
from cogview.train.interrupts import Interrupted
from cogview.train.log import read_log
from cogview.train.loop import Trainer
from cogview.train.loss_scale import LossScale
from cogview.train.token_task import TokenTask
from cogview_ops import pairs

POINTS = 50  # of a curve
ROUNDS = 12  # of measuring the time of a step
GROUPS = ("words", "read", "positions", "other")
"""What gradients are of: the token table, which is the head's too; the share of it that comes from reading tokens;
the position table; all else."""


@dataclass(frozen=True)
class Way:
    """A training of a recipe's preset tiny, and what is changed of its model and of its training."""

    name: str
    steps: int
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    large: bool = False
    """On pictures of 16 x 16 tokens, else 8 x 8."""
    of: str = "cogview"
    """Name of the recipe."""

    def recipe(self, data: list[TokenDataset]) -> Any:
        kind = named(self.of)
        return kind(replace(kind.fit(preset("tiny", self.of)[0], **sizes_of(*data)), **self.model))

    def trainer(
        self, data: list[TokenDataset], seed: int, folder: Path, text: TextTokenizer | None = None
    ) -> "Watched":
        """text: the captions' tokenizer, which BPE dropout takes."""
        recipe, training = self.recipe(data), preset("tiny", self.of)[1]
        ends = {"validate_every": self.steps, "keep": 1, "save_seconds": 60.0, "log_every": 1}
        how = replace(training, seconds=None, steps=self.steps, seed=seed, **ends | self.training)
        torch.manual_seed(seed)
        return Watched(TokenTask(recipe, recipe.model(), data[0], how, data[1], text=text), how, folder)


class Watched(Trainer):
    """Tells of float16 steps the loss scale and the largest gradient of each group before they are clipped, or the
    scales of blocks."""

    def __init__(self, task: TokenTask, config: TrainConfig, folder: Path):
        super().__init__(task, config, folder)
        self.largest = dict.fromkeys(GROUPS, 0.0)
        if isinstance(self.optimizer.scale, LossScale):
            task.model.embedding.words.register_forward_hook(self._read)
            for name, p in task.model.named_parameters():
                p.register_post_accumulate_grad_hook(self._seer(_group(name)))

    def step(self) -> dict[str, float]:
        self.largest, scale = dict.fromkeys(GROUPS, 0.0), self.optimizer.scale
        if scale is None:
            return super().step()
        if isinstance(scale, BlockScales):
            values = {f"block_scale/{n:03}": value for n, value in enumerate(scale.numbers)}
            return super().step() | values
        value = scale.value
        values = super().step() | {"loss_scale": value}
        return values | {group: x / value for group, x in self.largest.items()}

    def _seer(self, group: str) -> Callable[[Tensor], None]:
        return lambda p: self._see(group, p.grad)  # type: ignore[arg-type]

    def _see(self, group: str, gradient: Tensor) -> None:
        found = float(gradient.abs().amax())
        self.largest[group] = max(self.largest[group], found if math.isfinite(found) else math.inf)

    def _read(self, table: nn.Embedding, inputs: tuple[Tensor], states: Tensor) -> None:
        """Of the token table's gradient what comes through the states [B, S, C] of the tokens [B, S] read."""

        def see(gradient: Tensor) -> None:
            rows = gradient.flatten(0, 1).float()
            of_table = rows.new_zeros(table.weight.shape)
            self._see("read", of_table.index_add_(0, inputs[0].flatten(), rows))

        if states.requires_grad:
            states.register_hook(see)


def _group(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "embedding" else "other"


def trained(
    way: Way,
    data: list[TokenDataset],
    seed: int,
    folder: Path,
    text: TextTokenizer | None = None,
    judged: Callable[[Path], dict[str, Any]] = lambda checkpoint: {},
) -> dict[str, Any]:
    """Figures of a training, finished now or before, with those of its last checkpoint; of one that is, nothing else is
    kept. One that diverged has no held-out losses."""
    record = folder / "figures.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    trainer = way.trainer(data, seed, folder / "run", text)
    trainer.resume()
    found = _run(trainer)
    log = read_log(folder / "run")
    figures = {
        "seed": seed,
        "steps": trainer.state.step,
        "seconds": trainer.state.elapsed,
        "skipped": trainer.state.skipped,
        "held_out": trainer.validation.metrics if found is not None else {},
        "curves": {name: _curve(log, name) for name in ("loss", "text_loss", "image_loss")},
        **(_scaled(log) if trainer.optimizer.scale is not None else {}),
        **({} if found is None else judged(found)),
        **({"left_out": sum(scale.skipped)} if isinstance(scale := trainer.optimizer.scale, BlockScales) else {}),
    }
    write_json(record, figures)
    shutil.rmtree(folder / "run")
    return figures


def _run(trainer: Trainer) -> Path | None:
    """The last checkpoint of a training, now finished; None of one whose loss was not finite any more."""
    try:
        result = trainer.run()
    except RuntimeError:
        if trainer.skips.hopeless(trainer.state.step):
            return None
        raise
    if not result.finished:
        raise Interrupted
    return result.checkpoint


def _curve(log: list[dict], name: str) -> list[tuple[float, float]]:
    """Means over as many steps each, without what is not finite."""
    entries = [(e["step"], e[name]) for e in log if name in e and math.isfinite(e[name])]
    width = max(1, -(-len(entries) // POINTS))
    parts = [entries[k : k + width] for k in range(0, len(entries), width)]
    return [(fmean(s for s, _ in part), float(f"{fmean(y for _, y in part):.5g}")) for part in parts]


def _scaled(log: list[dict]) -> dict[str, Any]:
    """The exponent of 2 of the loss scale in every step; in what groups gradients of skipped steps were not finite;
    largest gradients. Where blocks have scales, the exponents of these in some steps."""
    blocks = [entry for entry in log if "block_scale/000" in entry]
    if blocks:
        names = sorted(name for name in blocks[0] if name.startswith("block_scale/"))
        some = blocks[:: max(1, len(blocks) // POINTS)]
        return {"blocks": [[math.log2(entry[name]) for name in names] for entry in some]}
    steps = [entry for entry in log if "loss_scale" in entry]
    bad = [entry for entry in steps if not math.isfinite(entry["gradient_norm"])]
    return {
        "scale": [math.log2(entry["loss_scale"]) for entry in steps],
        "overflowed": {group: sum(not math.isfinite(entry[group]) for entry in bad) for group in GROUPS},
        "largest": {group: _curve(steps, group) for group in GROUPS},
    }


def step_seconds(ways: Sequence[Way], data: Sequence[list[TokenDataset]], folder: Path) -> dict[str, float]:
    """Median seconds of a step of each, measured in turn, so that what else the machine does falls on all alike."""
    trainers = [way.trainer(some, 0, folder) for way, some in zip(ways, data, strict=True)]
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(1 + ROUNDS):
        for way, trainer in zip(ways, trainers, strict=True):
            begun = time.perf_counter()
            trainer.step()
            if turn:
                seconds[way.name].append(time.perf_counter() - begun)
    return {name: median(values) for name, values in seconds.items()}


def share_seen(recipe: CogView, inputs: Tensor) -> float:
    """Of the pairs that causal attention sees of inputs [B, S], those that three_region sees: in the window of blocks,
    and of pivots before it."""
    c, tokens = recipe.config, inputs.shape[1]
    places = torch.arange(tokens)
    window = places - (places // c.block_size - c.window_blocks + 1).clamp_min(0) * c.block_size + 1
    pivots = recipe.draw_pivots(inputs, torch.Generator().manual_seed(0))
    behind = (tokens - (pivots // c.block_size + c.window_blocks) * c.block_size).clamp_min(0)
    seen = int(window.sum()) + float(behind.masked_fill(pivots < 0, 0).sum(-1).float().mean())
    return seen / pairs.causal(tokens)
