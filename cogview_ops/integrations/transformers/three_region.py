"""`attn_implementation="cogview_three_region"`."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from ...three_region_attention import (
    three_region_attention,
    three_region_attention_decode,
    three_region_attention_varlen,
)
from . import sequences
from .pivots import Pivots
from .refuse import refuse

NAME = "cogview_three_region"
PACKED = f"{NAME}: expected cu_seq_lens_q and the same cu_seq_lens_k, without attention_mask and cache"
T = TypeVar("T")


class Said(NamedTuple):
    """What a layer is told of the sequences in its batch."""

    mask: Tensor | None  # of `sequences.mask`
    position_ids: Tensor | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None


class ThreeRegion:
    """An attention function of transformers. `pattern`: block_size, window_blocks, pivot_bias and impl."""

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
        _check_mask(attention_mask, query, key)
        said = Said(attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
        width = value.shape[3]
        if width < query.shape[3]:  # multi-head latent attention
            value = pad(value, (0, query.shape[3] - width))
        out = self._attend(query, key, value, said, {**self.pattern, "scale": scaling})
        return out[..., :width].contiguous(), None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, said: Said, options: dict[str, Any]) -> Tensor:
        (batch, _, length, _), keys = query.shape, key.shape[2]
        if said.mask is not None and keys > length:
            end = said.mask[:, 0, 0, -1]
            if length == 1 or torch.compiler.is_compiling() or int(end[0]) > length:
                if said.cu_seq_lens_q is not None:
                    raise ValueError(PACKED)
                options["cache_leftpad"] = said.mask[:, 0, 0, 1] if said.mask.shape[3] == 3 else None
                pivots = self.pivots(keys, key.device).expand(batch, -1)
                return three_region_attention_decode(query, key, value, pivots, end, **options).transpose(1, 2)
            key, value = key[:, :, :length], value[:, :, :length]  # a static cache that holds nothing else
        cu_seqlens = self._cu_seqlens(said, batch, length)
        if cu_seqlens is None:
            pivots = self.pivots(length, key.device).expand(batch, -1)
            return three_region_attention(query, key, value, pivots, **options).transpose(1, 2)
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        pivots, longest = self._once(cu_seqlens, lambda x: self._of_each(x, said.cu_seq_lens_k, length))
        out = three_region_attention_varlen(query, key, value, pivots, cu_seqlens, max_seqlen=longest, **options)
        return out.unflatten(0, (batch, length))

    def _cu_seqlens(self, said: Said, batch: int, length: int) -> Tensor | None:
        """None where every row is one sequence."""
        mask, position_ids, cu_seq_lens_q, cu_seq_lens_k = said
        padded = mask is not None and mask.dtype == torch.int32
        if cu_seq_lens_q is not None:
            if padded or cu_seq_lens_k is None:
                raise ValueError(PACKED)
            return cu_seq_lens_q
        if position_ids is not None and position_ids.ndim != 2:
            position_ids = None
        if mask is not None:  # made anew in every forward, as are positions
            if padded:
                return self._once(mask, lambda x: sequences.of_padding(x, length, position_ids))
            return self._once(mask, lambda x: sequences.of_begins(x, length))
        # with a cache transformers does not look whether positions begin anew
        if position_ids is None:
            return None
        return self._once(position_ids, lambda x: sequences.of_positions(x, batch), batch)

    def _of_each(self, cu_seqlens: Tensor, of_keys: Tensor | None, length: int) -> tuple[Tensor, int]:
        """The pivots of every sequence, and a length that none exceeds."""
        if of_keys is not None and not torch.compiler.is_compiling() and not torch.equal(cu_seqlens, of_keys):
            raise ValueError(PACKED)
        lengths = cu_seqlens.diff()
        longest = length if torch.compiler.is_compiling() else int(lengths.max())
        pivots = self.pivots(longest, cu_seqlens.device)
        return torch.where(pivots < lengths[:, None], pivots, -1), longest

    def _once(self, x: Tensor, make: Callable[[Tensor], T], *about: int) -> T:
        """`make(x)`, not again in the other layers of a forward. What is made must not hold x."""
        if torch.compiler.is_compiling() or x.is_inference():  # which would not say that it has changed
            return make(x)
        stamp, made = self._known.get(x, (None, None))
        if stamp != (x._version, *about):
            made = make(x)
            self._known[x] = (x._version, *about), made
        return made


def _check_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    (batch, _, length, _), keys = query.shape, key.shape[2]
    ours = {torch.int32: (2, 3), torch.int8: (length,)}
    if mask is not None and not (mask.shape[:3] == (batch, 1, 1) and mask.shape[3] in ours.get(mask.dtype, ())):
        raise ValueError(
            f"{NAME}: expected a causal mask without a pattern of its own, got one of {mask.dtype} and shape "
            f"{tuple(mask.shape)}; sliding windows, chunks, blocks that see ahead and 4D masks are not this pattern: "
            "give attention_mask as [B, S], set layer_types to 'full_attention', or use attn_implementation='eager'"
        )
    if keys < length or (keys > length and (mask is None or mask.dtype != torch.int32)):
        raise ValueError(f"{NAME}: expected as many keys as queries or a cache, got {keys} keys and {length} queries")
