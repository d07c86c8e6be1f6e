"""A forward that shows the attention of every layer: its scores and the weights that they become.

Shapes: S tokens of a sequence, N of its image, T of its caption, H heads, h some of them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.parts.transformer import evaluating
from cogview.recipes.recipe import Recipe
from cogview.sequence import Context, Vocabulary, pad_text
from cogview.system import System

_PAIRS = 2**24  # of query and key, whose scores are alive at once: 64 MB


@dataclass(frozen=True)
class Seen:
    """What some heads of a layer, counted from 0, make of a sequence."""

    layer: int
    heads: slice
    scores: Tensor
    """float32 [h, S, S]: q·k/√d, of all pairs."""
    weights: Tensor
    """float32 [h, S, S]: what each query (row) gives each key, 1 in all."""
    visible: Tensor
    """bool [S, S]: the keys that a query sees."""


@dataclass(frozen=True)
class Places:
    """Where what stands in a sequence, int64 each."""

    image: Tensor
    """[N], in raster order."""
    text: Tensor
    """[T]: the caption's own tokens."""
    separators: dict[str, Tensor]
    """Of each command but [PAD], by its name."""

    @classmethod
    def of(cls, vocab: Vocabulary, inputs: Tensor) -> "Places":
        """Of inputs [S]."""
        commands = {n: (inputs == n).nonzero()[:, 0] for n in vocab.commands if n != vocab["PAD"]}
        separators = {vocab.commands[n]: there for n, there in commands.items() if len(there)}
        return cls(vocab.is_image(inputs).nonzero()[:, 0], vocab.is_caption(inputs).nonzero()[:, 0], separators)

    @property
    def all(self) -> Tensor:
        return torch.cat([self.image, self.text, *self.separators.values()])


def check(recipe: Recipe) -> None:
    """ValueError unless its sequences are one caption and one picture."""
    one = {"pictures", "captions"} & set(recipe.draws)
    require(bool(one), "name", "a model that draws pictures or captions", f"one of recipe {recipe.name}")


def places_of(system: System, ids: Sequence[int]) -> Places:
    """In the sequences of a caption's ids."""
    nothing = torch.zeros(1, system.recipe.config.image_tokens, dtype=torch.int64)
    return Places.of(system.recipe.vocab, system.recipe.layout(pad_text([ids]), nothing)[0][0])


@torch.no_grad()
def look(system: System, ids: Sequence[int], codes: Tensor, see: Callable[[Seen], None], *, seed: int = 0) -> None:
    """Shows the attention to a caption of text ids and its picture of codes int64 [h, w], layer by layer and so many
    heads at a time as `_PAIRS` allow; by the layers' own pattern and biases. seed: of what attention samples."""
    stream = torch.Generator().manual_seed(seed)
    batch = system.recipe.batch(pad_text([ids]), codes.flatten()[None], draws=[stream]).to(system.model.device)
    with evaluating(system.model), ExitStack() as hooks:
        layer: Any
        for number, layer in enumerate(system.model.stack.layers):
            hook = _hook(number, layer.attention, batch.context, see)
            hooks.enter_context(layer.attention.query_key_value.register_forward_hook(hook))
        system.model.states(batch.inputs, batch.context)


def _hook(layer: int, attention: Any, context: Context, see: Callable[[Seen], None]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, query_key_value: Tensor) -> None:
        q, k, _ = (x[0].float() for x in attention.split(query_key_value))
        added = attention.added(attention.own(context), q.shape[1])[0]
        at_once = max(1, _PAIRS // q.shape[1] ** 2)
        for first in range(0, len(q), at_once):
            heads = slice(first, first + at_once)
            scores = q[heads] @ k[heads].mT / math.sqrt(attention.head_dim)
            see(Seen(layer, heads, scores, (scores + added).softmax(-1), (added > -math.inf)[0]))

    return hook
