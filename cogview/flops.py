"""Floating-point operations of training, by formula: what a model needs, whatever the machine does besides.

Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B) is `model_flops * samples / (seconds * peak)`, peak of
all processors together, see `cogview.hardware`. Of S tokens, L layers, hidden size C, V rows of the token table:

    projections of a layer   2 * 12 C^2 S         query, key and value 3, dense 1, both of the MLP 4 each; C^2 weights
    attention of a layer     2 * 2 C * pairs      q k^T and weights times v, of the pairs that the pattern sees
    vocabulary               2 * V C S            of the head; looking embeddings up is no product

and backwards twice as much, but 5 / 2 times for attention: scores are computed again there, as in all fused attention.
(PaLM counts 2 times; the difference is 2 C a pair.) Norms, activations, the optimizer, and what checkpointing computes
again, do not count.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from cogview.parts.attend import Attention
from cogview.recipes.recipe import Recipe


class Flops(NamedTuple):
    """Of the forward of one sample."""

    projections: int
    attention: int
    vocabulary: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return 3 * (self.projections + self.vocabulary) + self.attention * 7 // 2


@lru_cache(8)
def attentions(recipe: Recipe) -> list[Attention]:
    """Of all layers, without memory for their weights."""
    with torch.device("meta"):
        return [recipe.attention(index) for index in range(recipe.config.num_layers)]


def forward_flops(recipe: Recipe) -> Flops:
    c, tokens = recipe.config, recipe.length
    pairs = sum(attention.pairs(tokens) for attention in attentions(recipe))
    return Flops(
        projections=2 * 12 * c.hidden_size**2 * tokens * c.num_layers,
        attention=2 * 2 * c.hidden_size * pairs,
        vocabulary=2 * recipe.vocab.size * c.hidden_size * tokens,
    )


def model_flops(recipe: Recipe) -> int:
    """Of one training sample, forward and backward."""
    return forward_flops(recipe).total
