"""Drawing tokens behind prompts, a batch at a time, with a KV cache: whatever the recipe, and what it draws.

A row depends on its seed alone, not on the batch it is drawn in: each has its own random stream, for one uniform number
a token and then for what its recipe's context draws.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.config import require
from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Prompt, Recipe
from cogview.sequence import pad_text


def sample_token(logits: Tensor, allowed: Tensor, uniform: Tensor, *, temperature: float, top_k: int) -> Tensor:
    """Token ids int64 [B] drawn from logits [B, V] among `allowed` (bool [V]), by inverting the cumulated
    probabilities of the top_k at `uniform` (float [B] in [0, 1)). Waits for no device."""
    logits = logits.float().masked_fill(~allowed, -torch.inf) / temperature
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    cumulated = values.softmax(dim=-1).cumsum(dim=-1)
    # The last sum may round below 1, so the target is scaled to it: always inside, never the next token.
    target = uniform[:, None].to(cumulated) * cumulated[:, -1:]
    last = allowed.sum().clamp_max(ids.shape[1]) - 1
    place = torch.searchsorted(cumulated, target, right=True).minimum(last)
    return ids.gather(1, place)[:, 0]


@torch.no_grad()
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

    `seeds`: one per caption, default 0..N-1. top_k=1 is greedy. Published CogView: temperature 1, top_k 200.
    """
    seeds = range(len(captions)) if seeds is None else seeds
    require(len(seeds) == len(captions), "seeds", f"as many as captions ({len(captions)})", len(seeds))
    require(temperature > 0, "temperature", "a positive number", temperature)
    require(top_k >= 1, "top_k", "at least 1", top_k)
    require(batch_size >= 1, "batch_size", "at least 1", batch_size)
    if not captions:
        return torch.zeros(0, *recipe.drawn_shape, dtype=torch.int64)
    training, drawn = model.training, []
    model.eval()
    try:
        for start in range(0, len(captions), batch_size):
            part = slice(start, start + batch_size)
            streams = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            count = math.prod(recipe.drawn_shape)
            uniforms = torch.stack([torch.rand(count, generator=g) for g in streams])
            prompt = recipe.prompt(pad_text(captions[part]), streams)
            drawn.append(_draw(model, prompt, uniforms, temperature, top_k))
    finally:
        model.train(training)
    return torch.cat(drawn).view(-1, *recipe.drawn_shape)


def _draw(model: Transformer, prompt: Prompt, uniforms: Tensor, temperature: float, top_k: int) -> Tensor:
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
    for n in range(count):
        tokens[:, n] = sample_token(logits, allowed, uniforms[:, n], temperature=temperature, top_k=top_k)
        if n + 1 < count:
            context = dataclasses.replace(steps, positions=steps.positions[:, n : n + 1])
            logits = model(tokens[:, n : n + 1], context, cache=cache)[:, 0]
    return tokens.cpu()
