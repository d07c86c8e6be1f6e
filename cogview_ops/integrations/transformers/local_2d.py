"""`attn_implementation="cogview_local_2d"`: an image grid behind some prefix tokens."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.masking_utils import bidirectional_mask_function

from ...local_attention_2d import local_attention_2d
from . import sequences
from .refuse import refuse

NAME = "cogview_local_2d"


def mask(*, mask_function: Any, attention_mask: Tensor | None = None, **described: Any) -> Tensor | None:
    """For `transformers.AttentionMaskInterface`: None where nothing is hidden but what comes later."""
    if mask_function is not bidirectional_mask_function or described.get("local_size") is not None:
        return sequences.mask(mask_function=mask_function, attention_mask=attention_mask, **described)
    hides = attention_mask is not None and (torch.compiler.is_compiling() or not attention_mask.all())
    return torch.zeros(1, 1, 1, 1) if hides else None


def attend(
    window: dict[str, Any],
    grid: tuple[int, int] | None,
    prefix: int,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """`[B, S, H, D]`, and no weights. `window`: kernel_size, dilation, edge and impl of `local_attention_2d`."""
    refuse(NAME, dropout=dropout, **more)
    if window["kernel_size"] is None:
        raise ValueError(f"{NAME}: expected register(kernel_size=(kh, kw)), got none")
    length, causal = query.shape[2], getattr(module, "is_causal", True) if is_causal is None else is_causal
    # that an encoder's tokens are as many as the decoder's does not make one image of them
    across = getattr(module, "is_decoder", False) and not causal
    if across or getattr(module, "is_cross_attention", False):
        raise ValueError(f"{NAME}: expected self-attention, got the cross-attention of {type(module).__name__}")
    if key.shape[2] != length:
        got = f"{length} queries and {key.shape[2]} keys"
        raise ValueError(f"{NAME}: expected self-attention without cache (use_cache=False), got {got}")
    several = attention_mask is not None and (
        attention_mask.dtype != torch.int8 or sequences.of_begins(attention_mask, length) is not None
    )
    if several or (cu_seq_lens_q is not None and len(cu_seq_lens_q) - 1 != len(query)):
        raise ValueError(f"{NAME}: expected one whole image a row, got an attention_mask or packed sequences")
    prefix = min(prefix, length)
    grid = grid or _square(length - prefix)
    free = math.prod(grid) - (length - prefix)
    if free < 0 or (free and not causal):
        raise ValueError(f"{NAME}: expected {prefix} prefix tokens and a grid {grid}, got {length} tokens")
    tokens = query, key, value
    text, image = ([x[:, :, part] for x in tokens] for part in (slice(prefix), slice(prefix, None)))
    if free:  # an image that is not finished: nobody sees what is still to come
        image = [pad(x, (0, 0, 0, free)) for x in image]
    options: Any = {"grid": grid, "raster_causal": causal, "scale": scaling, **window}
    if prefix:
        options |= {"prefix_key": text[1], "prefix_value": text[2]}
    out = local_attention_2d(image[0], image[1], image[2], **options)
    out = out[:, :, : length - prefix]
    if prefix:
        query, key, value = text if causal else (text[0], key, value)
        first = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
        out = torch.cat([first, out], 2)
    return out.transpose(1, 2).contiguous(), None


def _square(cells: int) -> tuple[int, int]:
    side = math.isqrt(cells)
    if side * side != cells:
        raise ValueError(f"{NAME}: expected register(grid=(H, W)) for an image of {cells} tokens, which is no square")
    return side, side
