"""`python -m benchmarks.scaling`: how much of a core's peak training steps reach, in three minutes.

Operations are by `cogview.flops`, the peak is that of plain products. Writes results/scaling/<device>.json, which
`python -m benchmarks.scaling_page` shows in docs/scaling.md.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview.config import ModelConfig, TrainConfig
from cogview.data.files import write_json
from cogview.flops import model_flops
from cogview.hardware import rate_of_products
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.recipe import Recipe
from cogview.train.loop import Trainer
from cogview.train.token_task import TokenTask
from cogview_ops.bench import machine

from .report import RESULTS, load

FOLDER = RESULTS / "scaling"
_LONG: dict[str, Any] = {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "image_grid": 32, "max_positions": 1089}
_WORDS: dict[str, Any] = {"image_vocab": 512, "text_vocab": 500, "dropout": 0.0}
CASES: dict[str, tuple[ModelConfig, int]] = {
    "tiny, 16 of 96 tokens": (CogView.presets["tiny"][0], 16),
    "4 layers of 512, 4 of 1,088 tokens, dense": (CogViewConfig(**_LONG, **_WORDS), 4),
}


class Random:
    """Sequences of nothing in particular."""

    tokenizers = property(lambda self: ["none", "none"])

    def __init__(self, recipe: Recipe):
        self.config = recipe.config

    def __len__(self) -> int:
        return 256

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(len(self))

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, ...]:
        c, count = self.config, len(indices)
        text = torch.randint(c.text_vocab, (count, c.max_text))
        return text, torch.randint(c.image_vocab, (count, c.image_tokens))


def measured(recipe: Recipe, batch_size: int, dtype: str, steps: int = 8) -> tuple[float, float]:
    """Seconds of a step of the trainer, the processor's own, and operations a second of plain products, measured by
    turns: the best of both, since others may use the processor too."""
    config = TrainConfig(steps=10**6, batch_size=batch_size, dtype=dtype)  # type: ignore[arg-type]
    times, rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(TokenTask(recipe, recipe.model(), Random(recipe), config), config, Path(folder))
        trainer.task.model.train()
        for _ in range(steps):
            begun = time.process_time()
            trainer.step()
            times.append(time.process_time() - begun)
            rates.append(rate_of_products("cpu", getattr(torch, dtype)))
    return min(times), max(rates)


def tables() -> str:
    """Of every machine that there are results of."""
    lines = []
    for path in sorted(FOLDER.glob("*.json")):
        rows = load(path)
        lines += [f"{rows[0]['device']} ({rows[0]['cpu']}):", ""]
        lines += ["| model and batch | dtype | GFLOP a step | seconds | peak, GFLOP/s | utilisation |"]
        lines += ["|---|---|---:|---:|---:|---:|", *map(_line, rows), ""]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    flops, seconds, peak = row["flops"], row["seconds"], row["peak"]
    figures = f"{flops / 1e9:,.0f} | {seconds:.3g} | {peak / 1e9:,.0f} | {flops / seconds / peak:.2f}"
    return f"| {row['shape']} | {row['dtype']} | {figures} |"


def main() -> None:
    torch.set_num_threads(1)  # whose time a process can tell from that of others
    rows = []
    for title, (config, batch_size) in CASES.items():
        for dtype in ("float32", "bfloat16"):
            recipe = CogView(config)
            seconds, peak = measured(recipe, batch_size, dtype)
            row = {"shape": title, "dtype": dtype, "flops": batch_size * model_flops(recipe)}
            rows.append({**row, "seconds": seconds, "peak": peak, **machine.facts()})
            print(_line(rows[-1]), flush=True)
    write_json(FOLDER / f"{machine.slug(rows[0]['device'])}.json", rows)


if __name__ == "__main__":
    main()
