"""Drawing tokens behind prompts, a batch at a time, with a KV cache: whatever the recipe, and what it draws.

A row depends on its seed alone, not on the batch it is drawn in: each has its own random stream, for one uniform number
a token and then for what its recipe's context draws.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.parts.transformer import Transformer, evaluating
from cogview.recipes.caption import Caption
from cogview.recipes.recipe import Prompt, Recipe
from cogview.sampling import Sampling, check_seeds, sample_token
from cogview.sequence import Context, pad_text
from cogview_ops.modules import KVCache

Update = Callable[[int], None]
_ASKED = 8  # steps between questions whether all rows have stopped, for which a device has to wait


def generate(
    recipe: Recipe,
    model: Transformer,
    captions: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int] | None = None,
    **how: Any,
) -> Tensor:
    """Tokens int64 [N, *recipe.drawn_shape], of image codes [N, h, w], for N captions given as raw text ids.

    `seeds`: one per caption, default 0..N-1. how: as in Sampling; top_k=1 is greedy. ValueError where the logits are
    not finite.
    """
    parts = list(generate_batches(recipe, model, captions, Sampling(**how), seeds=seeds))
    return torch.cat(parts) if parts else torch.zeros(0, *recipe.drawn_shape, dtype=torch.int64)


def generate_batches(
    recipe: Recipe,
    model: Transformer,
    captions: Sequence[Sequence[int]],
    how: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    update: Update = lambda tokens: None,
) -> Iterator[Tensor]:
    """The same a batch after the other, as each is drawn. `update` is told how many tokens are, of all rows.

    Everything that is asked for is checked before the first is drawn.
    """
    text = pad_text(captions)
    seeds = check_seeds(range(len(captions)) if seeds is None else seeds, len(captions))
    recipe.layout(text, torch.zeros(len(text), recipe.config.image_tokens, dtype=torch.int64))  # checks the ids
    return draw_batches(recipe, model, text, how, seeds, update)


def draw_batches(
    recipe: Recipe, model: Transformer, given: Tensor, how: Sampling, seeds: Sequence[int], update: Update
) -> Iterator[Tensor]:
    """Tokens int64 [B, *recipe.drawn_shape], a batch after the other, of what the recipe's prompts are made of,
    [N, ...]: text, or whatever it takes in its stead."""
    count = math.prod(recipe.drawn_shape)
    for start in range(0, len(given), how.batch_size):
        part = slice(start, start + how.batch_size)
        streams = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        uniforms = torch.stack([torch.rand(count, generator=g) for g in streams])
        prompt = recipe.prompt(given[part], streams)
        against = None if how.guidance == 1 else recipe.prompt(given[part][:, :0], streams)

        def told(tokens: int, before: int = start, rows: int = len(streams)) -> None:
            update(before * count + rows * tokens)

        tokens = fill(model, prompt, uniforms, how, told, against)
        yield tokens[prompt.drawn].view(-1, *recipe.drawn_shape)


def describe(
    recipe: Caption,
    model: Transformer,
    codes: Tensor,
    how: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    longest: int | None = None,
) -> list[list[int]]:
    """Raw text ids of a caption for each picture of codes int64 [N, h, w], how.batch_size at once; none where the model
    ends it at once.

    `seeds`: one a picture, default 0..N-1; what is drawn depends on no other. `longest`: what a caption is cut to, for
    models that know no end (the original: 20 tokens).
    """
    require(longest is None or longest >= 1, "longest", "at least 1", longest)
    seeds = check_seeds(range(len(codes)) if seeds is None else seeds, len(codes))
    require(how.guidance == 1, "guidance", "1 for captions", how.guidance)
    flat, found = codes.flatten(1), list[list[int]]()
    recipe.layout(flat[:, :0], flat)  # checks the ids
    for drawn in draw_batches(recipe, model, flat, how, seeds, lambda tokens: None):
        lengths = recipe.vocab.is_caption(drawn).int().cumprod(dim=1).sum(dim=1)  # up to the first [SEP]
        lengths = lengths if longest is None else lengths.clamp_max(longest)
        found += [(row[:n] - recipe.config.image_vocab).tolist() for row, n in zip(drawn, lengths, strict=True)]
    return found


@torch.no_grad()
def fill(
    model: Transformer,
    prompt: Prompt,
    uniforms: Tensor,
    how: Sampling,
    update: Update = lambda tokens: None,
    against: Prompt | None = None,
) -> Tensor:
    """The prompt's whole sequences, int64 [B, S] on the CPU, with what is drawn in its places; behind a `stop` that was
    drawn there are only further ones. ValueError where logits are not finite.

    uniforms: float [B, N] in [0, 1), N the most places that are drawn of a row. `update` is told the places done of a
    row. against: the prompt, with as many places drawn of each row, that guidance leads away from.

    What is given between drawn tokens goes into the model together with the drawn one before it, so there are N
    forwards whatever is given. Rows whose prompts are the same are computed once.
    """
    rows, device = len(prompt.inputs), model.device
    both = prompt if against is None else prompt.beside(against)
    walk = _Walk(both.drawn)
    low, high = both.span
    allowed, uniforms = both.allowed[low:high].to(device), uniforms.to(device)
    tokens, positions = both.inputs.to(device), both.context.positions.expand(both.inputs.shape).to(device)
    places, context = walk.places.to(device), both.context.to(device)
    stop = prompt.stop
    if stop is not None:
        tokens.masked_fill_(both.drawn.to(device), stop)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    finite = torch.empty(walk.count, dtype=torch.bool, device=device)  # asked for once, at the end: asking waits
    with evaluating(model):
        cache = model.make_cache(len(both.inputs), tokens.shape[1] + walk.widest - 1)
        logits = _begin(model, both, tokens, positions, context, cache, slice(low, high))
        for n in range(walk.count):
            if against is not None:
                logits = torch.lerp(logits[rows:], logits[:rows], how.guidance)
            finite[n] = logits.isfinite().all()
            drawn = low + sample_token(
                logits, allowed, uniforms[:, n], temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
            )
            if stop is not None:
                drawn = drawn.masked_fill(stopped, stop)
                stopped |= drawn == stop
            at, drawn = places[:, n : n + 1], drawn[:, None].repeat(len(places) // rows, 1)
            if walk.waiting[n]:
                drawn = torch.where(walk.waits[:, n : n + 1].to(device), tokens.gather(1, at), drawn)
            tokens.scatter_(1, at, drawn)
            update(n + 1)
            if n + 1 == walk.count or (stop is not None and n % _ASKED == _ASKED - 1 and bool(stopped.all())):
                finite = finite[: n + 1]
                break
            if not walk.steady[n]:
                for layer in cache:
                    layer.lengths.copy_(at[:, 0])
            fed = (at + torch.arange(walk.widths[n], device=device)).clamp_max(tokens.shape[1] - 1)
            now = dataclasses.replace(context, positions=positions.gather(1, fed))
            last = walk.lengths[:, n].to(device) - 1
            logits = model(tokens.gather(1, fed), now, at=last, cache=cache, among=slice(low, high))
    if not bool(finite.all()):
        raise ValueError(
            f"the model's logits are not finite, at token {int(finite.int().argmin()) + 1} of {walk.count} drawn"
        )
    return tokens[:rows].cpu()


class _Walk:
    """How a model goes through sequences of which `drawn` places (bool [B, S]) are drawn, one a step in each row; rows
    with fewer of them wait at their last."""

    def __init__(self, drawn: Tensor):
        counts = drawn.sum(dim=1)
        self.count = int(counts.max()) if len(counts) else 0
        ordered = (~drawn).int().argsort(dim=1, stable=True)[:, : max(1, self.count)]
        last = ordered.gather(1, (counts - 1).clamp_min(0)[:, None])
        self.waits = torch.arange(ordered.shape[1]) >= counts[:, None]
        """bool [B, N]: a row has been drawn to its end before."""
        self.waiting = self.waits.any(dim=0).tolist()
        self.places = torch.where(self.waits, last, ordered)
        """int64 [B, N]: what is drawn in step n."""
        self.lengths = self.places.diff(dim=1).clamp_min(1)
        """int64 [B, N - 1]: tokens from the one drawn in step n to before the next that is."""
        self.widths = self.lengths.amax(dim=0).tolist()
        self.widest = max([1, *self.widths])
        self.steady = [False, *((self.places.diff(dim=1) == self.lengths.amax(dim=0)).all(dim=0).tolist())]
        """Whether the cache ends where step n's token belongs: nothing was padded, no row waited."""


def _begin(
    model: Transformer,
    prompt: Prompt,
    tokens: Tensor,
    positions: Tensor,
    context: Context,
    cache: list[KVCache],
    among: slice,
) -> Tensor:
    """Logits [B, V] of the first drawn places, and the cache filled with what stands before them."""
    starts = prompt.starts
    longest, first = int(starts.max()), torch.arange(len(starts)) if prompt.same is None else prompt.same
    chosen, which = first.unique(return_inverse=True)
    chosen, which = chosen.to(model.device), which.to(model.device)
    begun = model.make_cache(len(chosen), tokens.shape[1]) if len(chosen) < len(starts) else cache
    attention = {name: values[chosen] for name, values in context.attention.items()}
    before = dataclasses.replace(context, positions=positions[chosen, :longest], attention=attention, prompt=True)
    at = starts.to(model.device)[chosen] - 1
    logits = model(tokens[chosen, :longest], before, at=at, cache=begun, among=among)
    if begun is not cache:
        for whole, part in zip(cache, begun, strict=True):
            whole.keys[:, :, :longest] = part.keys[which, :, :longest]
            whole.values[:, :, :longest] = part.values[which, :, :longest]
    return logits[which]
