"""Training of the image tokenizer, by the loop that trains everything; a report and reconstruction pictures.

It trains on squares of CROP pixels, or 8 codes where those are more, from random places, so that a step costs the same
whatever the pictures' size, since what counts is steps: icons of 128 pixels came to 26.1 dB, held out, in 1,250 steps
on such squares, and to 19.2 in 312 steps on whole ones, which are as many pixels.

Random numbers are the loop's, so a run that was stopped and resumed gives the weights of one that was not (with steps;
with seconds the clock decides).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview.config import TrainConfig, require
from cogview.data.files import written_beside
from cogview.data.images import resized
from cogview.data.shuffle import permutation
from cogview.tokenizers.adversarial import VQGAN
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.train import checkpoint
from cogview.train.feed import streams
from cogview.train.loop import Trainer, Watch
from cogview.train.ranks import ALONE

CROP = 64  # pixels
GOOD = 1250  # steps
TRAINING: dict[str, Any] = {
    "batch_size": 32,
    "learning_rate": 1.5e-3,
    "final_rate": 0.02,
    "warmup": 0.03,
    "betas": (0.5, 0.9),  # with 0.9, 0.99 scenes came to 27.8 dB in 800 steps of 16, with these to 30.0
    "weight_decay": 0.0,
    "clip": math.inf,
    "dtype": "float32",
    "log_every": 20,
    "save_seconds": 60.0,
    "validate_every": 250,
}
"""Of a TrainConfig. Convolutions take bfloat16 all the same where it is native."""


@dataclass(frozen=True)
class VQReport:
    """What a training came to; psnr, used_codes and perplexity are of the evaluation pictures."""

    model: Path  # safetensors, for VQVAE.load
    reconstructions: Path  # PNG: originals above their reconstructions
    steps: int
    seconds: float  # spent in training, over all resumed runs
    images_per_second: float  # over all of them
    held_out: int  # of the evaluation pictures, how many were not trained on: all or none
    psnr: float  # dB
    used_codes: int
    perplexity: float  # exp of the entropy of the codes' use
    finished: bool  # False if Ctrl-C ended it; the checkpoint is there


class Pictures:
    """Rows of uint8 [N, 3, H, W], all or some, as samples. digest: names what they are from, if that is known."""

    def __init__(self, images: Tensor, rows: np.ndarray | None = None, digest: str = ""):
        shape = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3 and len(images) > 0
        require(fits, "images", "uint8 [N, 3, H, W]", shape)
        self.images, self.rows, self.digest = images, np.arange(len(images)) if rows is None else rows, digest

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return permutation(len(self), seed, epoch)


class PictureTask:
    """A VQ-VAE on pictures, alone or in a VQGAN; the metrics are its losses, and how it uses its codes."""

    title, unit, units, flops, ranks, inside = "image tokenizer", "images", 1, 0, ALONE, None

    def __init__(self, model: VQVAE | VQGAN, data: Pictures, held_out: Pictures | None = None, times: int = 1):
        """times: half of the pictures come so many times smaller, for one that both sizes are made with."""
        self.model, self.data, self.held_out, self.times = model, data, held_out, times
        crop = crop_of(model.config)
        self.crop = min(crop, *(side // times for side in data.images.shape[2:])) if times > 1 else crop
        self.counts: dict[str, int] = {}
        self.bfloat16 = _native_bfloat16(data.images.device)
        self.share: Callable[[], float] = lambda: 1.0
        """Of the training, how much is done: what is annealed goes by it."""

    def batch(
        self, samples: Pictures, indices: np.ndarray, draws: Sequence[torch.Generator], training: bool = True
    ) -> Tensor:
        images = samples.images[samples.rows[indices]]
        if training and self.times > 1:
            some, step, times = len(images) // 2, self.model.config.downsample, self.times
            # on the grid of the codes, as pairs are
            small = resized(_crops(images[:some], times * self.crop, draws[:some], times * step), self.crop)
            images = torch.cat([small, _crops(images[some:], self.crop, draws[some:], step)])
        elif training:
            images = _crops(images, self.crop, draws)
        return images.float().div_(255).contiguous(memory_format=torch.channels_last)

    def loss(self, part: Tensor, batch: Tensor) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
        with torch.autocast(part.device.type, torch.bfloat16, enabled=self.bfloat16):
            rebuilt, losses, codes = self.model(part, self.share())
        means = {name: loss.detach() for name, loss in losses.items()}
        means["squared"] = (rebuilt.detach().clamp(0, 1) - part).square().mean()
        return losses["total"] * (len(part) / len(batch)), (means, codes)

    def compile(self) -> None:
        self.model.compile()

    def metrics(self, outputs: list) -> dict[str, float]:
        losses, codes = zip(*outputs, strict=True)
        means = {name: float(sum(part[name] for part in losses) / len(losses)) for name in losses[0]}
        use = _code_use(torch.cat([c.flatten() for c in codes]), self.model.config)
        return {"loss": means["total"], "psnr": _decibels(means["squared"]), **means, **use}

    def identity(self) -> dict[str, Any]:
        known: dict[str, Any] = {"pictures": self.data.digest} if self.data.digest else {}
        known |= {1: {}, 2: {"halves": True}}.get(self.times, {"times": self.times})
        recipe = "vqgan" if isinstance(self.model, VQGAN) else "vqvae"
        return {"recipe": recipe, "config": asdict(self.model.config), "data": len(self.data), **known}


def crop_of(config: VQConfig) -> int:
    """Pixels of the squares that it trains on."""
    return max(CROP, 8 * config.downsample)


def steps_for(pictures: int, size: int, passes: float | None, crop: int = CROP) -> int:
    """Steps of a training in which so many pictures of size x size are seen so often, in squares of crop pixels; passes
    None: GOOD steps, or more where those are less than two passes, up to four times as many."""
    step = TRAINING["batch_size"] * min(crop, size) ** 2
    steps = math.ceil((2 if passes is None else passes) * pictures * size**2 / step)
    return max(1, steps) if passes is not None else min(max(steps, GOOD), 4 * GOOD)


def passes_of(steps: int, pictures: int, size: int, crop: int = CROP) -> float:
    """How often each pixel of so many pictures is seen in so many steps."""
    return steps * TRAINING["batch_size"] * min(crop, size) ** 2 / (pictures * size**2)


def seconds_a_step(config: VQConfig, size: int, adversarial: bool = False) -> float:
    """Of a training on this machine, from a few."""
    images, seconds = torch.zeros(TRAINING["batch_size"], 3, size, size, dtype=torch.uint8), []
    model: VQVAE | VQGAN = VQGAN(VQVAE(config)) if adversarial else VQVAE(config)
    task = PictureTask(model.to(memory_format=torch.channels_last), Pictures(images))  # type: ignore[call-overload]
    for _ in range(4):
        begun = time.monotonic()
        batch = task.batch(task.data, np.arange(len(images)), streams(range(len(images))))
        task.loss(batch, batch)[0].backward()
        seconds.append(time.monotonic() - begun)
    return 1.1 * min(seconds)  # with the optimizer


def train_vqvae(
    images: Tensor,
    config: VQConfig,
    training: TrainConfig,
    out_dir: str | Path,
    *,
    adversarial: bool = False,
    held_out: np.ndarray | None = None,
    name: str = "",
    times: int = 1,
    watch: Watch | None = None,
) -> VQReport:
    """Trains a VQ-VAE and leaves vqvae.safetensors, reconstructions.png and vqvae/ (checkpoints, log) in `out_dir`.

    images: uint8 [N, 3, H, W]. training: its length, and the rest as in TRAINING. adversarial: as a VQGAN. held_out:
    numbers of the pictures to report on and not to train on; None: the first 256 are reported on, and trained on. name:
    of the pictures. times: see PictureTask. It goes on from out_dir's checkpoint, which must have the same config,
    pictures and seed. Ctrl-C saves and returns; what is not trained to its end leaves no vqvae.safetensors.
    """
    out, rows = Path(out_dir), np.arange(len(images))
    judged = rows[:256] if held_out is None else held_out
    data = Pictures(images, rows if held_out is None else np.setdiff1d(rows, held_out), name)
    torch.manual_seed(training.seed)  # the initial weights
    model = VQVAE(config)
    trained = VQGAN(model) if adversarial else model
    trained.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = PictureTask(trained, data, None if held_out is None else Pictures(images, held_out), times)
    trainer = Trainer(task, training, out / "vqvae")
    task.share = trainer.progress
    trainer.resume(newest_checkpoint(out))
    result = trainer.run(watch)
    if result.finished:
        model.save(out / "vqvae.safetensors")
    held = images[judged]
    rebuilt, codes = reconstruct(model.eval(), held)
    save_comparison(out / "reconstructions.png", held[:16], rebuilt[:16])
    squared = (rebuilt.float() - held.float()).square().mean() / 255**2
    use, state = _code_use(codes, config), result.state
    return VQReport(
        out / "vqvae.safetensors",
        out / "reconstructions.png",
        state.step,
        state.elapsed,
        state.step * training.batch_size / max(state.elapsed, 1e-9),
        0 if held_out is None else len(held_out),
        _decibels(float(squared)),
        int(use["used_codes"]),
        use["perplexity"],
        result.finished,
    )


def trained_steps(out_dir: str | Path) -> int:
    """Of a training in this folder, 0 before the first checkpoint."""
    header = _header(Path(out_dir))
    return 0 if header is None else header["run"]["step"]


def trained_on(out_dir: str | Path) -> int | None:
    """How many pictures a training in this folder has, None before the first checkpoint."""
    header = _header(Path(out_dir))
    return None if header is None else header["data"]


def _header(out: Path) -> dict[str, Any] | None:
    """Of the newest checkpoint that is not damaged."""
    if (found := next(checkpoint.readable(out / "vqvae"), None)) is not None:
        return found[1]
    newest = newest_checkpoint(out)
    return None if newest is None else checkpoint.read_header(newest)


def newest_checkpoint(out: Path) -> Path | None:
    """Of a training in this folder, or None."""
    before = out / "vqvae.training.safetensors"  # of version 0.1
    return checkpoint.latest(out / "vqvae") or (before if before.exists() else None)


@torch.no_grad()
def reconstruct(model: ImageTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """images: uint8 [N, 3, H, W]. Their reconstructions, alike, and codes int64 [N, h, w]."""
    batch_size = max(1, 64**3 // (images.shape[2] * images.shape[3]))
    codes = torch.cat([model.encode(part.float() / 255) for part in images.split(batch_size)])
    pictures = [(model.decode(part) * 255).round().to(torch.uint8) for part in codes.split(batch_size)]
    return torch.cat(pictures), codes


def save_comparison(path: str | Path, originals: Tensor, rebuilt: Tensor) -> None:
    """Writes a PNG with the originals (uint8 [N, 3, H, W]) in the upper row, at twice their size."""
    rows = [torch.cat(list(images), dim=2) for images in (originals, rebuilt)]
    sheet = Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().cpu().numpy())
    with written_beside(path) as beside:
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(beside, "PNG")


def _crops(images: Tensor, side: int, draws: Sequence[torch.Generator], step: int = 1) -> Tensor:
    """A square of each picture, from a random place of those `step` pixels apart."""
    room = [max(0, n - side) // step + 1 for n in images.shape[2:]]
    if room == [1, 1]:
        return images
    found = []
    for image, stream in zip(images, draws, strict=True):
        top, left = (step * int(torch.randint(n, (), generator=stream)) for n in room)
        found.append(image[:, top : top + side, left : left + side])
    return torch.stack(found)


def _decibels(squared: float) -> float:
    """PSNR of a mean squared error of values in [0, 1]."""
    return -10 * math.log10(max(squared, 1e-12))


def _native_bfloat16(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16 here: 2.5 times with AMX, slower where emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def _code_use(codes: Tensor, config: VQConfig) -> dict[str, float]:
    used = torch.bincount(codes.flatten(), minlength=config.codebook_size) > 0
    return {"used_codes": int(used.sum()), "perplexity": float(entropy(codes).exp())}


def entropy(codes: Tensor) -> Tensor:
    """Of how often codes occur, in nats."""
    share = torch.bincount(codes.flatten()).float() / codes.numel()
    return -(share * share.clamp_min(1e-12).log()).sum()
