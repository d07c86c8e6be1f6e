"""Attention of CogView2's super-resolution layers over a whole sequence of text, coarse image and image.

CogView2, arXiv 2204.14217, direct and iterative super-resolution. The pattern is `patterns.cogview2`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _registration, reference
from .local_attention_2d import local_attention_2d


def cogview2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_len: int,
    grid: tuple[int, int],
    kernel_size: tuple[int, int] = (9, 5),
    raster_causal: bool = False,
    coarse_grid: tuple[int, int] | None = None,
    coarse_kernel_size: tuple[int, int] = (5, 5),
    text_mask: Tensor | None = None,
    text_bias: float = 0.0,
    coarse_bias: float = 0.0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`softmax(scale * q @ k.T) @ v` over text, in both directions, and an image in windows, in one softmax.

    - Direct super-resolution (with `coarse_grid`), sequence text, coarse image, image: the coarse image sees text and
      itself; the image sees `coarse_kernel_size` of the coarse one and `kernel_size` of itself, and no text.
      CogView2: text_len 96, coarse_grid (20, 20), grid (60, 60).
    - Iterative super-resolution (without), sequence text, image: the image sees text and `kernel_size` of itself.
      CogView2: text_len 16, grid (60, 60).

    Released CogView2 uses the kernel sizes that are the defaults; its paper (9, 9). In the direct layers the image has
    projections of its own.

    Args:
        query: `[B, heads, S, D]`, S = text_len + Hc*Wc + H*W (Hc*Wc = 0 without coarse_grid), images in raster order;
            float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        key, value: `[B, Hkv, S, D]`, Hkv divides heads (grouped queries), in query's dtype. Under
            autocast in any: all are cast to autocast's, as SDPA does.
        text_len: text tokens, at least 1.
        grid: (H, W) of the image.
        kernel_size: (kh, kw), odd, at most (2H-1, 2W-1).
        raster_causal: of its own window the image keeps what is at or before the token in raster order, itself
            included.
        coarse_grid: (Hc, Wc), which divides (H, W).
        coarse_kernel_size: odd, at most (2Hc-1, 2Wc-1); not looked at without coarse_grid.
        text_mask: bool `[B, text_len]`, False = padding, which nobody but itself sees.
        text_bias: added to the scaled scores of image and text (CogView2's textual attention c; 0 in its released
            super-resolution).
        coarse_bias: added to those of image and coarse image.
        scale: `D ** -0.5` by default.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        `[B, heads, S, D]` in query's dtype.
    """
    query, key, value = _registration.autocast(query, key, value)
    _checks.attention(query, key, value)
    text_len = _checks.integer(text_len, "text_len", 1)
    grid, kernel_size, *_ = _checks.local_window(grid, kernel_size, 1, raster_causal)
    if coarse_grid is not None:
        coarse_grid, coarse_kernel_size = _checks.coarse_window(grid, coarse_grid, coarse_kernel_size)
    rows, columns = (0, 0) if coarse_grid is None else coarse_grid
    lengths = [text_len, rows * columns, grid[0] * grid[1]]
    _checks.whole_sequence(lengths, query=query, key=key)
    _checks.text_mask(text_mask, query, text_len)
    text_bias, coarse_bias = (
        _checks.finite(value, name, query.dtype)
        for value, name in ((text_bias, "text_bias"), (coarse_bias, "coarse_bias"))
    )
    scale = _checks.scale(scale, query)
    window: dict[str, Any] = {"grid": grid, "kernel_size": kernel_size, "raster_causal": raster_causal}
    coarse: dict[str, Any] = {"coarse_grid": coarse_grid, "coarse_kernel_size": coarse_kernel_size}
    if impl == "reference":
        pattern = {"text_len": text_len, **window, **coarse}
        biases = text_bias, coarse_bias
        return reference.cogview2_attention(
            query, key, value, text_mask=text_mask, biases=biases, scale=scale, **pattern
        )
    (tq, cq, iq), (tk, ck, ik), (tv, cv, iv) = (x.split(lengths, 2) for x in (query, key, value))
    how: dict[str, Any] = {"scale": scale, "impl": impl}
    text: dict[str, Any] = {"prefix_key": tk, "prefix_value": tv, "prefix_mask": text_mask, "prefix_bias": text_bias}
    parts: list[Any] = [_text(tq, tk, tv, text_mask, scale)]
    if coarse_grid is None:
        parts.append(local_attention_2d(iq, ik, iv, **window, **text, **how))
    else:
        everywhere = 2 * coarse_grid[0] - 1, 2 * coarse_grid[1] - 1
        coarse |= {"coarse_key": ck, "coarse_value": cv, "coarse_bias": coarse_bias}
        parts.append(local_attention_2d(cq, ck, cv, grid=coarse_grid, kernel_size=everywhere, **text, **how))
        parts.append(local_attention_2d(iq, ik, iv, **window, **coarse, **how))
    return _registration.cat_tokens(parts, query)


def _text(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Text on text: too little for a kernel of its own. Padding sees itself, so that no row is without keys."""
    if mask is not None:
        mask = mask[:, None, None] | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    grouped = query.shape[1] != key.shape[1]
    query, key, value = (_aligned(x) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _aligned(x: Tensor) -> Tensor:
    """With rows that begin at multiples of 16 bytes: of others SDPA finds no kernel on a GPU (cutlassF)."""
    width = 16 // x.element_size()
    return x if all(stride % width == 0 for stride in x.stride()[:-1]) else x.contiguous()
