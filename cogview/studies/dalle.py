"""DALL-E's choices beside CogView's, on the same scenes, seeds and order of data: how much its text counts, what stands
where a caption is shorter than there are places, one softmax or two (DALL-E, arXiv 2102.12092, section 2.2 and footnote
7; CogView, arXiv 2105.13290, section 2.2), what the image sees of itself, and either cure of float16.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogview.config import require
from cogview.data.files import write_json
from cogview.recipes import preset
from cogview.studies import dalle_report
from cogview.studies.counts import Counts
from cogview.studies.dalle_memory import memory
from cogview.studies.dalle_scenes import GRIDS, Scenes, judged, unigram
from cogview.studies.dalle_verdicts import DEPTHS
from cogview.studies.training_runs import Way, step_seconds, trained
from cogview.studies.training_verdicts import Found

PARTS = ("choices", "attention", "scaling")
BASE = "dalle"
"""The way that the other choices differ from."""
BATCHES = {8: 8, 16: 4, 32: 2}
"""Sequences of a step where attentions are compared, by the codes of a side."""
PLAIN, RELAXED = "pre-LN", "Sandwich-LN + PB-relax"
YARDSTICK = f"{PLAIN}, float32"


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study: scenes, steps of the image tokenizers and of each training, scenes that are drawn, seeds."""

    scenes: int
    image_steps: int
    steps: int
    attention_steps: int
    scaling_steps: int
    deep_steps: int
    drawn: int
    seeds: int

    def __post_init__(self):
        super().__post_init__()
        require(self.seeds <= 5, "seeds", "at most 5", self.seeds)


def choices(sizes: Sizes) -> dict[str, Way]:
    """Of the preset tiny of recipe dalle, which has text 1/8 of the loss, learned padding and one softmax, and hides
    some of what was drawn, so that text has to tell; the papers do not."""

    def way(name: str, model: dict[str, Any] | None = None, **training: Any) -> Way:
        return Way(name, sizes.steps, model or {}, {"batch_size": 12} | training, of="dalle")

    found = [
        way(BASE),
        way("text 0", text_weight=0.0, image_weight=1.0),
        way("text 1", text_weight=1.0, image_weight=1.0),
        way("nothing hidden", hide_context=0.0),
        way("nothing hidden, text 0", hide_context=0.0, text_weight=0.0, image_weight=1.0),
        way("masked", {"padding": "masked"}),
        way("separate", {"softmax": "separate"}),
    ]
    return {one.name: one for one in found}


KINDS = ("dense", "schedule", "row", "column", "convolutional")
OF_COGVIEW = {"cogview dense": "dense", "three_region": "three_region"}
"""Ways of recipe cogview, and their attention."""


def attention(sizes: Sizes, grid: int) -> dict[str, Way]:
    """Of recipe dalle in all layers the same, or its schedule; of recipe cogview dense and three-region attention. Both
    have as many places for text, and neither hides context, drops text or averages."""
    same: dict[str, Any] = {"batch_size": BATCHES[grid], "learning_rate": 1e-3, "hide_context": 0.0, "average": None}
    same |= {"text_weight": 1 / 8, "image_weight": 7 / 8, "loss_mean": "kinds", "bpe_dropout": 0.0}
    found, layers = {}, preset("tiny", "dalle")[0].num_layers
    for kind in KINDS:
        model: dict[str, Any] = {
            "max_positions": grid**2 + 4 + 24,
            "schedule": () if kind == "schedule" else (kind,) * layers,
        }
        found[kind] = Way(kind, sizes.attention_steps, model, same, of="dalle")
    for name, kind in OF_COGVIEW.items():
        pivots: dict[str, Any] = {"block_size": 16, "window_blocks": 2 + grid // 8, "num_pivots": 48 + grid**2 // 8}
        model = pivots | {"max_positions": grid**2 + 4 + 24, "attention": kind}
        found[name] = Way(name, sizes.attention_steps, model, same)
    return found


_DEEP: dict[str, Any] = {"num_layers": 64, "hidden_size": 128, "num_heads": 2, "init_std": 0.02}
_DEEP |= {"embedding_std": 0.02, "branch_gain": 1.0}


def scaling(sizes: Sizes, deep: bool) -> dict[str, Way]:
    """Of recipe cogview with dense attention: pre-LN or Sandwich-LN with PB-relax, in float32, in float16 with a scale
    of the loss, or with one for each block."""
    norms: dict[str, dict[str, Any]] = {
        PLAIN: {"attention": "dense", "norms": "pre", "relax": None},
        RELAXED: {"attention": "dense_pb_relax", "norms": "sandwich", "relax": "row"},
    }
    kinds: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32"},
        "float16": {"dtype": "float16"},
        "float16, blocks": {"dtype": "float16", "gradient_scaling": "blocks"},
    }
    steps = sizes.deep_steps if deep else sizes.scaling_steps
    how = {"batch_size": 4, "learning_rate": 0.01 if deep else 1e-3, "scale_patience": max(1, steps // 4)}
    how |= {"final_rate": 1.0} if deep else {}
    ways = [
        Way(f"{norm}, {kind}", steps, {**(_DEEP if deep else {}), **model}, how | training)
        for norm, model in norms.items()
        for kind, training in kinds.items()
    ]
    return {way.name: way for way in ways}


def run(out: Path, sizes: Sizes, tell: Callable[[str], None], parts: Sequence[str] = PARTS) -> str:
    """Trains what is not trained yet of some parts, and where all are asked for writes report.md, figures.json and the
    pictures. What was found, in words."""
    unknown = [part for part in parts if part not in PARTS]
    require(not unknown, "parts", f"some of {', '.join(PARTS)}", unknown)
    record, settings = out / "study.json", asdict(sizes)
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"out: {str(out)!r} holds a study of other sizes; name another or remove it")
    write_json(record, settings)
    study = _Study(out, sizes, Scenes(out, sizes.scenes, sizes.image_steps), tell)
    found: dict[str, Found] = {}
    seconds: dict[str, dict[str, float]] = {}
    entropy: dict[str, float] = {}
    bytes_: dict[str, dict[str, dict[str, int]]] = {}
    if "choices" in parts:
        found["choices"] = study.trained("choices", choices(sizes), 8, judge=True)
    for grid in GRIDS if "attention" in parts else ():
        part, ways = f"attention-{grid}", attention(sizes, grid)
        found[part], seconds[part] = study.trained(part, ways, grid), study.seconds(part, ways, grid)
        entropy[part] = unigram(study.scenes.tokens[grid][1])
    for part in DEPTHS if "scaling" in parts else ():
        ways = scaling(sizes, part == "deep")
        found[part], seconds[part] = study.trained(part, ways, 8), study.seconds(part, ways, 8)
        bytes_[part] = {
            name: memory(way.trainer(study.scenes.tokens[8], 0, out / "timing")) for name, way in ways.items()
        }
    if set(parts) != set(PARTS):
        return f"{', '.join(parts)}: trained; all parts together are what the report is of"
    facts = {"settings": settings, "threads": torch.get_num_threads(), "seconds": seconds, "memory": bytes_}
    facts["entropy"] = entropy
    return dalle_report.write(out, found, facts, YARDSTICK)


@dataclass(frozen=True)
class _Study:
    out: Path
    sizes: Sizes
    scenes: Scenes
    tell: Callable[[str], None]

    def trained(self, part: str, ways: dict[str, Way], grid: int, judge: bool = False) -> Found:
        """Figures of each way's trainings, one a seed. judge: also of what they draw."""
        found: Found = {name: [] for name in ways}
        how: dict[str, Any] = {"text": self.scenes.text}
        if judge:
            count = self.sizes.drawn
            how["judged"] = partial(judged, text=self.scenes.text, image=self.scenes.images[grid], count=count)
        for seed in range(self.sizes.seeds):
            for name, way in ways.items():
                folder = self.out / "trainings" / part / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                figures = trained(way, self.scenes.tokens[grid], seed, folder, **how)
                found[name].append(figures)
                loss = figures["held_out"].get("image_loss", math.nan)
                self.tell(f"{part}, {name}, seed {seed}: held-out loss of images {loss:.4f}")
        return found

    def seconds(self, part: str, ways: dict[str, Way], grid: int) -> dict[str, float]:
        """Of a step of each way, measured once."""
        path = self.out / "seconds" / f"{part}.json"
        if not path.exists():
            data = [self.scenes.tokens[grid]] * len(ways)
            write_json(path, step_seconds(list(ways.values()), data, self.out / "timing"))
        return json.loads(path.read_text(encoding="utf-8"))
