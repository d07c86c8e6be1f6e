"""Drawing image tokens for captions, a batch at a time, with a KV cache.

A picture depends on its seed alone, not on the batch it is drawn in: every picture has its own random
stream, for its pivots and for one uniform number a token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.model import GPT, KVCache
from cogview.sequence import pad_text, text_lengths


def sample_token(logits: Tensor, allowed: Tensor, uniform: Tensor, *, temperature: float, top_k: int) -> Tensor:
    """Token ids int64 [B] drawn from logits [B, V] among `allowed` (bool [V]), by inverting the cumulated
    probabilities of the top_k at `uniform` (float [B] in [0, 1))."""
    logits = logits.float().masked_fill(~allowed, -torch.inf) / temperature
    values, ids = logits.topk(min(top_k, int(allowed.sum())))
    cumulated = values.softmax(dim=-1).cumsum(dim=-1)
    # The last sum may round below 1, so the target is scaled to it: always inside, never the next token.
    target = uniform[:, None].to(cumulated) * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, target, right=True).clamp_max(ids.shape[1] - 1)
    return ids.gather(1, place)[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    captions: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int = 200,
    batch_size: int = 32,
) -> Tensor:
    """Image codes int64 [N, h, w] for N captions given as raw text ids.

    `seeds`: one per picture, default 0..N-1. top_k=1 is greedy. Published CogView: temperature 1, top_k 200.
    """
    seeds = range(len(captions)) if seeds is None else seeds
    if len(seeds) != len(captions):
        raise ValueError(f"seeds must be as many as captions ({len(captions)}), got {len(seeds)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    training, side = model.training, model.config.image_grid
    model.eval()
    try:
        batches = [
            _generate_batch(model, captions[i : i + batch_size], seeds[i : i + batch_size], temperature, top_k)
            for i in range(0, len(captions), batch_size)
        ]
    finally:
        model.train(training)
    codes = torch.cat(batches) if batches else torch.zeros(0, side * side, dtype=torch.int64)
    return codes.view(-1, side, side)


def _generate_batch(model: GPT, captions, seeds, temperature: float, top_k: int) -> Tensor:
    c, vocab, device = model.config, model.vocab, model.word_embeddings.weight.device
    text = pad_text(captions)
    # The whole sequence, with placeholders for the image: which positions are text is known up front, so
    # each layer's pivots are drawn once and every step sees what a full forward would.
    tokens = vocab.text2image(text, text.new_zeros(len(text), c.image_tokens), c.max_positions)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(c.image_tokens, generator=g) for g in streams]).to(device)
    pivots = draw_pivots_per_row(model, tokens[:, :-1], streams)
    tokens, starts = tokens.to(device), (text_lengths(text) + 3).to(device)
    rows = torch.arange(len(tokens), device=device)
    allowed = vocab.allowed_after("BOI1", device)

    cache = KVCache(c, len(tokens), device=device, dtype=model.word_embeddings.weight.dtype)
    # Prompts are fed padded to the longest; the padding is then forgotten and overwritten.
    x = model.hidden(tokens[:, : int(starts.max())], pivots=pivots, cache=cache)[rows, starts - 1]
    cache.seqlens = starts.int()
    for n in range(c.image_tokens):
        logits = F.linear(x, model.word_embeddings.weight)
        drawn = sample_token(logits, allowed, uniforms[:, n], temperature=temperature, top_k=top_k)
        tokens[rows, starts + n] = drawn
        if n + 1 < c.image_tokens:
            x = model.hidden(drawn[:, None], pivots=pivots, cache=cache)[:, 0]
    return tokens.gather(1, starts[:, None] + torch.arange(c.image_tokens, device=device)).cpu()


def draw_pivots_per_row(model: GPT, tokens: Tensor, streams: Sequence[torch.Generator]) -> Tensor | None:
    """As `GPT.draw_pivots` of CPU tokens [B, S], with a random stream for each row; on the model's device."""
    rows = [model.draw_pivots(row[None], g) for row, g in zip(tokens, streams, strict=True)]
    drawn = [pivots for pivots in rows if pivots is not None]
    return torch.cat(drawn, dim=1).to(model.word_embeddings.weight.device) if drawn else None
