"""Super-resolution measured (CogView paper, section 3.1), in small: scenes of emoji at 128 pixels, a model that draws
them at 64, one finetuned from it on squares of both sizes, which magnifies held-out scenes from 64 pixels to 128.

Against it stand the decoded small picture enlarged bicubically, and what its codes give when each of them is repeated.
The bound is the true picture after the image tokenizer. Two such models differ in how the squares were cut.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cogview.data.crops import Crops, smaller
from cogview.data.images import resized
from cogview.demo import models
from cogview.demo.demo import IMAGE, language_of
from cogview.demo.large_scenes import LargeScenes, splits
from cogview.demo.scenes import caption, render, sample_scenes
from cogview.progress import progress
from cogview.recipes.superresolution import SuperResolution
from cogview.sampling import Sampling
from cogview.studies import superresolution_report
from cogview.studies.counts import Counts
from cogview.system import System
from cogview.tokenizers.train_image import reconstruct

BASE = "gpt"
LENSES: dict[str, Literal["pictures", "codes"]] = {"sr": "pictures", "sr-codes": "codes"}
"""Names of the models that magnify, and what the squares that they are trained on are cut out of, see `Crops`."""
_HELD_OUT = 600  # scenes
_IMAGE = replace(IMAGE, codebook_size=2048)  # tiles at two sizes
HOW = {
    "greedy": Sampling(top_k=1, batch_size=64),
    "temperature 0.5": Sampling(temperature=0.5, batch_size=64),
    "as published": Sampling(temperature=1.02, top_k=200, batch_size=64),
}
"""Ways to draw."""


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study. Steps: of the image tokenizer, of the model that draws, of its finetuning."""

    scenes: int
    crops: int
    tested: int
    image_steps: int
    base_steps: int
    steps: int


def run(out: Path, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and pictures; returns what they come to."""
    begun = time.monotonic()
    _tokens(out, sizes)
    trained = {BASE: models.drawing(out / BASE, sizes.base_steps, *splits(out, "whole"))}
    for name, cut in LENSES.items():
        squares = splits(out, cut)
        trained[name] = models.finetuned(out / name, SuperResolution, out / BASE, sizes.steps, *squares)
    scenes = sample_scenes("test", sizes.tested)
    true = torch.stack([torch.from_numpy(np.array(render(s, 2))).permute(2, 0, 1) for s in scenes])
    small = torch.stack([smaller(picture) for picture in true])
    texts = [caption(s, language_of(k)) for k, s in enumerate(scenes)]
    systems, seconds = {name: System.load(out, name=name) for name in LENSES}, dict[str, float]()
    system = systems["sr"]
    codes = system.tokenize(small)
    decoded = system.pictures(codes)
    pictures = {"bicubic": bicubic(decoded), "codes repeated": system.pictures(repeated(codes))}
    for name, cut in LENSES.items():
        for way, how in HOW.items():
            started, said = time.monotonic(), f"cut from {cut}, {way}"
            with progress(f"magnifying: {said}", 4 * codes.numel()) as update:
                drawn = systems[name].magnify_batches(texts, codes, how, update=update)
                pictures[said] = torch.cat(list(drawn))
            seconds[said] = (time.monotonic() - started) / len(texts)
    rebuilt, _ = reconstruct(system.image, true)
    pictures |= {"true small, bicubic": bicubic(small), "bound": rebuilt}
    facts = {
        "sizes": asdict(sizes),
        "models": {name: models.fact(result) for name, result in trained.items()},
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "seconds_per_picture": seconds,
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    return superresolution_report.write(out, scenes, texts, decoded, true, pictures, facts)


def bicubic(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] at twice the side."""
    return resized(pictures, 2 * pictures.shape[-1])


def repeated(codes: Tensor) -> Tensor:
    """int64 [N, 2 h, 2 w]: each of the codes [N, h, w] four times."""
    return codes.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def _tokens(out: Path, sizes: Sizes) -> None:
    """Tokenizers, and the tokens of both splits at one size and at two."""
    with LargeScenes(out, sizes.scenes, _HELD_OUT, _IMAGE, sizes.image_steps) as scenes:
        scenes.tokenize("whole")
        for cut in LENSES.values():
            scenes.tokenize(cut, crops=Crops(sizes.crops, cut=cut))
