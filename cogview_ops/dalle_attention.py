"""DALL-E's three kinds of attention over a whole sequence of text and image, and decoding with them.

DALL-E, arXiv 2102.12092, appendix B.1. The pattern is `patterns.dalle`. Each is a composition: causal attention over
the text, and `local_attention_2d` over the image with the text as its prefix.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _registration, patterns, reference
from .local_attention_2d import local_attention_2d, local_attention_2d_decode
from .three_region_attention import three_region_attention

KINDS = ("row", "column", "convolutional")


class Pattern(NamedTuple):
    """Arguments of `patterns.dalle`."""

    kind: str
    text_len: int
    grid: tuple[int, int]
    kernel_size: int
    wrap: bool


def dalle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kind: str,
    text_len: int,
    grid: tuple[int, int],
    kernel_size: int = 11,
    wrap: bool = False,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`softmax(scale * q @ k.T) @ v`: text sees the text up to itself; image all text and a part of the image.

    That part is what lies at or before the token in raster order, itself included, and

    - row: in its row; with `wrap` (DALL-E's own) the last W + 1 tokens, up to the one right above,
    - column: in its column,
    - convolutional: in the square of `kernel_size` around it, which ends at the image's edges (DALL-E's wraps around).

    Of DALL-E's layers 1 to n the last is convolutional, those with (i - 2) % 4 == 0 column, the others row.

    Args:
        query: `[B, heads, text_len + H*W, D]`, text and then the image in raster order; float64, float32, bfloat16 or
            float16; any strides, last dimension contiguous.
        key, value: `[B, Hkv, text_len + H*W, D]`, Hkv divides heads (grouped queries), in query's dtype. Under
            autocast in any: all are cast to autocast's, as SDPA does.
        kind: "row", "column" or "convolutional".
        text_len: text tokens, at least 1.
        grid: (H, W).
        kernel_size: of convolutional, odd; what is beyond the image has no effect.
        wrap: for rows only.
        text_mask: bool `[B, text_len]`, False = padding, which nobody but itself sees. DALL-E needs none: it learns a
            token for each place of padding.
        scale: `D ** -0.5` by default.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        `[B, heads, text_len + H*W, D]` in query's dtype.
    """
    query, key, value = _registration.autocast(query, key, value)
    _checks.attention(query, key, value)
    pattern = _checked_pattern(kind, text_len, grid, kernel_size, wrap)
    lengths = _lengths(query, pattern, text_mask)
    _checks.whole_sequence(lengths, query=query, key=key)
    if impl == "reference":
        how: dict[str, Any] = {"text_mask": text_mask, "scale": _checks.scale(scale, query)}
        return reference.dalle_attention(query, key, value, **pattern._asdict(), **how)
    (tq, iq), (tk, ik), (tv, iv) = (x.split(lengths, 2) for x in (query, key, value))
    how = {"scale": scale, "impl": impl}
    prefix: dict[str, Any] = {"prefix_key": tk, "prefix_value": tv, "prefix_mask": text_mask}
    text = _causal(tq, tk, tv, text_mask, how)
    image: Any = local_attention_2d(iq, ik, iv, raster_causal=True, **prefix, **_window(pattern), **how)
    return _registration.cat_tokens([text, image], query)


def dalle_attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    kind: str,
    text_len: int,
    grid: tuple[int, int],
    kernel_size: int = 11,
    wrap: bool = False,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""The last Sq image tokens of `dalle_attention` against a cache; inference only.

    Args:
        query: `[B, heads, Sq, D]`; row t of sample b stands at position `cache_seqlens[b] - Sq + t` of the sequence.
        key_cache, value_cache: `[B, Hkv, text_len + H*W, D]`, all text and the new tokens written in already.
        cache_seqlens: int32 or int64 `[B]`, tokens in the cache with the new ones, from text_len + Sq.
        The others: as in `dalle_attention`.

    Returns:
        `[B, heads, Sq, D]` in query's dtype and layout.
    """
    query, key_cache, value_cache = _registration.autocast(query, key_cache, value_cache)
    _checks.attention(query, key_cache, value_cache, "key_cache", "value_cache")
    pattern = _checked_pattern(kind, text_len, grid, kernel_size, wrap)
    lengths = _lengths(query, pattern, text_mask)
    _checks.whole_sequence(lengths, key_cache=key_cache)
    _checks.cache_seqlens(cache_seqlens, query)
    _checks.seqlen_values(cache_seqlens, query, key_cache.shape[2], before=text_len)
    if impl == "reference":
        query_pos = cache_seqlens[:, None] - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        how: dict[str, Any] = {"text_mask": text_mask, "scale": _checks.scale(scale, query), "query_pos": query_pos}
        return reference.dalle_attention(query, key_cache, value_cache, **pattern._asdict(), **how)
    (tk, ik), (tv, iv) = (x.split(lengths, 2) for x in (key_cache, value_cache))
    prefix: dict[str, Any] = {"prefix_key": tk, "prefix_value": tv, "prefix_mask": text_mask}
    how = {"scale": scale, "impl": impl}
    return local_attention_2d_decode(query, ik, iv, cache_seqlens - text_len, **prefix, **_window(pattern), **how)


def _checked_pattern(kind: Any, text_len: Any, grid: Any, kernel_size: Any, wrap: Any) -> Pattern:
    _checks.choice(kind, "kind", KINDS)
    text_len = _checks.integer(text_len, "text_len", 1)
    grid = _checks.pair(grid, "grid")
    kernel_size = _checks.integer(kernel_size, "kernel_size", 1)
    _checks.require(kernel_size % 2 == 1, "kernel_size", "an odd size", kernel_size)
    _checks.boolean(wrap, "wrap")
    _checks.require(kind == "row" or not wrap, "wrap", lambda: f"False for kind {kind!r}, only rows wrap", wrap)
    return Pattern(kind, text_len, grid, kernel_size, wrap)


def _lengths(query: Tensor, pattern: Pattern, text_mask: Any) -> list[int]:
    """Of text and image."""
    _checks.text_mask(text_mask, query, pattern.text_len)
    return [pattern.text_len, pattern.grid[0] * pattern.grid[1]]


def _window(pattern: Pattern) -> dict[str, Any]:
    """The image part as a window of `local_attention_2d`."""
    grid, kernel = patterns.dalle_window(pattern.kind, pattern.grid, pattern.kernel_size, pattern.wrap)
    return {"grid": grid, "kernel_size": kernel}


def _causal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: dict[str, Any]) -> Any:
    """Causal attention: one block is all of the text. With padding: blocks of one token, and the others as pivots."""
    length = query.shape[2]
    tokens = torch.arange(length, device=query.device, dtype=torch.int32)
    if mask is None:
        no_pivots = tokens.new_empty(query.shape[0], 0)
        return three_region_attention(query, key, value, no_pivots, block_size=length, window_blocks=1, **how)
    last = torch.where(mask, tokens, length).sort(-1).values
    pivots = torch.where(last < length, last, -1).int()
    return three_region_attention(query, key, value, pivots, block_size=1, window_blocks=1, **how)
