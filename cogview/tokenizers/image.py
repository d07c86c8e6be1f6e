"""VQ-VAE: pictures to a grid of codes and back (CogView, arXiv 2105.13290, section 2.2 and appendix A).

Encoder: 4 x 4 convolutions of stride 2, ReLU between, and a 1 x 1 to the codebook's dimension. Decoder: the
mirror image, as in CogView's released weights with a last 1 x 1 convolution to the channels. Codebook: one of the
paper's four. With moving averages, as published, names and shapes of the parameters are those of CogView's released
`vqvae_hard_biggerset_011.pt`.

Or DALL-E's discrete VAE (arXiv 2102.12092, section 2.1), in these layers instead of its residual blocks: the 1 x 1
convolutions are to a logit a code and to two numbers a value.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import require
from cogview.tokenizers import logit_laplace, stored
from cogview.tokenizers.codebook import KINDS, Training
from cogview.tokenizers.image_tokenizer import check_codes, check_images

FORMAT = "cogview-vqvae-1"
MEAN = (0.79093, 0.76271, 0.75340)  # of CogView's training pictures; kept for its released weights
STD = (0.30379, 0.32279, 0.32800)
Reconstruction = Literal["pixels", "logit_laplace"]
"""What the decoder gives, and its loss: pixels, or a distribution of theirs (DALL-E's)."""
LATER = ("codebook", "reconstruction", "kl_weight")  # fields that files of before they existed do not have


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ-VAE; the defaults are CogView's."""

    codebook_size: int = 8192
    dim: int = 256  # of a code vector
    hidden: int = 512  # channels between convolutions
    in_channels: int = 3
    downsample: int = 8  # picture pixels per code, along each side; a power of two
    decay: float = 0.99  # of the codebook's moving averages
    commitment: float = 0.25
    codebook: Training = "moving_average"  # how it is trained
    reconstruction: Reconstruction = "pixels"
    kl_weight: float = 6.6  # of a relaxed codebook; DALL-E's

    def __post_init__(self):
        for name in ("codebook_size", "dim", "hidden", "downsample"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ValueError(f"downsample: expected a power of two from 2, got {self.downsample}")
        if self.in_channels != len(MEAN):
            raise ValueError(f"in_channels: expected {len(MEAN)} (RGB), got {self.in_channels}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: expected at least 0 and less than 1, got {self.decay}")
        require(self.codebook in KINDS, "codebook", f"one of {', '.join(KINDS)}", self.codebook)
        ways = get_args(Reconstruction)
        require(self.reconstruction in ways, "reconstruction", f"one of {', '.join(ways)}", self.reconstruction)
        require(0 <= self.kl_weight < math.inf, "kl_weight", "a finite number of at least 0", self.kl_weight)

    def stored(self) -> dict[str, Any]:
        """As files have it: without what came later where that is the default, so that the hash of a file of before
        is still its name."""
        return {k: v for k, v in asdict(self).items() if k not in LATER or v != getattr(VQConfig, k)}


_TINY = VQConfig(codebook_size=1024, dim=64, hidden=96)
_DALLE: dict[str, Any] = {"codebook": "relaxed", "reconstruction": "logit_laplace"}
PRESETS: dict[str, tuple[int, VQConfig]] = {
    "tiny": (64, _TINY),
    "cogview": (256, VQConfig()),
    "fashion-tiny": (320, VQConfig(codebook_size=2048, dim=64, hidden=64, downsample=16)),
    "fashion-400": (400, VQConfig()),
    "fashion-800": (800, VQConfig(downsample=16)),
    "dalle-tiny": (64, replace(_TINY, **_DALLE)),
    "dalle": (256, VQConfig(dim=128, **_DALLE)),
}
"""Pixels of a side, and sizes. The fashion model's 50 x 50 codes (section 3.4, trained as a VQGAN) come to 800 pixels;
how its layers were, and that each code had 16 of them, was never published and is ours. DALL-E's decoder begins with
128 numbers of each of 8,192 codes, too."""


class Encoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.in_channels
        for _ in range(config.downsample.bit_length() - 1):
            layers += [nn.Conv2d(channels, config.hidden, 4, stride=2, padding=1), nn.ReLU()]
            channels = config.hidden
        outputs = config.codebook_size if config.codebook == "relaxed" else config.dim
        self.blocks = nn.Sequential(*layers, nn.Conv2d(channels, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Upsample(nn.ConvTranspose2d):
    """Transposed 4 x 4 convolution of stride 2. The bias is added apart: its gradient inside oneDNN's
    deconvolution took more time than everything else in there (CPU, bfloat16, channels last)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = F.conv_transpose2d(x, self.weight, None, stride=2, padding=1)
        return y + self.get_parameter("bias").to(y.dtype).view(1, -1, 1, 1)


class Decoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.dim
        for _ in range(config.downsample.bit_length() - 1):
            layers += [Upsample(channels, config.hidden), nn.ReLU()]
            channels = config.hidden
        outputs = config.in_channels * (2 if config.reconstruction == "logit_laplace" else 1)
        self.blocks = nn.Sequential(*layers, nn.Conv2d(channels, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class VQVAE(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to codes int64 [B, H / downsample, W / downsample] and back."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.enc_b = Encoder(config)
        self.quantize_t = KINDS[config.codebook](config)
        self.dec = Decoder(config)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | Upsample):
                nn.init.xavier_normal_(module.weight, gain=5 / 3)
                nn.init.zeros_(module.get_parameter("bias"))

    def encode(self, images: Tensor) -> Tensor:
        """images: float [B, 3, H, W] in [0, 1], H and W multiples of `downsample`. Codes: int64 [B, h, w]."""
        outputs = self._encoded(images)
        return self.quantize_t.codes_of(outputs.flatten(0, 2)).view(outputs.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """codes: int64 [B, h, w]. Pictures: float32 [B, 3, h * downsample, w * downsample] in [0, 1]."""
        check_codes(codes, self.config.codebook_size)
        return self._pictures(self._decoded(self.quantize_t.vectors_of(codes.long()))).clamp(0, 1)

    def forward(self, images: Tensor, share: float = 1.0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Reconstructions (not clamped), {those of the pictures, the codebook's, "total"} and what it shows, codes.

        share: of the training that is done. Gradients pass the codebook straight through, but a relaxed one.
        """
        outputs = self._encoded(images)
        with torch.autocast(outputs.device.type, enabled=False):
            vectors, codes, of_codebook, shown = self.quantize_t(outputs.flatten(0, 2), share)
        decoded = self._decoded(vectors.view(*outputs.shape[:3], -1))
        reconstruction = self._pictures(decoded)
        losses = self._losses(decoded, reconstruction, images) | of_codebook
        losses["total"] = sum(losses.values(), start=torch.zeros((), device=images.device))
        return reconstruction, losses | shown, codes.view(outputs.shape[:3])

    def _losses(self, decoded: Tensor, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Of the pictures: "reconstruction" is squared plus absolute error in units of the pictures' deviation, "edges"
        the absolute error of differences between neighbouring pixels: by squared error alone outlines and faces come
        out blurred. Of a distribution: its mean negative log-likelihood."""
        if self.config.reconstruction == "logit_laplace":
            return {"reconstruction": logit_laplace.negative_log_likelihood(decoded, images).mean()}
        error = (reconstruction - images) / self.std
        return {
            "reconstruction": error.square().mean() + error.abs().mean(),
            "edges": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
        }

    def _encoded(self, images: Tensor) -> Tensor:
        """Encoder output, float32 [B, h, w, dim], of a relaxed codebook [B, h, w, codebook_size]."""
        check_images(images, self.config.downsample)
        normal = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.enc_b(normal).permute(0, 2, 3, 1).float().contiguous()

    def _decoded(self, vectors: Tensor) -> Tensor:
        """[B, h, w, dim] through the decoder, float32 [B, 3, H, W], of a distribution [B, 6, H, W]."""
        return self.dec(vectors.permute(0, 3, 1, 2)).float()

    def _pictures(self, decoded: Tensor) -> Tensor:
        if self.config.reconstruction == "logit_laplace":
            return logit_laplace.pictures_of(decoded)
        return decoded * self.std + self.mean

    @property
    def codebook(self) -> Tensor:
        return self.quantize_t.embed.t()

    @property
    def sha256(self) -> str:
        """Of sizes and weights: names the model in files made with it."""
        return stored.digest(self.config.stored(), self.state_dict())

    def save(self, path: str | Path) -> None:
        """Writes weights and config as safetensors, never half of it."""
        stored.write(path, FORMAT, self.config.stored(), self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> "VQVAE":
        """Reads what `save` wrote; ValueError in one sentence if it is anything else."""
        sizes, tensors = stored.read(path, FORMAT)
        try:
            config = VQConfig(**sizes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"path: {str(path)!r} has no valid config ({error})") from error
        model = cls(config)
        stored.give(model, tensors, path)
        return model.eval()
