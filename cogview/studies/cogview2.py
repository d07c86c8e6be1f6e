"""CogView2 measured in small (arXiv 2204.14217): one CogLM against a CogView of the same size and steps, and finetuned
to one domain; how clusters and the textual attention c draw; what dense weights lose to local attention; what direct
super-resolution begins with; and rounds of parallel drawing against one code after the other.

Scenes of emoji of 64 pixels, 8 x 8 codes, and of 192, 24 x 24. Models that are asked how to draw are stopped early
enough to err.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogview.cogview2 import CogView2
from cogview.config import require
from cogview.data.tokens import Rows, TokenDataset, tokens_of
from cogview.demo import cogview2 as demo
from cogview.demo import models
from cogview.demo.demo import LANGUAGES, TEMPERATURE
from cogview.demo.measure import score
from cogview.demo.scenes import Scene, caption, sample_scenes
from cogview.recipes.coglm import CogLM
from cogview.recipes.cogview import CogView
from cogview.studies import cogview2_fine, cogview2_report, cogview2_sampling
from cogview.studies.counts import Counts
from cogview.system import System
from cogview.train.loop import Result

EARLY = "early"
"""The CogLM that errs."""


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study. Steps: of the image tokenizer, CogLM and CogView, those that err, finetuning of the CogLM that errs
    and as many on all scenes and of CogLM with windows, and each model of fine codes."""

    tested: int
    candidates: int
    image_steps: int
    base_steps: int
    early_steps: int
    domain_steps: int
    fine_steps: int

    def __post_init__(self):
        super().__post_init__()
        require(self.candidates >= 2, "candidates", "at least 2", self.candidates)


def run(out: Path, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and pictures; returns what they come to."""
    begun = time.monotonic()
    demo.tokens(out, sizes.image_steps)
    small = [TokenDataset(tokens_of(out, split)) for split in ("train", "test")]
    trained: dict[str, Result] = demo.train(out, demo.Steps(sizes.image_steps, sizes.base_steps, sizes.fine_steps))
    trained["gpt"] = models.new(out / "gpt", CogView, sizes.base_steps, *small)
    trained[EARLY] = models.new(out / EARLY, CogLM, sizes.early_steps, *small)
    trained["early-gpt"] = models.new(out / "early-gpt", CogView, sizes.early_steps, *small)
    two = of_two(small[0]), of_two(small[1])
    further: dict[str, tuple[models.Tokens, models.Tokens]] = {"domain": two, "longer": (small[0], small[1])}
    for name, (data, held_out) in further.items():
        trained[name] = models.finetuned(out / name, CogLM, out / EARLY, sizes.domain_steps, data, held_out)
    scenes = sample_scenes("test", sizes.tested)
    found = CogView2.load(out, base="coglm", direct="direct", iterative="iterative")
    early = System.load(out, name=EARLY)
    figures: dict[str, Any] = {
        "base": demo.of_base(found, scenes),
        "gpt": drawn(System.load(out, name="gpt"), scenes),
        EARLY: drawn(early, scenes),
        "early-gpt": drawn(System.load(out, name="early-gpt"), scenes),
        "domain": of_domain({EARLY: early} | {name: System.load(out, name=name) for name in further}, sizes.tested),
    }
    figures |= cogview2_sampling.run(out, early, scenes, sizes.candidates)
    figures |= cogview2_fine.run(out, found, scenes, sizes.fine_steps, sizes.domain_steps)
    facts = {
        "sizes": asdict(sizes),
        "models": {name: models.fact(result) for name, result in trained.items()},
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    return cogview2_report.write(out, facts | {"figures": figures})


def drawn(system: System, scenes: list[Scene], **how: Any) -> dict[str, dict[str, float]]:
    """Shares that are right, by language."""
    how = {"temperature": TEMPERATURE, "batch_size": 64} | how
    return {name: score(system.draw([caption(s, name) for s in scenes], **how), scenes) for name in LANGUAGES}


def of_two(data: TokenDataset) -> Rows:
    """The sequences of scenes with two emoji: every second scene, each with a caption in either language."""
    numbers = np.arange(len(data))
    return Rows(data, numbers[numbers // len(LANGUAGES) % 2 == 1])


def of_domain(systems: Mapping[str, System], count: int) -> dict[str, dict[str, float]]:
    """Scenes of two emoji drawn right, and of one, by each model; about as many of either as `count`."""
    scenes = sample_scenes("test", 2 * count)
    kinds = {"two": [s for s in scenes if s.second is not None], "one": [s for s in scenes if s.second is None]}
    return {
        name: {
            kind: sum(of["all"] for of in drawn(system, some).values()) / len(LANGUAGES) for kind, some in kinds.items()
        }
        for name, system in systems.items()
    }
