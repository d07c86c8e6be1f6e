"""Where the windows of magnification meet, and how far a picture errs there."""

import numpy as np
import torch
from torch import Tensor

from cogview.magnify import windows

KINDS = ("seams", "code borders", "elsewhere")


def owners(n: int) -> Tensor:
    """int64 [4n, 4n]: for each code the number of the window that draws it."""
    found = torch.full((4 * n, 4 * n), -1)
    for number, window in enumerate(windows(n)):
        part = found[window.top : window.top + window.rows, window.left : window.left + 2 * n]
        part[part < 0] = number
    return found


def borders(n: int, step: int) -> tuple[Tensor, Tensor]:
    """uint8 [H, W - 1] and [H - 1, W] of pixels of codes of `step` x `step`: of what kind is the border between a pixel
    and the next one, to the right and below, as numbers in KINDS."""
    own = owners(n).repeat_interleave(step, 0).repeat_interleave(step, 1)
    line = torch.arange(len(own)) // step
    code = line[:, None] * len(own) + line  # of each pixel
    return tuple(_kinds(own.diff(dim=dim) != 0, code.diff(dim=dim) != 0) for dim in (1, 0))  # type: ignore[return-value]


def _kinds(seam: Tensor, border: Tensor) -> Tensor:
    return torch.where(seam, 0, torch.where(border, 1, 2)).to(torch.uint8)


def jumps(pictures: Tensor, true: Tensor, kinds: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Mean error of the difference between neighbouring pixels, of 255, by the kind of border between them."""
    error = pictures.float() - true.float()
    total, count = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    for dim, kind in zip((3, 2), kinds, strict=True):
        steps = error.diff(dim=dim).abs().mean(dim=(0, 1))
        for number in range(len(KINDS)):
            total[number] += float(steps[kind == number].sum())
            count[number] += int((kind == number).sum())
    return dict(zip(KINDS, (total / count).tolist(), strict=True))
