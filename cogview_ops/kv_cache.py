"""What decoding remembers of one attention layer."""

from typing import Any

import torch
from torch import Tensor

from . import _checks, _registration


class KVCache:
    """Keys and values of the tokens so far, of one layer; samples may be of different lengths.

    Room for all of it is taken at once. `keys`, `values` and `lengths` are what `three_region_attention_decode` and
    `local_attention_2d_decode` read. Lowering an entry of `lengths` forgets that sample's last tokens.

    Args:
        batch_size, num_kv_heads, max_tokens, head_dim: B, Hkv, Smax, D.
        device, dtype: of the keys and values.

    Attributes:
        keys, values: `[B, Hkv, Smax, D]`.
        lengths: int32 `[B]`, tokens of each sample.
    """

    def __init__(self, batch_size: int, num_kv_heads: int, max_tokens: int, head_dim: int, **factory: Any) -> None:
        shape = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "max_tokens": max_tokens, "head_dim": head_dim}
        for name, size in shape.items():
            shape[name] = _checks.integer(size, name, 0 if name == "batch_size" else 1)
        self.keys, self.values = (torch.zeros(*shape.values(), **factory) for _ in range(2))
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.keys.device)

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor, new_tokens: Tensor | None = None) -> Tensor:
        """Write Sq tokens behind those of each sample, without a history for autograd.

        Args:
            key, value: `[B, Hkv, Sq, D]` in the cache's dtype; under autocast in any, and cast to it.
            new_tokens: int32 or int64 `[B]`, from 0 to Sq: how many of them count, where prompts of different
                lengths are padded at the end. Padding needs room too; the next tokens overwrite it.

        Returns:
            int32 `[B]`, the end of what was written, padding included: `cache_seqlens` of a decode of these Sq.

        Raises:
            ValueError: the cache is full, before anything is written (on other devices than CPU this is checked with
                COGVIEW_OPS_CHECK=1; without it torch's own index check stops there).
        """
        batch, heads, capacity, dim = self.keys.shape
        for x, name in ((key, "key"), (value, "value")):
            _checks.tensor(x, name, ndim=4)
        if _registration.autocast_dtype(self.keys) is not None:
            key, value = key.to(self.keys.dtype), value.to(self.keys.dtype)
        for x, name in ((key, "key"), (value, "value")):
            _checks.same(x, name, self.keys, "the cache")
            _checks.appended(x, name, (batch, heads, key.shape[2], dim))
        if new_tokens is not None:
            _checks.new_tokens(new_tokens, self.lengths, key.shape[2])
        _checks.room(self.lengths, key.shape[2], capacity)
        rows = torch.arange(batch, device=key.device)[:, None]
        columns = self.lengths[:, None] + torch.arange(key.shape[2], device=key.device)
        self.keys[rows, :, columns] = key.transpose(1, 2)
        self.values[rows, :, columns] = value.transpose(1, 2)
        ends = self.lengths + key.shape[2]
        self.lengths += key.shape[2] if new_tokens is None else new_tokens
        return ends

    def reset(self) -> None:
        """Forget all tokens of all samples."""
        self.lengths.zero_()
