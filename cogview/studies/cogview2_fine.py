"""Fine codes, measured: what direct super-resolution begins with, dense weights that go on with local attention, and
rounds of parallel drawing against one code after the other with a cache."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview.bilingual import Rows
from cogview.cogview2 import CogView2, Settings
from cogview.config import ModelConfig, TrainConfig
from cogview.data.tokens import TokenDataset, tokens_of
from cogview.demo import cogview2 as demo
from cogview.demo import models
from cogview.demo.demo import language_of
from cogview.demo.measure import decibels, score
from cogview.demo.scenes import Scene, caption
from cogview.generate import fill
from cogview.parts.attend import Leading
from cogview.parts.transformer import Transformer
from cogview.recipes.coglm import CogLM, of_rows, seen
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.recipes.direct import Direct
from cogview.recipes.fine import Fine, FineConfig
from cogview.recipes.recipe import Draws, Prompt, Recipe
from cogview.sampling import Sampling
from cogview.sequence import Context, pad_text, text_lengths
from cogview.train import checkpoint
from cogview.train.log import read_log
from cogview.train.loop import Result
from cogview_ops import local_attention_2d

WINDOWS = ((3, 3), (5, 5), (9, 9))
ROUNDS = 3  # timings of each way


class Walk(Fine):
    """Fine codes one after the other: text [SOI] coarse cells, fine cells, each sees all before it. The yardstick."""

    name = "walk"
    Config = FineConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {"tiny": Direct.presets["tiny"]}

    def attention(self, index: int) -> Leading:
        return Leading(self.config, index)

    @property
    def before(self) -> int:
        return self.config.max_caption + 1 + self.config.image_tokens

    def rows(self, text: Tensor, codes: Tensor) -> tuple[Rows, Tensor]:
        """codes: coarse and fine ones. Also where the fine ones stand, bool [B, S]."""
        c, vocab, cells = self.config, self.vocab, self.config.image_tokens
        tokens = vocab.join([text, "SOI", codes], text, self.length + 1)
        inputs, following = tokens[:, :-1], tokens[:, 1:]
        place, count = torch.arange(inputs.shape[1]), text_lengths(text)[:, None]
        begun, behind = count + 1 + cells, place - count - 1
        positions = torch.where(place < count, place, c.text_rows + 1 + behind)
        positions = torch.where(behind >= cells, c.base_positions + behind - cells, positions)
        drawn = (behind >= cells) & (behind < cells + c.fine_grid**2)
        told = torch.cat([drawn[:, 1:], drawn.new_zeros(len(text), 1)], dim=1)
        sees = torch.where(place < begun, begun, place + 1)
        places = positions.clamp_max(c.max_positions - 1)
        return Rows(inputs, torch.where(told, following, vocab["PAD"]), places, sees), drawn

    def laid_out(self, text: Tensor, codes: Tensor, draws: Draws = None) -> tuple[Tensor, Tensor, Context]:
        return of_rows(self.rows(text, codes)[0])

    def behind(self, text: Tensor, coarse: Tensor) -> Prompt:
        """To draw the fine codes."""
        rows, drawn = self.rows(
            text, torch.cat([coarse, coarse.new_zeros(len(coarse), self.config.fine_grid**2)], dim=1)
        )
        return Prompt(rows.inputs, seen(rows), drawn, self.vocab.is_image(torch.arange(self.vocab.size)))


class Near(Leading):
    """Of text to image with texts of one length: image tokens see text, and of the image a causal window alone."""

    def __init__(self, config: CogLMConfig, index: int, window: tuple[int, int], start: int):
        super().__init__(config, index)
        self.start, self.grid, self.window = start, (config.image_grid,) * 2, window

    def attend(self, q, k, v, context):
        end = self.start + self.grid[0] * self.grid[1]
        cells = [x[:, :, self.start : end] for x in (q, k, v)]
        text: dict[str, Any] = {"prefix_key": k[:, :, : self.start], "prefix_value": v[:, :, : self.start]}
        near = local_attention_2d(*cells, grid=self.grid, kernel_size=self.window, raster_causal=True, **text)
        out = super().attend(q, k, v, context)
        return torch.cat([out[:, :, : self.start], near, out[:, :, end:]], dim=2)


def run(out: Path, found: CogView2, scenes: list[Scene], trained: Mapping[str, Result], steps: int) -> dict[str, Any]:
    both = [TokenDataset(tokens_of(out, split, 2)) for split in ("train", "test")]
    how: dict[str, Any] = {"batch_size": demo.FINE_BATCH, "validate_every": max(1, steps // 8)}
    fresh = models.new(out / "direct-fresh", Direct, steps, *both, **how)
    walk = models.finetuned(out / "walk", Walk, out / "coglm", steps, *both, **how)
    figures = {
        "beginnings": {
            "from CogLM": line(out / "direct", at_first(found.base.recipe, found.base.model, both[1])),
            "new weights": line(out / "direct-fresh", at_first(None, None, both[1])),
        },
        "local": local(found, scenes),
        "fine": demo.of_fine(found, scenes),
        "walk_seconds": walk.state.elapsed,
        "fresh_seconds": fresh.state.elapsed,
    }
    recipe, model = walker(out, found.base.recipe)
    return figures | {"rounds": rounds(found, recipe, model, scenes)}


def walker(out: Path, base: Recipe) -> tuple[Walk, Transformer]:
    """The model of its best checkpoint; it is no recipe of the command line."""
    best = checkpoint.best(out / Walk.name)
    assert best is not None
    recipe = Walk(Walk.begun(base.config))
    model, (tensors, _) = recipe.model().eval(), checkpoint.read(best, prefix="model.")
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
    return recipe, model


def line(folder: Path, first: float) -> list[tuple[int, float]]:
    """Held-out losses by step; of step 0 as given."""
    entries = [(e["step"], e["validation_image_loss"]) for e in read_log(folder) if "validation_image_loss" in e]
    return [(0, first), *entries]


@torch.no_grad()
def at_first(base: Recipe | None, model: Transformer | None, held_out: TokenDataset, count: int = 64) -> float:
    """The held-out loss of direct super-resolution before its first step, of a base's weights or new ones."""
    config = Direct.presets["tiny"][0]
    torch.manual_seed(0)
    if base is None or model is None:
        from cogview.pipeline import sizes_of

        recipe = Direct(Direct.fit(config, **sizes_of(held_out)))
        begun = recipe.model().eval()
    else:
        recipe = Direct(Direct.begun(base.config))
        begun = recipe.model().eval()
        begun.load_state_dict(recipe.inherited(dict(model.state_dict()), base, begun.state_dict()))
    text, *codes = held_out.batch(range(min(count, len(held_out))))
    batch = recipe.batch(text, *codes)
    nll = begun(batch.inputs, batch.context, targets=batch.targets)
    return float((nll * batch.weights).sum() / batch.weights.sum())


@torch.no_grad()
def local(found: CogView2, scenes: list[Scene]) -> dict[str, float]:
    """Nats an image token of held-out pictures by the CogLM as it is, and with windows in all layers, untrained."""
    base, recipe = found.base, found.base.recipe
    assert isinstance(recipe, CogLM)
    ids = base.encode([caption(scene, language_of(k)) for k, scene in enumerate(scenes)])
    codes, layers = base.tokenize(demo.pictures_of(scenes)).flatten(1), base.model.stack.layers
    kept = [layer.attention for layer in layers]
    sums, count = dict.fromkeys(["dense", *(f"{h} x {w}" for h, w in WINDOWS)], 0.0), 0.0
    for length in sorted({len(text) for text in ids}):
        some = [k for k, text in enumerate(ids) if len(text) == length]
        batch = recipe.batch(pad_text([ids[k] for k in some]), codes[some])
        count += float(batch.weights.sum())
        for name, window in zip(sums, (None, *WINDOWS), strict=True):
            for layer, before in zip(layers, kept, strict=True):
                if window is not None:
                    near = Near(recipe.config, 0, window, length + 1)
                    near.load_state_dict(before.state_dict())  # type: ignore[union-attr]
                layer.attention = before if window is None else near
            nll = base.model(batch.inputs, batch.context, targets=batch.targets)
            sums[name] += float((nll * batch.weights).sum())
    for layer, before in zip(layers, kept, strict=True):
        layer.attention = before
    return {name: total / count for name, total in sums.items()}


@dataclass(frozen=True)
class Way:
    """One way to make fine codes of coarse ones."""

    forwards: int
    seconds: dict[str, float]
    psnr: float
    recognised: float


def rounds(found: CogView2, recipe: Walk, model: Transformer, scenes: list[Scene]) -> dict[str, Any]:
    """Held-out pictures from their true coarse codes: direct, then rounds; and one code after the other."""
    true = demo.pictures_of(scenes, demo.TIMES)
    base = found.base
    coarse = base.tokenize(torch.stack([demo.smaller(picture, demo.TIMES) for picture in true]))
    ids = base.encode([caption(scene, language_of(k)) for k, scene in enumerate(scenes)])
    text, greedy, cells = pad_text(ids), Sampling(top_k=1, batch_size=8), recipe.config.fine_grid**2
    stages = Settings(direct=greedy, iterative=greedy, top_k=None)

    def parallel(rows: slice) -> Tensor:
        _, fine = found.enlarge(ids[rows], coarse[rows], stages, range(len(ids[rows])))
        assert fine is not None
        return fine

    def walked(rows: slice) -> Tensor:
        prompt = recipe.behind(text[rows], coarse[rows].flatten(1))
        tokens = fill(model, prompt, torch.zeros(len(prompt.inputs), cells), greedy)
        return tokens[prompt.drawn].view(-1, recipe.config.fine_grid, recipe.config.fine_grid)

    ways = {}
    for name, way, forwards in (
        ("direct and rounds", parallel, 1 + found.rounds),
        ("one after the other", walked, cells),
    ):
        seconds = {}
        for size in (1, 8):
            times = []
            for _ in range(ROUNDS):
                begun = time.monotonic()
                way(slice(0, size))
                times.append(time.monotonic() - begun)
            seconds[str(size)] = statistics.median(times)
        some = len(scenes) if name != "one after the other" else min(len(scenes), 16)
        large = torch.cat([way(slice(k, k + 8)) for k in range(0, some, 8)])
        pictures = base.pictures(large)
        figures = score(pictures, scenes[: len(large)])
        psnr = float(decibels(pictures, true[: len(large)]).mean())
        ways[name] = Way(forwards, seconds, psnr, figures["all"]).__dict__
    return ways
