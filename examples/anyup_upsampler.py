"""An upsampler of features as AnyUp is one: queries of a picture's pixels, keys and values of a coarse grid.

    python examples/anyup_upsampler.py --size 512 --steps 300

The picture says where things end, the coarse features what they are: each pixel attends to the coarse cells around its
own (github.com/wimmerth/anyup). `local_attention_2d` with `kernel_size=None` takes those keys as they are, in a window
of the coarse grid; AnyUp copies keys and values to the size of the queries first, which gives the same and is what runs
out of memory. Trained here on drawn pictures; needs torch alone, and Linux to measure.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_ops import local_attention_2d

RATIO, WINDOW, HEADS, FEATURES = 8, (5, 5), 4, 64


class Upsampler(nn.Module):
    """Features `[B, C, h, w]` at the size of pictures `[B, 3, H, W]`: averages of those around, as the picture says."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, FEATURES, 3, padding=1))
        self.to_key = nn.Conv2d(FEATURES, FEATURES, 1)

    def forward(self, pictures: Tensor, features: Tensor) -> Tensor:
        fine = self.guide(pictures)
        out = over_coarse_keys(fine, self.to_key(F.avg_pool2d(fine, RATIO)), features)
        return out.mT.reshape(fine.shape)


def over_coarse_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    coarse = {"coarse_key": heads(key), "coarse_value": heads(value), "coarse_grid": key.shape[-2:]}
    return local_attention_2d(
        heads(query), None, None, grid=query.shape[-2:], kernel_size=None, coarse_kernel_size=WINDOW, **coarse
    )


def over_copied_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same: of the copies RATIO rows or columns apart there is one in each cell around the query's own."""
    key, value = (heads(F.interpolate(x, scale_factor=RATIO)) for x in (key, value))
    return local_attention_2d(heads(query), key, value, grid=query.shape[-2:], kernel_size=WINDOW, dilation=RATIO)


def heads(x: Tensor) -> Tensor:
    """`[B, heads, H*W, D]`, a view where channels are last in memory."""
    return x.contiguous(memory_format=torch.channels_last).unflatten(1, (HEADS, -1)).flatten(3).mT


def draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Pictures of discs of several colours, one on top of the other."""
    at = (torch.arange(size) + 0.5) / size
    pictures = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, size, size)
    for _ in range(6):
        y, x, radius = (
            torch.rand(3, count, 1, 1, generator=generator) * torch.tensor([1, 1, 0.3])[:, None, None, None]
        ).unbind()
        inside = (at[:, None] - y) ** 2 + (at - x) ** 2 < radius**2
        pictures = torch.where(inside[:, None], torch.rand(count, 3, 1, 1, generator=generator), pictures)
    return pictures


def measure(step: Callable[[], Any]) -> str:
    """Median time, and what memory there is at the peak beyond what was there before (Linux)."""
    times, peaks = [], []
    for _ in range(4):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before, start = resident("VmRSS"), time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        peaks.append(resident("VmHWM") - before)
    return f"{statistics.median(times[1:]) * 1e3:.0f} ms, {max(peaks) / 2**10:.0f} MB"


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side of the picture that is measured")
    parser.add_argument("--steps", type=int, default=80, help="of training, on pictures of 64 x 64")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, FEATURES, 1), nn.Tanh()).requires_grad_(False)
    model = Upsampler()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(options.steps + 1):
        pictures = draw(4, 64, generator)
        features = teacher(pictures)
        coarse = F.avg_pool2d(features, RATIO)
        loss = F.mse_loss(model(pictures, coarse), features)
        if step % 20 == 0:
            bilinear = F.mse_loss(F.interpolate(coarse, scale_factor=RATIO, mode="bilinear"), features)
            print(f"step {step:4d}  error {loss.item():.4f}, of bilinear upsampling {bilinear.item():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        query = model.guide(draw(1, options.size, generator)).contiguous(memory_format=torch.channels_last)
        key = model.to_key(F.avg_pool2d(query, RATIO))
        value = torch.randn_like(key)
        difference = (over_copied_keys(query, key, value) - over_coarse_keys(query, key, value)).abs().max().item()
    print(f"{options.size} x {options.size} queries; over copies of the keys the result differs by {difference:.0e}")
    inputs = [x.requires_grad_() for x in (query, key, value)]
    for way in (over_coarse_keys, over_copied_keys):
        with torch.no_grad():
            forward = measure(lambda way=way: way(*inputs))
        both = measure(lambda way=way: torch.autograd.grad(way(*inputs), inputs, torch.ones_like(heads(query))))
        name = way.__name__.replace("_", " ")
        print(f"attention {name}: forward {forward}, forward and backward {both}")


if __name__ == "__main__":
    main()
