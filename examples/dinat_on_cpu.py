"""DiNAT of transformers, built, trained and timed on a CPU, by one import.

    python examples/dinat_on_cpu.py --steps 200

Needs transformers. Its DiNAT asks for functions that NATTEN has dropped and takes no NATTEN of today; the import below
gives them, fused into one operator that has a backward on CPUs. A small one learns to tell discs from rings in pictures
that are drawn here. Where NATTEN 0.21 is installed, its CPU path (FlexAttention, forward alone) is timed beside.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import cogview_ops.integrations.natten.install  # noqa: F401  the line
from cogview_ops.integrations.natten import na2d

from transformers import DinatConfig, DinatForImageClassification  # isort: skip


def draw(count: int, generator: torch.Generator, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of a disc (0) or a ring (1) of some colour, size and place, on noise."""
    labels = torch.randint(2, (count,), generator=generator)
    radius = torch.rand(count, generator=generator) * 8 + 8
    centre = torch.rand(count, 2, generator=generator) * (side - 36) + 18
    at = torch.arange(side) + 0.5
    distance = ((at[:, None] - centre[:, 0, None, None]) ** 2 + (at - centre[:, 1, None, None]) ** 2).sqrt()
    radius = radius[:, None, None]
    shape = (distance < radius) & ((labels[:, None, None] == 0) | (distance > 0.6 * radius))
    colour = torch.rand(count, 3, 1, 1, generator=generator) + 0.5
    return shape[:, None] * colour + 0.3 * torch.randn(count, 3, side, side, generator=generator), labels


def milliseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = DinatForImageClassification(
        DinatConfig(
            embed_dim=32, depths=[2, 2], num_heads=[2, 4], kernel_size=5, dilations=[[1, 3], [1, 1]],
            num_labels=2, drop_path_rate=0.0, initializer_range=0.1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    start = time.perf_counter()
    for step in range(options.steps):
        pictures, labels = draw(options.batch, generator)
        loss = model(pictures, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.perf_counter() - start:.1f} s")
    model.eval()
    with torch.no_grad():
        pictures, labels = draw(200, generator)
        right = (model(pictures).logits.argmax(-1) == labels).float().mean()
    print(f"of 200 new pictures {right:.0%} are told right")

    query, key, value = torch.randn(3, 1, 56, 56, 2, 32)  # the first stage of DiNAT-mini, of a picture of 224 x 224
    ours = milliseconds(lambda: na2d(query, key, value, kernel_size=7, dilation=8))
    print(f"na2d of 56 x 56 tokens, 7 x 7 keys, dilation 8: {ours:.2f} ms")
    if importlib.util.find_spec("natten").origin is not None:  # type: ignore[union-attr]
        import natten

        theirs = milliseconds(lambda: natten.na2d(query, key, value, kernel_size=7, dilation=8))
        print(f"NATTEN {natten.__version__}: {theirs:.2f} ms, {theirs / ours:.0f} times as long")


if __name__ == "__main__":
    main()
