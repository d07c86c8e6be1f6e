"""Fine codes, measured: what direct super-resolution begins with, dense weights that go on with local attention, and
rounds of parallel drawing against one code after the other with a cache."""

import statistics
import time
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
from cogview.loss import weighted_mean
from cogview.parts.attend import Leading
from cogview.parts.transformer import Transformer
from cogview.recipes.coglm import CogLM, of_rows, seen
from cogview.recipes.coglm_sizes import CogLMConfig
from cogview.recipes.direct import Direct
from cogview.recipes.fine import Fine, FineConfig
from cogview.recipes.recipe import Draws, Prompt, Recipe
from cogview.sampling import Sampling
from cogview.sequence import Batch, Context, pad_text, text_lengths
from cogview.system import System
from cogview.train import checkpoint
from cogview.train.log import read_log
from cogview_ops import patterns

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
    """Of the picture's cells one sees those of the others that stand in a causal window around it alone."""

    window = WINDOWS[0]

    def __init__(self, config: CogLMConfig, index: int):
        super().__init__(config, index)
        self.first, self.grid = config.text_rows + 1, config.image_grid

    def _mask(self, tokens: int, context: Context) -> Tensor:
        cells = context.positions - self.first
        other = (cells < 0) | (cells >= self.grid**2)
        how: dict[str, Any] = {"grid": (self.grid,) * 2, "kernel_size": self.window, "raster_causal": False}
        near = patterns.local_2d(cells[..., :, None], cells[..., None, :], **how)
        near = near | other[..., :, None] | other[..., None, :]
        return super()._mask(tokens, context) & near.unsqueeze(-3)


class NearCogLM(CogLM):
    """A CogLM with these in all layers, to go on with its weights."""

    name = "near"

    def attention(self, index: int) -> Near:
        return Near(self.config, index)


def run(out: Path, found: CogView2, scenes: list[Scene], steps: int, near_steps: int) -> dict[str, Any]:
    both = [TokenDataset(tokens_of(out, split, 2)) for split in ("train", "test")]
    how: dict[str, Any] = {"batch_size": demo.FINE_BATCH, "validate_every": max(1, steps // 8)}
    fresh = models.new(out / "direct-fresh", Direct, steps, *both, **how)
    walk = models.finetuned(out / Walk.name, Walk, out / "coglm", steps, *both, **how)
    small = [TokenDataset(tokens_of(out, split)) for split in ("train", "test")]
    models.finetuned(out / NearCogLM.name, NearCogLM, out / "coglm", near_steps, *small)
    figures = {
        "beginnings": {
            "from CogLM": line(out / "direct", at_first(found.base.recipe, found.base.model, both[1])),
            "new weights": line(out / "direct-fresh", at_first(None, None, both[1])),
        },
        "local": local(found.base, best_of(out / NearCogLM.name, near_of(found.base.recipe)), scenes),
        "fine": demo.of_fine(found, scenes),
        "walk_seconds": walk.state.elapsed,
        "fresh_seconds": fresh.state.elapsed,
    }
    recipe = Walk(Walk.begun(found.base.recipe.config))
    return figures | {"rounds": rounds(found, recipe, best_of(out / Walk.name, recipe), scenes)}


def near_of(base: Recipe) -> NearCogLM:
    assert isinstance(base, CogLM)
    return NearCogLM(base.config)


def best_of(folder: Path, recipe: Recipe) -> Transformer:
    """The model of the best checkpoint of a recipe that is none of the command line's."""
    best = checkpoint.best(folder)
    assert best is not None
    model, (tensors, _) = recipe.model().eval(), checkpoint.weights(best)
    model.load_state_dict(tensors)
    return model


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
    return nats(begun, batch)


def nats(model: Transformer, batch: Batch) -> float:
    """A predicted token."""
    return float(weighted_mean(model(batch.inputs, batch.context, targets=batch.targets), batch.weights))


@torch.no_grad()
def local(base: System, near: Transformer, scenes: list[Scene]) -> dict[str, float]:
    """Nats an image token of held-out pictures by the CogLM as it is, and with windows in all layers, as it is and
    after its training with them."""
    ids = base.encode([caption(scene, language_of(k)) for k, scene in enumerate(scenes)])
    batch = base.recipe.batch(pad_text(ids), base.tokenize(demo.pictures_of(scenes)).flatten(1))
    figures, own = {"dense": nats(base.model, batch)}, near_of(base.recipe).model().eval()
    own.load_state_dict(base.model.state_dict())
    layer: Any
    for window in WINDOWS:
        for layer in own.stack.layers:
            layer.attention.window = window
        figures[" x ".join(map(str, window))] = nats(own, batch)
    return figures | {"trained": nats(near, batch)}


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
        pictures = base.pictures(torch.cat([way(slice(k, k + 8)) for k in range(0, len(scenes), 8)]))
        figures = score(pictures, scenes)
        psnr = float(decibels(pictures, true).mean())
        ways[name] = Way(forwards, seconds, psnr, figures["all"]).__dict__
    return ways
