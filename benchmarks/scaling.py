"""`python -m benchmarks.scaling`: how much of a core's peak training steps reach, in three minutes.

Operations are by `cogview.flops`, the peak is that of plain products; docs/scaling.md has the table.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview.config import ModelConfig, TrainConfig
from cogview.flops import model_flops
from cogview.hardware import rate_of_products
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.recipe import Recipe
from cogview.train.loop import Trainer
from cogview.train.token_task import TokenTask

from . import machine

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


def main() -> None:
    torch.set_num_threads(1)  # whose time a process can tell from that of others
    print(machine.facts()["device"])
    print("\n| model and batch | dtype | GFLOP a step | seconds | peak, GFLOP/s | utilisation |")
    print("|---|---|---:|---:|---:|---:|")
    for title, (config, batch_size) in CASES.items():
        for dtype in ("float32", "bfloat16"):
            recipe = CogView(config)
            flops = batch_size * model_flops(recipe)
            taken, peak = measured(recipe, batch_size, dtype)
            figures = f"{flops / 1e9:,.0f} | {taken:.3g} | {peak / 1e9:,.0f} | {flops / taken / peak:.2f}"
            print(f"| {title} | {dtype} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
