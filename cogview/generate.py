"""Drawing tokens behind prompts, a batch at a time, with a KV cache: whatever the recipe, and what it draws.

A row depends on its seed alone, not on the batch it is drawn in, but for models of relax "tensor", whose logits do.
Each has its own random stream, for one uniform number a token and then for what its recipe's context draws.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.feeding import Feed
from cogview.flops import attentions
from cogview.parts.transformer import Transformer, evaluating
from cogview.recipes.recipe import Prompt, Recipe
from cogview.sampling import Sampling, check_seeds, sample_token
from cogview.sequence import pad_text

Update = Callable[[int], None]
_NO_END = 20  # tokens of a caption of models that know no end, as the original draws
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
    require("pictures" in recipe.draws, "recipe", "one that draws pictures", recipe.name)
    text = pad_text(captions)
    seeds = check_seeds(range(len(captions)) if seeds is None else seeds, len(captions))
    recipe.layout(text, torch.zeros(len(text), recipe.config.image_tokens, dtype=torch.int64))  # checks the ids
    return draw_batches(recipe, model, text, how, seeds, update)


def draw_batches(
    recipe: Recipe,
    model: Transformer,
    given: Tensor,
    how: Sampling,
    seeds: Sequence[int],
    update: Update,
    longest: int | None = None,
) -> Iterator[Tensor]:
    """Tokens int64 [B, *recipe.drawn_shape], a batch after the other, of what the recipe's prompts are made of,
    [N, ...]: text, or whatever it takes in its stead. longest: the first so many of each row alone, [B, longest]."""
    count = math.prod(recipe.drawn_shape)
    for start in range(0, len(given), how.batch_size):
        part = slice(start, start + how.batch_size)
        streams = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        uniforms = torch.stack([torch.rand(count, generator=g) for g in streams])
        prompt = recipe.prompt(given[part], streams)
        if longest is not None:
            prompt = dataclasses.replace(prompt, drawn=prompt.drawn & (prompt.drawn.cumsum(dim=1) <= longest))
        against = None if how.guidance == 1 else recipe.prompt(given[part][:, :0], streams)
        prompt = emphasised(recipe, prompt, how)
        against = None if against is None else emphasised(recipe, against, how)

        def told(tokens: int, before: int = start, rows: int = len(streams)) -> None:
            update(before * count + rows * tokens)

        tokens = fill(model, prompt, uniforms, how, told, against)
        yield tokens[prompt.drawn].view(len(tokens), *(recipe.drawn_shape if longest is None else (-1,)))


def emphasised(recipe: Recipe, prompt: Prompt, how: Sampling) -> Prompt:
    """A prompt whose text counts for more, see `Sampling.text_attention`."""
    if how.text_attention == 0:
        return prompt
    heeded = all(attention.emphasises for attention in attentions(recipe))
    require(heeded, "text_attention", f"0 with recipe {recipe.name}", how.text_attention)
    context = dataclasses.replace(prompt.context, emphasis=recipe.emphasis(prompt.inputs, how.text_attention))
    return dataclasses.replace(prompt, context=context)


def describe(
    recipe: Recipe,
    model: Transformer,
    codes: Tensor,
    how: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    longest: int | None = None,
) -> list[list[int]]:
    """Raw text ids of a caption for each picture of codes int64 [N, h, w], how.batch_size at once; none where the model
    ends it at once.

    `seeds`: one a picture, default 0..N-1; what is drawn depends on no other. `longest`: what a caption is cut to;
    default 20 tokens, as in the original, of models that know no end, else as many as there is room for.
    """
    require(longest is None or longest >= 1, "longest", "at least 1", longest)
    longest = _NO_END if longest is None and not recipe.stops else longest
    seeds = check_seeds(range(len(codes)) if seeds is None else seeds, len(codes))
    require(how.guidance == 1, "guidance", "1 for captions", how.guidance)
    require(how.text_attention == 0, "text_attention", "0 for captions", how.text_attention)
    require(how.clusters is None, "clusters", "none for captions", how.clusters)
    flat, found = codes.flatten(1), list[list[int]]()
    recipe.layout(flat[:, :0], flat)  # checks the ids
    for drawn in draw_batches(recipe, model, flat, how, seeds, lambda tokens: None, longest):
        lengths = recipe.vocab.is_caption(drawn).int().cumprod(dim=1).sum(dim=1)  # up to the first [SEP]
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
    rows, device, stop = len(prompt.inputs), model.device, prompt.stop
    feed = Feed(model, prompt if against is None else prompt.beside(against))
    allowed, uniforms, count = prompt.allowed[feed.low : feed.high].to(device), uniforms.to(device), feed.walk.count
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    finite = torch.ones(count, dtype=torch.bool, device=device)  # asked for once, at the end: asking waits
    with evaluating(model):
        logits = feed.begin()
        for n in range(count):
            if against is not None:
                logits = torch.lerp(logits[rows:], logits[:rows], how.guidance)
            finite[n] = logits.isfinite().all()
            drawn = feed.low + sample_token(logits, allowed, uniforms[:, n], how)
            if stop is not None:
                drawn = drawn.masked_fill(stopped, stop)
                stopped |= drawn == stop
            tokens = feed.put(n, drawn if against is None else drawn.repeat(2))
            update(n + 1)
            if n + 1 == count or (stop is not None and n % _ASKED == _ASKED - 1 and bool(stopped.all())):
                break
            logits = feed.next(n, tokens)
    if not bool(finite.all()):
        raise ValueError(
            f"the model's logits are not finite, at token {int(finite.int().argmin()) + 1} of {count} drawn"
        )
    return feed.tokens[:rows].cpu()
