"""Squares of a picture, whole and at half their size: what super-resolution is trained on (CogView paper, section 3.1).

A picture comes at twice the side of its squares, the size that magnification makes. They lie on the grid of the codes
of the picture at half that size, where the windows of magnification lie, too.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cogview.config import require
from cogview.data.images import pixels
from cogview.data.shuffle import permutation


@dataclass(frozen=True)
class Crops:
    """`count` squares of a picture, at different places."""

    count: int = 1
    seed: int = 0

    def check(self, size: int, step: int) -> None:
        """ValueError unless so many places, `step` pixels apart, are there for squares of `size` pixels."""
        places = (size // step + 1) ** 2
        require(1 <= self.count <= places, "crops", f"1 to {places}", self.count)

    def of(self, picture: Tensor, step: int, *key: int) -> tuple[Tensor, Tensor]:
        """Of uint8 [3, 2 S, 2 S]: squares uint8 [count, 3, S, S], and the same of half the side.

        Their places are multiples of `step`, and a function of the seed and of the integers in `key` alone.
        """
        size = picture.shape[-1] // 2
        across = size // step + 1
        places = [divmod(n, across) for n in permutation(across**2, self.seed, *key)[: self.count].tolist()]
        large = torch.stack(
            [picture[:, y : y + size, x : x + size] for y, x in ((step * i, step * k) for i, k in places)]
        )
        return large, torch.stack([half(square) for square in large])


def half(picture: Tensor) -> Tensor:
    """uint8 [3, S, S] at half its size, as pictures are resized everywhere."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return pixels(image, picture.shape[-1] // 2)
