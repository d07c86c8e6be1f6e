"""KVCache: what is appended is there, samples of different lengths, and what it refuses."""

from typing import Any

import pytest
import torch
from common import refused
from torch import Tensor

from cogview_ops.modules import KVCache

B, HEADS, ROOM, DIM = 3, 2, 10, 4


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    key, value = torch.randn(2, B, count, HEADS, DIM, dtype=dtype)
    return key.transpose(1, 2), value.transpose(1, 2)  # as a projection makes them


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_append(integer: torch.dtype) -> None:
    cache = KVCache(B, HEADS, ROOM, DIM, dtype=torch.float32)
    written: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(B)]
    for given, counts in ((5, [5, 2, 0]), (1, None), (4, [3, 4, 4]), (0, None), (1, [0, 1, 1])):
        key, value = tokens(given)
        before = cache.lengths.clone()
        ends = cache.append(key, value, None if counts is None else torch.tensor(counts, dtype=integer))
        assert torch.equal(ends, before + given)
        assert ends.dtype == cache.lengths.dtype == torch.int32
        for b in range(B):
            written[b] += [(key[b, :, t], value[b, :, t]) for t in range(given if counts is None else counts[b])]
    assert cache.lengths.tolist() == [len(w) for w in written] == [9, 8, 6]
    for b in range(B):
        for t, (key, value) in enumerate(written[b]):
            assert torch.equal(cache.keys[b, :, t], key)
            assert torch.equal(cache.values[b, :, t], value)


def test_a_full_cache_says_so_and_is_unchanged() -> None:
    cache = KVCache(B, HEADS, ROOM, DIM)
    cache.append(*tokens(6), torch.tensor([6, 1, 3]))
    before = cache.keys.clone(), cache.values.clone(), cache.lengths.clone()
    with pytest.raises(ValueError, match=r"^key: expected at most 4 more tokens in a cache of 10, got 5$"):
        cache.append(*tokens(5))
    assert all(map(torch.equal, before, (cache.keys, cache.values, cache.lengths)))
    cache.append(*tokens(4))
    assert cache.lengths.tolist() == [10, 5, 7]


def test_reset_and_forgetting() -> None:
    cache = KVCache(B, HEADS, ROOM, DIM)
    cache.append(*tokens(ROOM))
    cache.lengths[1] = 3
    cache.lengths[[0, 2]] = 9
    key, value = tokens(1)
    cache.append(key, value)
    assert torch.equal(cache.keys[1, :, 3], key[1, :, 0])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    cache.append(*tokens(ROOM))


def test_keeps_no_history() -> None:
    cache = KVCache(B, HEADS, ROOM, DIM)
    key, value = (x.requires_grad_() for x in tokens(2))
    cache.append(key, value)
    assert not cache.keys.requires_grad
    assert not cache.values.requires_grad


def test_placed_and_typed() -> None:
    cache = KVCache(B, HEADS, ROOM, DIM, dtype=torch.bfloat16, device="meta")
    assert (cache.keys.dtype, cache.values.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {x.device.type for x in (cache.keys, cache.values, cache.lengths)} == {"meta"}
    assert KVCache(0, HEADS, ROOM, DIM).append(*(x[:0] for x in tokens(2))).shape == (0,)


def test_invalid_arguments() -> None:
    sizes = {"batch_size": B, "num_kv_heads": HEADS, "max_tokens": ROOM, "head_dim": DIM}
    for name in sizes:
        refused(KVCache, sizes, name, -1, ValueError)
        refused(KVCache, sizes, name, 2.0, TypeError)
    key, value = tokens(2)
    arguments = {"key": key, "value": value, "new_tokens": None}
    counts = torch.tensor([1, 2, 0])
    table: list[tuple[str, Any, type[Exception]]] = [
        ("key", None, TypeError),
        ("key", key.double(), TypeError),
        ("key", key[0], ValueError),
        ("key", key[:2], ValueError),
        ("key", key[:, :1], ValueError),
        ("key", key[..., :3], ValueError),
        ("key", key.to("meta"), ValueError),
        ("value", value[:, :, :1], ValueError),
        ("value", value.half(), TypeError),
        ("new_tokens", 2, TypeError),
        ("new_tokens", counts.float(), TypeError),
        ("new_tokens", counts[:2], ValueError),
        ("new_tokens", counts + 1, ValueError),
        ("new_tokens", counts - 1, ValueError),
        ("new_tokens", counts.to("meta"), ValueError),
    ]
    cache = KVCache(B, HEADS, ROOM, DIM)
    for name, wrong, error in table:
        refused(cache.append, arguments, name, wrong, error)
    assert cache.lengths.tolist() == [0, 0, 0]
