"""Pictures at two sizes, which super-resolution is trained on: squares, whole and at half their size (CogView paper,
section 3.1), or whole pictures and the same some times smaller (CogView2).

For squares a picture comes at twice their side, the size that magnification makes. They lie on the grid of the codes of
the picture at half that size, where the windows of magnification lie, too.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
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
    cut: Literal["pictures", "codes"] = "pictures"
    """Squares of the picture itself, which are tokenised then, as published; or of the codes of the whole one, which
    know what is around them, as those do that magnification is given."""

    def check(self, size: int, step: int) -> None:
        """ValueError unless so many places, `step` pixels apart, are there for squares of `size` pixels."""
        places = (size // step + 1) ** 2
        require(1 <= self.count <= places, "crops", f"1 to {places}", self.count)
        require(self.cut in ("pictures", "codes"), "cut", "pictures or codes", self.cut)

    def places(self, across: int, *key: int) -> list[tuple[int, int]]:
        """Row and column, of `across` each: a function of the seed and of the integers in `key` alone."""
        return [divmod(n, across) for n in permutation(across**2, self.seed, *key)[: self.count].tolist()]

    def of_picture(self, picture: Tensor, step: int, *key: int) -> tuple[Tensor, Tensor]:
        """Of uint8 [3, 2 S, 2 S]: squares uint8 [count, 3, S, S] at multiples of `step`, and the same of half the
        side."""
        size = picture.shape[-1] // 2
        places = [(step * row, step * column) for row, column in self.places(size // step + 1, *key)]
        large = torch.stack([picture[:, y : y + size, x : x + size] for y, x in places])
        return large, torch.stack([smaller(square) for square in large])

    def of_codes(self, large: np.ndarray, small: np.ndarray, *key: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of the codes [2 m, 2 m] and [m, m] of a picture at both sizes: squares of m x m and m/2 x m/2 of the same."""
        m, n = len(small), len(small) // 2
        return [
            (large[2 * i : 2 * i + m, 2 * k : 2 * k + m], small[i : i + n, k : k + n])
            for i, k in self.places(n + 1, *key)
        ]


@dataclass(frozen=True)
class Reduced:
    """Whole pictures, and `times` smaller."""

    times: int = 3

    def __post_init__(self):
        require(self.times >= 2, "times", "at least 2", self.times)


def smaller(picture: Tensor, times: int = 2) -> Tensor:
    """uint8 [3, S, S] at a part of its size, as pictures are resized everywhere."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return pixels(image, picture.shape[-1] // times)


Row = dict[str, np.ndarray]
"""Codes int32 [h w] by the array that they are for."""


class Whole:
    """A row of a picture's codes."""

    def pictures(self, number: int, picture: Tensor) -> dict[str, Tensor]:
        """What is encoded of it, uint8 [n, 3, H, W], by the array that it is for."""
        return {"codes": picture[None]}

    def rows(self, number: int, codes: Row) -> list[Row]:
        """Of the codes [n, h w] of that."""
        return [dict(zip(codes, row, strict=True)) for row in zip(*codes.values(), strict=True)]


class Both(Whole):
    """A row of a picture's codes at two sizes."""

    def __init__(self, reduced: Reduced):
        self.times = reduced.times

    def pictures(self, number: int, picture: Tensor) -> dict[str, Tensor]:
        return {"codes": picture[None], "small": smaller(picture, self.times)[None]}


class Squares(Whole):
    """Rows of a picture's squares at two sizes. Where they are depends on the shard, `key`, and the place in it."""

    def __init__(self, crops: Crops, step: int, key: int, first: int):
        self.crops, self.step, self.key, self.first = crops, step, key, first

    def pictures(self, number: int, picture: Tensor) -> dict[str, Tensor]:
        if self.crops.cut == "codes":
            return {"codes": picture[None], "small": smaller(picture)[None]}
        large, small = self.crops.of_picture(picture, self.step, self.key, number - self.first)
        return {"codes": large, "small": small}

    def rows(self, number: int, codes: Row) -> list[Row]:
        if self.crops.cut == "pictures":
            return super().rows(number, codes)
        grids = [codes[key].reshape(2 * (math.isqrt(codes[key].size),)) for key in ("codes", "small")]
        found = self.crops.of_codes(grids[0], grids[1], self.key, number - self.first)
        return [{"codes": large.flatten(), "small": small.flatten()} for large, small in found]
