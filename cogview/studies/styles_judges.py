"""Which style pictures of things are in, and which thing they show: two networks trained on true pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
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
    """The true pictures uint8 [N, 3, S, S] of all views, after the image tokenizer."""

    @classmethod
    def trained(cls, out: Path, system: System, steps: int) -> "Judges":
        styles = (PLAIN, *FILTERS, *STYLES)
        draws = random.Random("judges")
        views = [
            View(thing, style, background)
            for thing, style in product(things(), styles)
            for background in draws.sample(list(BACKGROUNDS), 2)
        ]
        pictures = pictures_of(views)
        true, _ = reconstruct(system.image, pictures)
        training, found = TrainConfig(steps=steps, **classifier.TRAINING), {}
        for kind in ("style", "thing"):
            labels = [getattr(view, kind) for view in views] * 2
            path = out / f"judge-{kind}.safetensors"
            about: dict[str, Any] = {"hold_out": 0.05, "features": 256}  # 200 things take more than 64
            result, found[kind] = classifier.train(path, torch.cat([pictures, true]), labels, training, **about)
            if not result.finished:
                raise Interrupted
        return cls(**found, views=views, true=true)

    @torch.no_grad()
    def score(self, pictures: Tensor, asked: Sequence[View]) -> dict[str, float]:
        """Shares of pictures in the style asked for, with the thing asked for, and both."""
        right = {}
        for kind, judge in (("style", self.style), ("thing", self.thing)):
            logits = torch.cat([judge(some).logits for some in pictures.split(256)])
            named = [judge.config.classes[n] for n in logits.argmax(dim=1).tolist()]
            right[kind] = torch.tensor([name == getattr(view, kind) for name, view in zip(named, asked, strict=True)])
        right["both"] = right["style"] & right["thing"]
        return {name: float(of.float().mean()) for name, of in right.items()} | {"pictures": len(asked)}
