"""Bytes of a training: parameters, what is kept with them, and activations, by formula.

Symbols as in `cogview.flops`; H heads, e bytes of the computation's dtype, T ranks of tensor parallelism, which divides
what is marked (Megatron-LM, arXiv 1909.08053). A layer keeps of each token for its backward

    e C (6 + 12 / T) + 4 H / T + 32

bytes: inputs of the four projections x, attention / T, x, gelu 4 / T; q, k, v 3 / T; gelu's input 4 / T; of each of the
two steps of Sandwich-LN the branch, the main branch and four float32 statistics; lse of each head. Of pre-LN, which has
no norm behind a branch, it is e C (4 + 12 / T) + 4 H / T + 16. Of what a kind of attention keeps besides,
`Attention.also_saved` tells. Checkpointing keeps a layer's inputs alone, 2 e C; "selective" the outputs and lse of
fused attention as well (arXiv 2205.05198, section 5); the rest of one layer is there while it is computed again.
Dropout keeps no mask in a layer.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from cogview.config import Recompute
from cogview.flops import attentions
from cogview.loss import chunk_rows
from cogview.parts.attend import Attention
from cogview.recipes.recipe import Recipe

MODES: tuple[Recompute, ...] = ("none", "selective", "full")

_BY_COLUMNS = ("query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight", "dense_h_to_4h.bias")
_BY_ROWS = (
    "attention.dense.weight",
    "attention.fine_dense.weight",
    "dense_4h_to_h.weight",
)  # each rank has the whole bias


class Parameters(NamedTuple):
    """How many one rank of a tensor-parallel group computes with."""

    root: int
    """Embedding and first norm."""
    layer: int
    layers: int

    @property
    def total(self) -> int:
        return self.root + self.layers * self.layer


@lru_cache(32)
def parameters(recipe: Recipe, tensor_parallel: int = 1) -> Parameters:
    sizes, c = _sizes(recipe), recipe.config
    layer = {name: count for name, count in sizes.items() if name.startswith("stack.layers.0.")}
    shares = [n // (tensor_parallel if name.endswith(_BY_COLUMNS + _BY_ROWS) else 1) for name, n in layer.items()]
    root = sum(sizes.values()) - c.num_layers * sum(layer.values())
    return Parameters(root, sum(shares), c.num_layers)


@lru_cache(8)
def _sizes(recipe: Recipe) -> dict[str, int]:
    with torch.device("meta"):
        return {name: p.numel() for name, p in recipe.model().named_parameters()}


class Activations(NamedTuple):
    """Bytes of one sample."""

    kept: int
    """At the end of the forward, but for the logits."""
    again: int
    """More in the backward: what it computes again of a layer, and the gradients in it."""


def activations(
    recipe: Recipe, mode: Recompute, size: int, tensor_parallel: int = 1, main_size: int | None = None
) -> Activations:
    """size: bytes of an element; main_size: of one of the main branch and of norms, where that is another."""
    c, tokens, split = recipe.config, recipe.length, tensor_parallel
    state = size * c.hidden_size * tokens
    main = (main_size or size) * c.hidden_size * tokens
    norms = 2 * (2 * main + 16 * tokens) if c.norms == "sandwich" else 2 * (main + 8 * tokens)
    whole = [norms + _layer(attention, c.num_heads, tokens, state, size, split) for attention in attentions(recipe)]
    output = state // split + _lse(c.num_heads, tokens, split)
    fused = sum(attention.fused for attention in attentions(recipe))
    layers = {
        "none": sum(whole) + main,  # and what the first norm reads
        "selective": 2 * main * c.num_layers + output * fused,
        "full": 2 * main * c.num_layers,
    }[mode]
    outside = main + 8 * tokens + 2 * 8 * tokens  # the head's gradient, the first norm's statistics, two ids a token
    gradient = 4 * state // split  # of gelu's output; for each later one as much is freed
    # a layer's input is kept already, and its output is there in that one's place
    again = {"none": 0, "selective": max(whole) - output * (fused > 0), "full": max(whole)}[mode]
    return Activations(layers + outside, again + gradient)


def _layer(attention: Attention, heads: int, tokens: int, state: int, size: int, split: int) -> int:
    lse = _lse(heads, tokens, split) if attention.fused else 0
    return 2 * state + 12 * state // split + lse + size * attention.also_saved(tokens) // split


def _lse(heads: int, tokens: int, split: int) -> int:
    return 4 * heads * tokens // split


def logits(recipe: Recipe, samples: int, size: int) -> int:
    """Of a micro-batch, as they are alive at once: exponentials in float32 and, below it, their gradient; beside them
    the states that the head reads, once more for a chunk of them, and its own gradient in float32 and of a chunk."""
    vocabulary, hidden, tokens = recipe.vocab.size, recipe.config.hidden_size, samples * recipe.length
    rows = min(tokens, chunk_rows(vocabulary))
    return vocabulary * (rows * (4 + size % 4) + (4 + size) * hidden) + size * hidden * (tokens + rows)
