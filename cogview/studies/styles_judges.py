"""Which style pictures of things are in, and which thing they show: two networks trained on true pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from cogview.config import TrainConfig
from cogview.demo.things import BACKGROUNDS, FILTERS, PLAIN, STYLES, View, pictures_of, things
from cogview.evaluation import classifier
from cogview.system import System
from cogview.tokenizers.train_image import reconstruct
from cogview.train.interrupts import Interrupted


@dataclass(frozen=True)
class Judges:
    """What says which style pictures are in, any of all, and which thing they show."""

    style: classifier.Classifier
    thing: classifier.Classifier
    views: list[View]
    true: Tensor
    """Pictures uint8 [N, 3, S, S] of these views after the image tokenizer: of each thing in each style one, on another
    background than those that the networks were trained on."""

    @classmethod
    def trained(cls, out: Path, system: System, steps: int) -> "Judges":
        styles = (PLAIN, *FILTERS, *STYLES)
        draws = random.Random("judges")
        three = [
            [View(thing, style, background) for background in draws.sample(list(BACKGROUNDS), 3)]
            for thing, style in product(things(), styles)
        ]
        known, views = [view for some in three for view in some[:2]], [some[2] for some in three]
        pictures = pictures_of(known)
        pictures = torch.cat([pictures, reconstruct(system.image, pictures)[0]])
        true, _ = reconstruct(system.image, pictures_of(views))
        training, found = TrainConfig(steps=steps, **classifier.TRAINING), {}
        for kind in ("style", "thing"):
            labels = [getattr(view, kind) for view in known] * 2
            path = out / f"judge-{kind}.safetensors"
            about: dict[str, Any] = {"hold_out": 0.05, "features": 256}  # 200 things take more than 64
            result, found[kind] = classifier.train(path, pictures, labels, training, **about)
            if not result.finished:
                raise Interrupted
        return cls(**found, views=views, true=true)

    @torch.no_grad()
    def score(self, pictures: Tensor, asked: Sequence[View]) -> dict[str, float]:
        """Shares of pictures in the style asked for, with the thing asked for, and both, each with its standard error
        over things as "style error" and so on."""
        right = {}
        for kind, judge in (("style", self.style), ("thing", self.thing)):
            logits = torch.cat([judge(some).logits for some in pictures.split(256)])
            named = [judge.config.classes[n] for n in logits.argmax(dim=1).tolist()]
            right[kind] = [name == getattr(view, kind) for name, view in zip(named, asked, strict=True)]
        right["both"] = [a and b for a, b in zip(right["style"], right["thing"], strict=True)]
        found: dict[str, float] = {"pictures": len(asked)}
        for name, of in right.items():
            each: dict[str, list[bool]] = {}
            for view, is_right in zip(asked, of, strict=True):
                each.setdefault(view.thing, []).append(is_right)
            means = [fmean(some) for some in each.values()]
            found |= {name: fmean(of), f"{name} error": stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0}
        return found
