"""Drawing tokens behind prompts, a batch at a time, with a KV cache: whatever the recipe, and what it draws.

A row depends on its seed alone, not on the batch it is drawn in: each has its own random stream, for one uniform number
a token and then for what its recipe's context draws.
"""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.config import require
from cogview.parts.transformer import Transformer, evaluating
from cogview.recipes.recipe import Prompt, Recipe
from cogview.sequence import pad_text

_GREEDY, _UNIFORM = 1e-30, 1e30  # temperatures beyond which only the largest logit counts, or none does


def sample_token(logits: Tensor, allowed: Tensor, uniform: Tensor, *, temperature: float, top_k: int) -> Tensor:
    """Token ids int64 [B] drawn from logits [B, V] among `allowed` (bool [V]), by inverting the cumulated
    probabilities of the top_k at `uniform` (float [B] in [0, 1)). Waits for no device."""
    if temperature < _GREEDY:
        temperature, top_k = 1.0, 1
    values, ids = logits.float().masked_fill(~allowed, -torch.inf).topk(min(top_k, logits.shape[-1]))
    scaled = (values - values[:, :1]) / min(temperature, _UNIFORM)  # the largest is 0, and nothing overflows upwards
    cumulated = scaled.softmax(dim=-1).cumsum(dim=-1)
    # The last sum may round below 1, so the target is scaled to it: always inside, never the next token.
    target = uniform[:, None].to(cumulated) * cumulated[:, -1:]
    last = allowed.sum().clamp_max(ids.shape[1]) - 1
    place = torch.searchsorted(cumulated, target, right=True).minimum(last)
    return ids.gather(1, place)[:, 0]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Published CogView: temperature 1, top_k 200."""

    temperature: float = 1.0
    """Close to 0: nearly always the likeliest token."""
    top_k: int = 200
    """Only so many of the likeliest tokens are drawn; 1 is greedy."""
    batch_size: int = 32
    """Rows at once."""

    def __post_init__(self):
        real = isinstance(self.temperature, numbers.Real) and not isinstance(self.temperature, bool)
        require(
            real and 0 < self.temperature < math.inf, "temperature", "a positive and finite number", self.temperature
        )
        for name in ("top_k", "batch_size"):
            value = getattr(self, name)
            require(_is_whole(value) and value >= 1, name, "a whole number, at least 1", value)


def check_seed(seed: int) -> int:
    """The seed; ValueError unless it is a number that a random stream can begin from."""
    fits = _is_whole(seed) and 0 <= seed < 2**63
    require(fits, "seed", "a whole number from 0 to 2^63 - 1", seed)
    return operator.index(seed)


def check_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """The seeds; ValueError unless they are `count` numbers that random streams can begin from."""
    several = isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str | bytes)
    require(
        several and getattr(seeds, "ndim", 1) == 1,
        "seeds",
        f"a list of whole numbers, one for each caption ({count})",
        seeds,
    )
    require(len(seeds) == count, "seeds", f"as many as captions ({count})", len(seeds))
    for seed in seeds:
        require(_is_whole(seed) and 0 <= seed < 2**63, "seeds", "whole numbers from 0 to 2^63 - 1", seed)
    return [operator.index(seed) for seed in seeds]


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def generate(
    recipe: Recipe,
    model: Transformer,
    captions: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int = 200,
    batch_size: int = 32,
) -> Tensor:
    """Tokens int64 [N, *recipe.drawn_shape], of image codes [N, h, w], for N captions given as raw text ids.

    `seeds`: one per caption, default 0..N-1. top_k=1 is greedy. ValueError where the logits are not finite.
    """
    how = Sampling(temperature, top_k, batch_size)
    parts = list(generate_batches(recipe, model, captions, how, seeds=seeds))
    return torch.cat(parts) if parts else torch.zeros(0, *recipe.drawn_shape, dtype=torch.int64)


def generate_batches(
    recipe: Recipe,
    model: Transformer,
    captions: Sequence[Sequence[int]],
    how: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    update: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Tensor]:
    """The same a batch after the other, as each is drawn. `update` is told how many tokens are, of all rows.

    Everything that is asked for is checked before the first is drawn.
    """
    text = pad_text(captions)
    seeds = check_seeds(range(len(captions)) if seeds is None else seeds, len(captions))
    recipe.layout(text, torch.zeros(len(text), recipe.config.image_tokens, dtype=torch.int64))  # checks the ids
    return _batches(recipe, model, text, how, seeds, update)


def _batches(
    recipe: Recipe,
    model: Transformer,
    text: Tensor,
    how: Sampling,
    seeds: Sequence[int],
    update: Callable[[int], None],
) -> Iterator[Tensor]:
    count = math.prod(recipe.drawn_shape)
    for start in range(0, len(text), how.batch_size):
        part = slice(start, start + how.batch_size)
        streams = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        uniforms = torch.stack([torch.rand(count, generator=g) for g in streams])
        prompt = recipe.prompt(text[part], streams)

        def told(tokens: int, before: int = start, rows: int = len(streams)) -> None:
            update(before * count + rows * tokens)

        with evaluating(model):
            drawn = _draw(model, prompt, uniforms, how, told)
        yield drawn.view(-1, *recipe.drawn_shape)


@torch.no_grad()
def _draw(model: Transformer, prompt: Prompt, uniforms: Tensor, how: Sampling, update: Callable[[int], None]) -> Tensor:
    """Tokens int64 [B, count], one for each of uniforms [B, count], on the CPU."""
    batch, count = uniforms.shape
    longest, places = int(prompt.starts.max()), torch.arange(count) + prompt.starts[:, None]
    positions = prompt.context.positions.expand(prompt.inputs.shape)
    before = dataclasses.replace(prompt.context, positions=positions[:, :longest], prompt=True).to(model.device)
    steps = dataclasses.replace(prompt.context, positions=positions.gather(1, places)).to(model.device)
    starts, allowed, uniforms = (x.to(model.device) for x in (prompt.starts, prompt.allowed, uniforms))

    cache = model.make_cache(batch, prompt.inputs.shape[1])
    logits = model(prompt.inputs[:, :longest].to(model.device), before, at=starts - 1, cache=cache)
    # Prompts are fed padded to the longest; the padding is now forgotten, later tokens overwrite it.
    for layer in cache:
        layer.lengths.copy_(starts)
    tokens = torch.empty(batch, count, dtype=torch.int64, device=model.device)
    finite = torch.empty(count, dtype=torch.bool, device=model.device)  # asked for once, at the end: asking waits
    for n in range(count):
        finite[n] = logits.isfinite().all()
        tokens[:, n] = sample_token(logits, allowed, uniforms[:, n], temperature=how.temperature, top_k=how.top_k)
        update(n + 1)
        if n + 1 < count:
            context = dataclasses.replace(steps, positions=steps.positions[:, n : n + 1])
            logits = model(tokens[:, n : n + 1], context, cache=cache)[:, 0]
    if not bool(finite.all()):
        raise ValueError(
            f"the model's logits are not finite, at token {int(finite.int().argmin()) + 1} of {count} drawn"
        )
    return tokens.cpu()
