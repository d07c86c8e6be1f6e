"""DALL-E's layers as DALLE-pytorch computes them, unfused (github.com/lucidrains/DALLE-pytorch, version 1.6.6,
dalle_pytorch/attention.py): all text sees itself causally; image tokens see all text and a part of the image, the
scores of both side by side in one softmax."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def axial(kind: str, text_len: int, grid: Pair) -> Callable[..., Tensor]:
    """Its SparseAxialCausalAttention: the image is cut into lines, rows or columns; a token sees its own up to itself.
    The operator's "row" (without wrap) and "column"."""

    def lines(x: Tensor) -> Tensor:
        """`[N, H * W, D]` -> `[N, lines, tokens of each, D]`"""
        image = x.unflatten(1, grid)
        return image if kind == "row" else image.transpose(1, 2)

    def raster(x: Tensor) -> Tensor:
        return (x if kind == "row" else x.transpose(1, 2)).flatten(1, 2)

    def image(query: Tensor, text: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> Tensor:
        query, key, value = map(lines, (query, key, value))
        shape = query.shape[1:3]
        far = (query.flatten(1, 2) @ text[0].mT).unflatten(1, shape)
        p_far, p_near = _joint_softmax(far, query @ key.mT, _later(shape[1], query))
        return raster((p_far.flatten(1, 2) @ text[1]).unflatten(1, shape) + p_near @ value)

    return _sequence(text_len, image)


def convolutional(text_len: int, grid: Pair, kernel_size: int = 5) -> Callable[..., Tensor]:
    """Its SparseConvCausalAttention: F.unfold copies to each token the keys and values of the square of `kernel_size`
    whose last corner it is. The operator sees another part, the half of a square around the token."""

    def windows(x: Tensor) -> Tensor:
        """`[N, H * W, D]` -> `[N, H * W, kernel_size ** 2, D]`, 0 outside the image"""
        padded = F.pad(x.mT.unflatten(2, grid), (kernel_size - 1, 0, kernel_size - 1, 0))
        return F.unfold(padded, kernel_size).unflatten(1, (x.shape[2], -1)).permute(0, 3, 2, 1)

    def image(query: Tensor, text: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> Tensor:
        near = (query[:, :, None] @ windows(key).mT)[:, :, 0]
        outside = windows(torch.ones_like(query[:1, :, :1]))[..., 0] == 0
        p_far, p_near = _joint_softmax(query @ text[0].mT, near, outside)
        return p_far @ text[1] + (p_near[:, :, None] @ windows(value))[:, :, 0]

    return _sequence(text_len, image)


def _sequence(text_len: int, image: Callable[..., Any]) -> Callable[..., Tensor]:
    """The attention of text and image, by one of the image `[N, H * W, D]`, N heads of all samples."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (x.flatten(0, 1).tensor_split([text_len], 1) for x in (query * query.shape[-1] ** -0.5, key, value))
        (q_text, q_image), (k_text, k_image), (v_text, v_image) = heads
        scores = q_text @ k_text.mT
        text = scores.masked_fill_(_later(text_len, query), torch.finfo(scores.dtype).min).softmax(-1) @ v_text
        return torch.cat([text, image(q_image, (k_text, v_text), k_image, v_image)], 1).view_as(query)

    return attention


def _later(tokens: int, like: Tensor) -> Tensor:
    """Which keys lie behind a query, bool `[tokens, tokens]`."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).triu(1)


def _joint_softmax(far: Tensor, near: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """Probabilities of scores of text and of image; of the image some are hidden, by a mask that is as large as all
    scores there."""
    mask = torch.cat([hidden.new_zeros(()).expand(far.shape), hidden.expand(near.shape)], -1)
    scores = torch.cat([far, near], -1).masked_fill_(mask, torch.finfo(far.dtype).min)
    return scores.softmax(-1).tensor_split([far.shape[-1]], -1)
