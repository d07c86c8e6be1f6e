"""Super-resolution measured (CogView paper, section 3.1), in small: scenes of emoji at 128 pixels, a model that draws
them at 64, one finetuned from it on squares of both sizes, which magnifies held-out scenes from 64 pixels to 128.

Against it stand the decoded small picture enlarged bicubically, and what its codes give when each of them is repeated.
The bound is the true picture after the image tokenizer.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.data import decoded
from cogview.data.crops import Crops, half
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset, tokens_of
from cogview.demo.demo import IMAGE, LANGUAGES, TEXT_PIECES
from cogview.demo.scenes import SIZE, build_scene_shards, caption, render, sample_scenes
from cogview.pipeline import decode, image_tokenizer, text_tokenizer, tokenize_pairs
from cogview.progress import progress, track
from cogview.recipes.superresolution import SuperResolution
from cogview.sampling import Sampling
from cogview.studies import models, superresolution_report
from cogview.system import System
from cogview.tokenizers.train_image import TRAINING

BASE, LENS = "gpt", "sr"  # names of the models
_HELD_OUT = 600  # scenes
_IMAGE = replace(IMAGE, codebook_size=2048)  # tiles at two sizes
HOW = {
    "greedy": Sampling(top_k=1, batch_size=64),
    "temperature 0.5": Sampling(temperature=0.5, batch_size=64),
    "as published": Sampling(temperature=1.02, top_k=200, batch_size=64),
}
"""Ways to draw."""


@dataclass(frozen=True)
class Sizes:
    """Of the study. Steps: of the image tokenizer, of the model that draws, of its finetuning."""

    scenes: int = 6_000
    crops: int = 3
    tested: int = 128
    image_steps: int = 1_000
    base_steps: int = 900
    steps: int = 1_400

    def __post_init__(self):
        for name, value in asdict(self).items():
            require(value >= 1, name, "at least 1", value)


def run(out: Path, sizes: Sizes) -> str:
    """Does what is not done yet and writes report.md, figures.json and pictures; returns what they come to."""
    begun = time.monotonic()
    _tokens(out, sizes)
    data = [[TokenDataset(tokens_of(out, split, n)) for split in ("train", "test")] for n in (1, 2)]
    base = models.drawing(out / BASE, sizes.base_steps, *data[0])
    lens = models.finetuned(out / LENS, SuperResolution, out / BASE, sizes.steps, *data[1])
    system = System.load(out, name=LENS)
    scenes = sample_scenes("test", sizes.tested)
    true = torch.stack([torch.from_numpy(np.array(render(s, 2))).permute(2, 0, 1) for s in scenes])
    codes = system.tokenize(torch.stack([half(picture) for picture in true]))
    pictures = {"bicubic": bicubic(system.pictures(codes)), "codes repeated": system.pictures(repeated(codes))}
    texts, seconds = [caption(s, LANGUAGES[k // 2 % len(LANGUAGES)]) for k, s in enumerate(scenes)], {}
    for name, how in HOW.items():
        started = time.monotonic()
        with progress(f"magnifying, {name}", 4 * codes.numel()) as update:
            pictures[name] = torch.cat(list(system.magnify_batches(texts, codes, how, update=update)))
        seconds[name] = (time.monotonic() - started) / len(texts)
    pictures["bound"] = system.pictures(system.image.encode(true.float() / 255))
    facts = {
        "sizes": asdict(sizes),
        "models": {name: models.fact(result) for name, result in ((BASE, base), (LENS, lens))},
        "parameters": sum(p.numel() for p in system.model.parameters()),
        "seconds_per_picture": seconds,
        "threads": torch.get_num_threads(),
        "minutes_this_time": (time.monotonic() - begun) / 60,
    }
    return superresolution_report.write(out, scenes, texts, system.pictures(codes), true, pictures, facts)


def bicubic(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] at twice the side."""
    large = F.interpolate(pictures.float(), scale_factor=2, mode="bicubic")
    return large.round().clamp(0, 255).to(torch.uint8)


def repeated(codes: Tensor) -> Tensor:
    """int64 [N, 2 h, 2 w]: each of the codes [N, h, w] four times."""
    return codes.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def _tokens(out: Path, sizes: Sizes) -> None:
    """Tokenizers, and the tokens of both splits at one size and at two."""
    scenes = build_scene_shards(
        out / "scenes", sizes.scenes, _HELD_OUT, progress=lambda work: track(work, "composing scenes"), scale=2
    )
    data = {split: PairDataset(paths, languages=LANGUAGES) for split, paths in scenes.items()}
    text = text_tokenizer(data["train"], out, TEXT_PIECES)
    pictures = decode(data["train"], out, 2 * SIZE)
    training = TrainConfig(steps=sizes.image_steps, **TRAINING)
    image, _ = image_tokenizer(data["train"], pictures, out, _IMAGE, training, halves=True)
    for split, pairs in data.items():
        tokenize_pairs(pairs, text, image, tokens_of(out, split))
        known = pictures if split == "train" else None
        tokenize_pairs(pairs, text, image, tokens_of(out, split, 2), crops=Crops(sizes.crops), decoded=known)
    decoded.remove(out / "pixels")
