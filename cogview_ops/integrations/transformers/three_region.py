"""`attn_implementation="cogview_three_region"`."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from cogview_ops import three_region_attention, three_region_attention_decode, three_region_attention_varlen

from . import sequences
from .pivots import Pivots
from .refuse import refuse

NAME = "cogview_three_region"
T = TypeVar("T")


class ThreeRegion:
    """An attention function of transformers. `pattern`: block_size, window_blocks, pivot_bias, impl."""

    def __init__(self, pivots: Pivots, **pattern: Any) -> None:
        self.pivots, self.pattern = pivots, pattern
        self._known = WeakTensorKeyDictionary()

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """`[B, S, H, D]`, and no weights."""
        refuse(NAME, dropout=dropout, **more)
        if not (getattr(module, "is_causal", False) if is_causal is None else is_causal):
            raise ValueError(
                f"{NAME}: expected causal self-attention, got {type(module).__name__} with is_causal=False; of a model "
                "in several parts name the causal one: "
                "attn_implementation={'text_config': 'cogview_three_region', 'vision_config': 'sdpa'}"
            )
        _check_mask(attention_mask, query.shape[2], key.shape[2])
        dim = value.shape[-1]
        if dim < query.shape[-1]:  # multi-head latent attention
            value = pad(value, (0, query.shape[-1] - dim))
        begins = position_ids, cu_seq_lens_q, cu_seq_lens_k
        out = self._attend(query, key, value, attention_mask, begins, {**self.pattern, "scale": scaling})
        return out[..., :dim].contiguous(), None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, begins: Any, options: dict[str, Any]
    ) -> Tensor:
        batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
        if mask is not None and keys > length:
            end = mask[:, 0, 0, -1]
            if length == 1 or torch.compiler.is_compiling() or int(end[0]) > length:
                begin = mask[:, 0, 0, 1] if mask.shape[-1] == 3 else None
                pivots = self.pivots(keys, key.device).expand(batch, -1)
                out = three_region_attention_decode(query, key, value, pivots, end, cache_leftpad=begin, **options)
                return out.transpose(1, 2)
            key, value = key[:, :, :length], value[:, :, :length]  # a static cache that holds nothing else
        cu_seqlens = self._cu_seqlens(mask, batch, length, *begins)
        if cu_seqlens is None:
            pivots = self.pivots(length, key.device).expand(batch, -1)
            return three_region_attention(query, key, value, pivots, **options).transpose(1, 2)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        pivots, max_seqlen = self._once(cu_seqlens, lambda x: self._of_each(x, length))
        out = three_region_attention_varlen(query, key, value, pivots, cu_seqlens, max_seqlen=max_seqlen, **options)
        return out.unflatten(0, (batch, length))

    def _cu_seqlens(
        self,
        mask: Tensor | None,
        batch: int,
        length: int,
        position_ids: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        cu_seq_lens_k: Tensor | None,
    ) -> Tensor | None:
        """None where every row is one sequence."""
        padded = mask is not None and mask.dtype == torch.int32
        if cu_seq_lens_q is not None:
            if padded or cu_seq_lens_k is None or cu_seq_lens_k.shape != cu_seq_lens_q.shape:
                raise ValueError(
                    f"{NAME}: expected cu_seq_lens_q and the same cu_seq_lens_k, without attention_mask and cache"
                )
            return cu_seq_lens_q
        if padded:
            return self._once(mask, lambda x: sequences.of_padding(x, length))
        if mask is not None:
            return self._once(mask, lambda x: sequences.of_begins(x[:, 0, 0].bool()))
        # with a cache transformers does not look whether positions begin anew
        if position_ids is None or position_ids.ndim != 2:
            return None
        return self._once(position_ids, lambda x: sequences.of_positions(x, batch), batch)

    def _of_each(self, cu_seqlens: Tensor, length: int) -> tuple[Tensor, int]:
        """The pivots of every sequence, and a length that none exceeds."""
        lengths = cu_seqlens.diff()
        longest = length if torch.compiler.is_compiling() else int(lengths.max())
        row = self.pivots(longest, cu_seqlens.device)
        return torch.where(row < lengths[:, None], row, -1), longest

    def _once(self, x: Tensor, make: Callable[[Tensor], T], *about: int) -> T:
        """`make(x)`, not again in the other layers of a forward. What is made must not hold x."""
        if torch.compiler.is_compiling() or x.is_inference():  # which would not say that it has changed
            return make(x)
        stamp, made = self._known.get(x, (None, None))
        if stamp != (x._version, *about):
            made = make(x)
            self._known[x] = (x._version, *about), made
        return made


def _check_mask(mask: Tensor | None, length: int, keys: int) -> None:
    ours = mask is None or (mask.ndim == 4 and mask.dtype in (torch.int32, torch.int8))
    if not ours:
        raise ValueError(
            f"{NAME}: expected a causal mask without a pattern of its own, got one of {mask.dtype} and shape "
            f"{tuple(mask.shape)}: sliding windows, chunks, blocks that see ahead and 4D masks are not in this pattern; "
            "pass attention_mask [B, S] and set layer_types to 'full_attention', or use attn_implementation='eager'"
        )
    if keys < length or (keys > length and (mask is None or mask.dtype != torch.int32)):
        raise ValueError(f"{NAME}: expected as many keys as queries or a cache, got {keys} keys and {length} queries")
