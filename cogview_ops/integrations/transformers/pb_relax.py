"""`attn_implementation="cogview_pb_relax"`: eager attention, weights and all, whose scores cannot overflow float16."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.masking_utils import sdpa_mask

from ...pb_relax_attention import pb_relax_attention
from .refuse import refuse

NAME = "cogview_pb_relax"
mask = sdpa_mask  # bool, or None for what is causal or hides nothing


def attend(
    options: dict[str, Any],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,  # is in the mask
    cu_seq_lens_q: Tensor | None = None,
    output_attentions: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """`[B, S, H, D]` and the weights `[B, H, S, Sk]`. `options`: alpha and impl of `pb_relax_attention`."""
    refuse(NAME, dropout=dropout, **more)
    if attention_mask is None and cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
        raise ValueError(
            f"{NAME}: expected packed sequences as position_ids that begin anew, without cache, got cu_seq_lens_q alone"
        )
    length = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = is_causal and attention_mask is None and length > 1
    if causal:  # no other keys come without a mask than the free ones of a static cache
        key, value = key[:, :, :length], value[:, :, :length]
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None].bool()
    if position_bias is not None:
        attention_mask = create_position_bias_mask(position_bias, attention_mask, causal, query, key)
        causal = False
    width = value.shape[3]
    if width < query.shape[3]:  # multi-head latent attention
        value = pad(value, (0, query.shape[3] - width))
    seen: dict[str, Any] = {"mask": attention_mask, "causal": causal, "scale": scaling, "return_weights": True}
    out, weights = pb_relax_attention(query, key, value, **seen, **options)
    return out[..., :width].transpose(1, 2).contiguous(), weights
