"""What every image tokenizer of a run can do."""

from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Sizes(Protocol):
    """Of an image tokenizer."""

    @property
    def codebook_size(self) -> int: ...
    @property
    def downsample(self) -> int: ...


class ImageTokenizer(Protocol):
    """Pictures to a grid of codes and back: a `VQVAE`, trained here, or an `IcetkTokenizer` or `PublishedCodec`."""

    @property
    def config(self) -> Sizes:
        """codebook_size: how many codes there are. downsample: picture pixels per code, along each side."""

    @property
    def sha256(self) -> str:
        """Of sizes and weights: names the model in files made with it."""

    @property
    def codebook(self) -> Tensor:
        """float [codebook_size, D]: a vector a code; ValueError where it is a library's own affair."""

    def encode(self, images: Tensor) -> Tensor:
        """images: float [B, 3, H, W] in [0, 1], H and W multiples of `downsample`. Codes: int64 [B, h, w]."""

    def decode(self, codes: Tensor) -> Tensor:
        """codes: int64 [B, h, w]. Pictures: float32 [B, 3, h * downsample, w * downsample] in [0, 1]."""

    def save(self, path: str | Path) -> None:
        """Writes weights and config as safetensors, never half of it, for `load_image_tokenizer`."""

    def state_dict(self) -> dict[str, Any]: ...
    def to(self, device: torch.device, /) -> Self: ...
    def eval(self) -> Self: ...


def check_images(images: Tensor, downsample: int) -> None:
    """Raises unless they are what `encode` takes."""
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % downsample or images.shape[3] % downsample:
        expected = f"[B, 3, H, W], H and W multiples of {downsample}"
        raise ValueError(f"images: expected {expected}, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating point in [0, 1], got {images.dtype}")


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raises unless they are what `decode` takes."""
    if codes.dim() != 3 or codes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"codes: expected integers [B, h, w], got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ValueError(f"codes: expected 0 to {codebook_size - 1}, got {int(codes.min())} to {int(codes.max())}")
