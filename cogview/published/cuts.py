"""A transformer's released tensors, whole and in tensor-parallel parts."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = re.compile(r"(word_embeddings\.weight|mlp\.dense_h_to_4h\.(weight|bias))$")
_COLUMNS = re.compile(r"(attention(_plus)?\.dense(\.\d+)?|mlp\.dense_4h_to_h)\.weight$")
_THREE = re.compile(r"attention(_plus)?\.query_key_value(\.\d+)?\.(weight|bias)$")
_PADDED = 128  # rows of the token table, times the parts, are a multiple of this


def padded(rows: int, parts: int) -> int:
    """Rows of a token table that is cut into so many parts."""
    unit = _PADDED * parts
    return -(-rows // unit) * unit


def is_three(name: str) -> bool:
    """Whether its rows are those of queries, keys and values."""
    return _THREE.search(name) is not None


def is_cut(name: str) -> bool:
    """False: every part has all of it."""
    return any(kind.search(name) for kind in (_ROWS, _COLUMNS, _THREE))


def _dim(name: str) -> int:
    return 1 if _COLUMNS.search(name) else 0


def part_shape(name: str, shape: Sequence[int], parts: int) -> list[int]:
    """Of each part of a whole tensor of this shape, whose cut side the parts divide."""
    made = list(shape)
    if is_cut(name):
        made[_dim(name)] //= parts
    return made


def merged(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The whole tensor of its parts, rank by rank. One part, and what is not cut, is given back as it is."""
    if len(parts) == 1 or not is_cut(name):
        return parts[0]
    if is_three(name):  # of each part Q, K, V
        return torch.cat([part.unflatten(0, (3, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(list(parts), dim=_dim(name))


def cut(name: str, whole: Tensor, parts: int) -> list[Tensor]:
    """The other way round, in memory of their own where they are cut."""
    if parts == 1 or not is_cut(name):
        return [whole] * parts
    if is_three(name):
        return [part.flatten(0, 1) for part in whole.unflatten(0, (3, -1)).chunk(parts, dim=1)]
    return [part.clone() for part in whole.chunk(parts, dim=_dim(name))]
