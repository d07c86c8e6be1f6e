"""`python -m benchmarks.generation`: seconds a token of drawing pictures, beside the way of CogView's own code.

Twelve layers of width 512, CogView's vocabulary and 32 x 32 image tokens behind 30 of text. A batch's next tokens are
timed at four places of the picture, whose mean is that of the whole picture, contestants in turn. The floor is one
reading of the weights that a step needs, as fast as this machine reads memory; beside it stands that of the keys and
values so far. Writes results/generation/<device>.json.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, quantiles
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.feeding import Feed
from cogview.generate import fill
from cogview.parts.quantized import int8_weights
from cogview.parts.transformer import Transformer
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.recipes.recipe import Prompt
from cogview.sampling import Sampling
from cogview_ops.bench import machine

from . import report

SIZES: dict[str, Any] = {"num_layers": 12, "hidden_size": 512, "num_heads": 8, "image_grid": 32, "max_positions": 1089}
TEXT, PLACES, TOKENS = 30, (128, 384, 640, 896), 16  # of which the first few, behind a prompt, take longer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Draw = Callable[[int], list[float]]


class Original:
    """CogView's own way (its mpu/sparse_transformer.py): what is kept are the states that enter each layer, and every
    step normalises and projects those of all tokens again; its sampling."""

    def __init__(self, model: Transformer, batch: int, positions: Tensor | None = None):
        """positions: int64 [S], of all tokens; None: one after the other."""
        self.positions = torch.arange(model.longest) if positions is None else positions
        self.model, self.heads, self.layers = model, model.config.num_heads, list[Any](model.stack.layers)
        like = model.embedding.words.weight
        self.kept = [like.new_zeros(batch, 0, model.config.hidden_size) for _ in self.layers]

    def __call__(self, tokens: Tensor) -> Tensor:
        """float32 logits [B, V] behind tokens [B, S]."""
        before = self.kept[0].shape[1]
        positions = self.positions[before : before + tokens.shape[1]]
        h = self.model.embedding.words(tokens) + self.model.embedding.positions(positions)
        mask = torch.ones(len(positions), before + len(positions), dtype=h.dtype).tril(before)
        norm = self.model.stack.first_norm
        for n, layer in enumerate(self.layers):
            kept, self.kept[n] = self.kept[n], torch.cat([self.kept[n], h], dim=1)
            x = torch.cat([self._norm(kept, norm), self._norm(h, norm)], dim=1)
            rows = self._linear(x, layer.attention.query_key_value).unflatten(-1, (self.heads, 3, -1))
            q, k, v = rows.permute(3, 0, 2, 1, 4)
            scores = (q[:, :, before:] / q.shape[-1] ** 0.5) @ k.mT
            weights = (scores * mask - 10000.0 * (1 - mask)).softmax(dim=-1)
            h = h + self._norm(
                self._linear((weights @ v).transpose(1, 2).flatten(2), layer.attention.dense), layer.post_norm
            )
            inner = F.gelu(self._linear(self._norm(h, layer.mlp_norm), layer.mlp.dense_h_to_4h), approximate="tanh")
            h = h + self._norm(self._linear(inner, layer.mlp.dense_4h_to_h), layer.mlp_post_norm)
            norm = layer.next_norm
        return F.linear(self._norm(h, norm)[:, -1], self.model.embedding.words.weight).float()

    @staticmethod
    def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)  # torch's own, whatever the layer calls

    @staticmethod
    def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        largest = x.abs().max() / 8 if x.numel() else 1
        return F.layer_norm(x / largest, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    @torch.inference_mode()
    def draw(self, tokens: Tensor, codes: int, count: int = TOKENS) -> list[float]:
        """Seconds of each further token, image codes alone."""
        logits, seconds = self(tokens), []
        for _ in range(count):
            begun = perf_counter()
            logits[:, codes:] = -torch.inf
            logits[logits < logits.topk(200).values[:, -1:]] = -torch.inf
            token = torch.multinomial(logits.softmax(dim=-1), 1)
            logits = self(token)
            seconds.append(perf_counter() - begun)
        return seconds


def part_of(prompt: Prompt, place: int, count: int) -> Prompt:
    """A prompt of which all is given but `count` tokens from a place of the image on."""
    first = prompt.starts + place
    at = torch.arange(prompt.drawn.shape[1])
    return dataclasses.replace(prompt, drawn=(at >= first[:, None]) & (at < first[:, None] + count))


def draw(model: Transformer, prompt: Prompt, place: int, count: int = TOKENS) -> list[float]:
    """Seconds of each further token, as `cogview.generate` draws them."""
    told: list[float] = []
    uniforms = torch.rand(len(prompt.inputs), count + 1)
    fill(
        model,
        part_of(prompt, place, count + 1),
        uniforms,
        Sampling(),
        lambda tokens: told.append(machine.now(model.device)),
    )
    return [after - before for before, after in pairwise(told)]


def error(model: Transformer, prompt: Prompt) -> float:
    """Of the logits of ours beside the original's, relative to their spread, the worst of some steps."""
    part, original = part_of(prompt, PLACES[0], TOKENS), Original(model, len(prompt.inputs))
    feed, start = Feed(model, part), int(part.starts[0])
    ours, theirs, worst = feed.begin(), original(part.inputs[:, :start]), 0.0
    for n in range(TOKENS):
        wanted = theirs[:, feed.low : feed.high]
        worst = max(worst, float((ours - wanted).abs().max() / wanted.std()))
        token = feed.put(n, ours.argmax(dim=1))
        if n + 1 < TOKENS:
            ours, theirs = feed.next(n, token), original(token)
    return worst


def step_bytes(model: Transformer) -> int:
    """Of the weights that a step reads: the layers, and the image codes' rows of the head."""
    c, size = model.config, model.embedding.words.weight.element_size()
    return size * (sum(p.numel() for p in model.stack.parameters()) + c.image_vocab * c.hidden_size)


def cache_bytes(model: Transformer, prompt: Prompt) -> int:
    """Of the keys and values that a step reads, the mean of all that are timed."""
    c, size = model.config, model.embedding.words.weight.element_size()
    tokens = int(prompt.starts[0]) + mean(PLACES) + (TOKENS + 1) / 2
    return round(size * len(prompt.inputs) * 2 * c.num_layers * c.hidden_size * tokens)


def contestants(model: Transformer, prompt: Prompt, int8: bool) -> dict[str, Draw]:
    models = {"ours": copy.deepcopy(model), "eager": model}
    models["ours"].compile_step()
    if int8:
        models["int8"] = copy.deepcopy(model)
        int8_weights(models["int8"].stack)
        models["int8"].compile_step()
    codes, start = model.config.image_vocab, int(prompt.starts[0])

    def original(place: int) -> list[float]:
        return Original(model, len(prompt.inputs)).draw(prompt.inputs[:, : start + place], codes)

    ours = {name: (lambda place, m=m: draw(m, prompt, place)) for name, m in models.items()}
    return {**ours, "original": original}


def row(dtype: str, batch: int, rounds: int, int8: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    recipe = CogView(CogViewConfig(**SIZES, dropout=0.0))
    model = recipe.model().to(DTYPES[dtype]).eval().requires_grad_(False)
    text, codes = torch.randint(50000, (batch, TEXT)), torch.randint(8192, (batch, recipe.config.image_tokens))
    prompt = recipe.prompt(text)
    prompt.inputs[prompt.drawn] = codes.flatten()
    times: dict[str, list[float]] = {}
    draws = contestants(model, prompt, int8)
    for call in draws.values():
        call(PLACES[0])  # compiles
    for _ in range(rounds):
        for place in PLACES:
            for name, call in draws.items():
                times.setdefault(name, []).append(median(call(place)))
    means = {name: [mean(x[n : n + 4]) for n in range(0, len(x), 4)] for name, x in times.items()}
    mine, floor = median(means["ours"]), step_bytes(model) / machine.read_bandwidth()
    low, _, high = quantiles(means["ours"], n=4)
    case = {"op": "generate", "shape": f"12x512-batch-{batch}", "dtype": dtype, "direction": "a token of each"}
    figures = {"median_s": mine, "iqr_s": high - low, "rounds": rounds, "floor_s": floor, "floor": "weights read once"}
    baselines = {
        name: {"median_s": median(x), "ratio": median(x) / mine, "same_result": name != "int8"}
        for name, x in means.items()
        if name != "ours"
    }
    figures["logits_error"] = error(model, prompt)
    figures["cache_floor_s"] = cache_bytes(model, prompt) / machine.read_bandwidth()
    return case | machine.facts() | figures | {"baselines": baselines}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "generation", help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each contestant (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="also with 8-bit weights (needs torchao)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="(default: 1 8)")
    options = parser.parse_args()
    with torch.no_grad():
        for dtype in options.dtypes:
            for batch in options.batches:
                found = row(dtype, batch, options.rounds, options.int8)
                report.save(found, options.out)
                share = found["floor_s"] / found["median_s"]
                both = (found["floor_s"] + found["cache_floor_s"]) / found["median_s"]
                print(
                    f"{dtype} batch {batch}: {1e3 * found['median_s']:.1f} ms a token, "
                    f"{share:.2f} of it the weights once, {both:.2f} with keys and values, "
                    f"logits within {found['logits_error']:.1e} of the original's",
                    *(f", {name} {x['ratio']:.1f} times as long" for name, x in found["baselines"].items()),
                    sep="",
                    flush=True,
                )


if __name__ == "__main__":
    main()
