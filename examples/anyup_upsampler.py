"""An upsampler of features as AnyUp is one: queries of a picture's pixels, keys and values of a coarse grid of features.

    python examples/anyup_upsampler.py --size 512 --steps 300

The picture says where things end, the coarse features what they are: each pixel attends to the coarse cells around its
own (arXiv 2510.12764). `local_attention_2d` with `kernel_size=None` takes those keys as they are, in a window of the
coarse grid; AnyUp copies keys and values to the size of the queries first, which gives the same and is what runs out of
memory. Trained here on drawn pictures; needs torch alone.
"""

import argparse
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
    """Features `[B, C, h, w]` at the size of pictures `[B, 3, H, W]`, averages of what is around."""

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies
        self.guide = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, FEATURES, 3, padding=1))
        self.to_key = nn.Conv2d(FEATURES, FEATURES, 1)

    def forward(self, pictures: Tensor, features: Tensor) -> Tensor:
        return self.attend(self.guide(pictures), features)

    def attend(self, fine: Tensor, features: Tensor) -> Tensor:
        keys = self.to_key(F.avg_pool2d(fine, RATIO))
        grid, coarse_grid = fine.shape[-2:], features.shape[-2:]
        if self.copies:
            copies = (F.interpolate(x, scale_factor=RATIO) for x in (keys, features))
            query, key, value = (heads(x) for x in (fine, *copies))
            out = local_attention_2d(query, key, value, grid=grid, kernel_size=WINDOW, dilation=RATIO)
        else:
            coarse = {"coarse_key": heads(keys), "coarse_value": heads(features), "coarse_grid": coarse_grid}
            out = local_attention_2d(
                heads(fine), None, None, grid=grid, kernel_size=None, coarse_kernel_size=WINDOW, **coarse
            )
        return out.mT.reshape(fine.shape)


def heads(x: Tensor) -> Tensor:
    """`[B, heads, H*W, D]` of `[B, C, H, W]`, channels last in memory."""
    return x.unflatten(1, (HEADS, -1)).flatten(3).mT.contiguous()


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


def peak(step: Callable[[], Any]) -> float:
    """MB that a call takes at its peak, beyond what was there before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 2**10


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side of the picture that is measured")
    parser.add_argument("--steps", type=int, default=60, help="of training, on pictures of 64 x 64")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, FEATURES, 1), nn.Tanh()).requires_grad_(False)
    model = Upsampler()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(options.steps + 1):
        pictures = draw(8, 64, generator)
        features = teacher(pictures)
        coarse = F.avg_pool2d(features, RATIO)
        loss = F.mse_loss(model(pictures, coarse), features)
        if step % 20 == 0:
            bilinear = F.mse_loss(F.interpolate(coarse, scale_factor=RATIO, mode="bilinear"), features)
            print(f"step {step:4d}  error {loss.item():.4f}, of bilinear upsampling {bilinear.item():.4f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    pictures = draw(1, options.size, generator)
    coarse = F.avg_pool2d(teacher(pictures), RATIO)
    copying = Upsampler(copies=True)
    copying.load_state_dict(model.state_dict())
    with torch.no_grad():
        difference = (copying(pictures, coarse) - model(pictures, coarse)).abs().max().item()
    print(
        f"{options.size} x {options.size} queries; with keys copied to their size the result differs by {difference:.0e}"
    )
    guide = model.guide(pictures).detach()  # the convolution is the same in both
    for name, way in ("coarse keys", model), ("copied keys", copying):
        for _ in range(2):  # the first loads what both need
            start = time.perf_counter()
            memory = peak(lambda way=way: way.attend(guide, coarse).square().mean().backward())
            taken = time.perf_counter() - start
        print(f"attention over {name}, forward and backward: {memory:.0f} MB, {taken * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
