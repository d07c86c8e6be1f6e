"""Four ways to train an image tokenizer's codebook, side by side (CogView paper, section 2.2 and figure 2), beside them
moving averages whose unused codes are moved, and a VQGAN: the same sizes, scenes and steps, several seeds.

The paper found the four evenly matched, so that learning the codes matters little where they begin well. All four begin
alike here.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.config import TrainConfig
from cogview.data.files import write_json
from cogview.data.images import pixels
from cogview.demo.scenes import SIZE, render, sample_scenes
from cogview.progress import track
from cogview.studies import tokenizers_report
from cogview.studies.counts import Counts
from cogview.tokenizers.codebook import Training
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.train_image import TRAINING, reconstruct, train_vqvae
from cogview.train.interrupts import Interrupted
from cogview.train.log import read_log

CODEBOOKS: tuple[Training, ...] = ("moving_average", "moving_average_kmeans", "straight_through", "gumbel", "fixed")
VQGAN = "vqgan"  # beside the names of codebooks
WAYS = (*CODEBOOKS, VQGAN)


@dataclass(frozen=True)
class Sizes(Counts):
    """Of the study: scenes to train on and held out, seeds, steps of each training, the tokenizer."""

    pictures: int
    held_out: int
    seeds: int
    steps: int
    batch_size: int
    codebook: int
    code_dim: int
    hidden: int


def run(out: Path, sizes: Sizes, tell: Callable[[str], None]) -> str:
    """Trains what is not trained yet, writes report.md, figures.json and the pictures. What was found, in words."""
    record, settings = out / "study.json", asdict(sizes)
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"out: {str(out)!r} holds a study of other sizes; name another or remove it")
    write_json(record, settings)
    scenes = sample_scenes("train", sizes.pictures) + sample_scenes("test", sizes.held_out)
    images = torch.stack([pixels(render(scene), SIZE) for scene in track(scenes, "composing scenes")])
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    rebuilt: dict[str, Tensor] = {}
    for seed in range(sizes.seeds):
        for way in WAYS:
            figures, pictures = _train(way, seed, images, sizes, out / "trainings" / f"{way}-{seed}")
            found[way].append(figures)
            rebuilt.setdefault(way, pictures)
            tell(f"{way}, seed {seed}: {figures['psnr']:.2f} dB held out, {figures['used_codes']} codes used")
    return tokenizers_report.write(out, settings, found, images[sizes.pictures :], rebuilt)


def _train(way: str, seed: int, images: Tensor, sizes: Sizes, folder: Path) -> tuple[dict[str, Any], Tensor]:
    """Figures of a training, finished now or before, and the held-out pictures as it gives them back."""
    sizes_of_it = {"codebook_size": sizes.codebook, "dim": sizes.code_dim, "hidden": sizes.hidden}
    config = VQConfig(**sizes_of_it, codebook=way if way in CODEBOOKS else VQConfig.codebook)  # type: ignore[arg-type]
    how = TRAINING | {
        "batch_size": sizes.batch_size,
        "validate_every": max(1, sizes.steps // 10),
        "keep": 1,
    }
    held_out = np.arange(sizes.pictures, len(images))
    training = TrainConfig(steps=sizes.steps, seed=seed, **how)
    report = train_vqvae(images, config, training, folder, adversarial=way == VQGAN, held_out=held_out)
    if not report.finished:
        raise Interrupted
    true = images[sizes.pictures :]
    rebuilt, _ = reconstruct(VQVAE.load(report.model), true)
    log = read_log(folder / "vqvae")
    figures = {
        "seed": seed,
        "squared": float((rebuilt.float() - true.float()).square().mean() / 255**2),
        "psnr": report.psnr,
        "used_codes": report.used_codes,
        "perplexity": report.perplexity,
        **sharpness(rebuilt, true),
        "seconds": report.seconds,
        "training": [(entry["step"], entry["squared"]) for entry in log if "squared" in entry],
        "validation": [(e["step"], e["validation_squared"]) for e in log if "validation_squared" in e],
    }
    return figures, rebuilt


def sharpness(rebuilt: Tensor, true: Tensor) -> dict[str, float]:
    """Of pictures [N, 3, H, W]: by their differences d between neighbouring pixels, those of the true ones D.

    edges: sum d D / sum D^2, 1 where edges are as steep as they should be, less where they are blurred; what is made up
    adds nothing to it. differences: sum |d| / sum |D|, to which it does.
    """
    ours, theirs = (torch.cat([x.float().diff(dim=dim).flatten() for dim in (2, 3)]) for x in (rebuilt, true))
    return {
        "edges": float((ours * theirs).sum() / theirs.square().sum()),
        "differences": float(ours.abs().sum() / theirs.abs().sum()),
    }
