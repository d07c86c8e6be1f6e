"""A transformer's released tensors, whole and in tensor-parallel parts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.parts.published import THREE, published_names
from cogview.recipes.recipe import Recipe

_ROWS = ("word_embeddings.weight", "mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias")
_COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
_PADDED = 128  # rows of the token table, times the parts, are a multiple of this


def shapes(recipe: Recipe) -> dict[str, list[int]]:
    """Of all tensors, whole, by their published names."""
    with torch.device("meta"):
        state = recipe.model().state_dict()
    return {theirs: list(state[ours].shape) for ours, theirs in published_names(recipe.config.num_layers).items()}


def padded(rows: int, parts: int) -> int:
    """Rows of a token table that is cut into so many parts."""
    unit = _PADDED * parts
    return -(-rows // unit) * unit


def is_cut(name: str) -> bool:
    """False: every part has all of it."""
    return name.endswith((*_ROWS, *_COLUMNS, *THREE))


def part_shape(name: str, shape: Sequence[int], parts: int) -> list[int]:
    """Of each part of a whole tensor of this shape, whose cut side the parts divide."""
    cut = [n // parts for n in shape]
    if name.endswith(_COLUMNS):
        return [shape[0], cut[1]]
    return [cut[0], *shape[1:]] if is_cut(name) else list(shape)


def merged(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The whole tensor of its parts, rank by rank. One part, and what is not cut, is given back as it is."""
    if len(parts) == 1 or not is_cut(name):
        return parts[0]
    if name.endswith(THREE):  # of each part Q, K, V
        return torch.cat([part.unflatten(0, (3, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(list(parts), dim=1 if name.endswith(_COLUMNS) else 0)


def cut(name: str, whole: Tensor, parts: int) -> list[Tensor]:
    """The other way round, in memory of their own where they are cut."""
    if parts == 1 or not is_cut(name):
        return [whole] * parts
    if name.endswith(THREE):
        return [part.flatten(0, 1) for part in whole.unflatten(0, (3, -1)).chunk(parts, dim=1)]
    return [part.clone() for part in whole.chunk(parts, dim=1 if name.endswith(_COLUMNS) else 0)]
