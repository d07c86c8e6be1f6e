"""Published image codecs as the image tokenizer of a run: `JanusVQVAE` and `Emu3VQVAE` of transformers, `VQModel` of
diffusers (VQGAN, Kandinsky's MoVQ, aMUSEd's).

Weights and computation are the libraries'; nothing of it is trained here. In a run a codec is one file, as a `VQVAE`
is; `codec_folder.read` makes it of a published folder.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogview.config import require
from cogview.data.pretrained import short
from cogview.tokenizers import stored
from cogview.tokenizers.image_tokenizer import check_codes, check_images

FORMAT = "cogview-codec-1"
_AT_ONCE = 1 << 16  # pixels that go through a codec together: of 256 channels and 4 frames, 256 MB a layer
_MOST = 100  # layers that a config may ask for, by a list or these
_COUNTS = ("num_res_blocks", "layers_per_block")


@dataclass(frozen=True)
class Kind:
    """A class of codecs: where it comes from, and how it is called."""

    package: str
    codes: str  # what its config calls their count
    encode: Callable[[Any, Tensor], Tensor]  # of pictures in its own range; codes by rows, of any shape
    decode: Callable[[Any, Tensor], Tensor]  # of codes [B, h, w]


def _encode_janus(model: Any, images: Tensor) -> Tensor:
    """As transformers has it: nearest by plain distance. Janus' own code divides latents and codes by their norms
    before; what codes decode to is the same in both."""
    return model.encode(images).image_tokens


def _decode_janus(model: Any, codes: Tensor) -> Tensor:
    model.quantize.quant_state_dims = list(codes.shape[1:])  # the config's is of one size of pictures
    return model.decode(codes.flatten(1))


def _encode_emu3(model: Any, images: Tensor) -> Tensor:
    """A picture is a film that stands still: as many frames as make one frame of codes."""
    return torch.stack(model.encode(images, [images.shape[2:]] * len(images)).image_tokens)


def _decode_emu3(model: Any, codes: Tensor) -> Tensor:
    """The first of the frames that one frame of codes makes."""
    return model.decode(codes)


def _encode_vq(model: Any, images: Tensor) -> Tensor:
    return model.quantize(model.encode(images).latents)[2][2]


def _decode_vq(model: Any, codes: Tensor) -> Tensor:
    """Of the codes' vectors, which `decode` looks up itself where the config says so."""
    flat, shape = codes.flatten(), (*codes.shape, model.quantize.vq_embed_dim)
    of = flat if model.config.lookup_from_codebook else model.quantize.get_codebook_entry(flat, shape)
    return model.decode(of, force_not_quantize=True, shape=shape).sample


KINDS = {
    "JanusVQVAE": Kind("transformers", "num_embeddings", _encode_janus, _decode_janus),
    "Emu3VQVAE": Kind("transformers", "codebook_size", _encode_emu3, _decode_emu3),
    "VQModel": Kind("diffusers", "num_vq_embeddings", _encode_vq, _decode_vq),
}


def class_of(kind: str) -> Any:
    """Of the package that has it; ValueError says what to install."""
    package = KINDS[kind].package
    try:
        return getattr(importlib.import_module(package), kind)
    except (ImportError, RuntimeError, AttributeError) as error:  # transformers' imports inside come as the second
        raise ValueError(
            f"codec: {kind} needs the package {package}, which is missing or too old here ({short(error)}): "
            f"`pip install -U {package}`"
        ) from error


def settings_of(made: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Of a config what a class of codecs is made of, and nothing that says how or from where to load it."""
    takes = getattr(made, "config_class", made)
    own, common = (inspect.signature(of.__init__).parameters for of in (takes, takes.__base__))
    return {name: config[name] for name in sorted(own.keys() - common.keys()) if name in config}


def without_weights(made: Any, settings: dict[str, Any]) -> Any:
    """A model on the meta device; ValueError where the settings make none."""
    lists = {name: len(value) for name, value in settings.items() if isinstance(value, list)}
    for name, count in (lists | {name: settings[name] for name in _COUNTS if name in settings}).items():
        require(isinstance(count, int) and count <= _MOST, name, f"at most {_MOST} layers", count)
    try:
        with torch.device("meta"):
            return made(made.config_class(**settings)) if hasattr(made, "config_class") else made(**settings)
    except Exception as error:  # whatever a library makes of a wrong config
        raise ValueError(f"{made.__name__} cannot be made of its config: {short(error)}") from error


@dataclass(frozen=True)
class CodecConfig:
    """A codec: its class, sizes, and the range of its pictures, (picture - mean) / std."""

    kind: str
    codebook_size: int
    downsample: int
    mean: list[float]  # of red, green and blue
    std: list[float]
    settings: dict[str, Any]  # of its class

    def __post_init__(self):
        require(self.kind in tuple(KINDS), "kind", f"one of {', '.join(KINDS)}", self.kind)
        require(isinstance(self.settings, dict), "settings", "an object", self.settings)
        for name in ("codebook_size", "downsample"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, "a positive number", value)
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = (
                isinstance(value, list) and [isinstance(x, float) and math.isfinite(x) for x in value] == [True] * 3
            )
            require(numbers and (name == "mean" or min(value) > 0), name, "three numbers, of std positive", value)


class PublishedCodec(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to codes int64 [B, H / downsample, W / downsample] and back, in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: CodecConfig):
        super().__init__()
        self.config, self.model = config, model.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        self.eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images: float [B, 3, H, W] in [0, 1], H and W multiples of `downsample`. Codes: int64 [B, h, w]."""
        step = self.config.downsample
        check_images(images, step)
        height, width = images.shape[2:]
        codes = torch.empty(len(images), height // step, width // step, dtype=torch.int64, device=images.device)
        for rows in _groups(len(images), height * width):
            found = KINDS[self.config.kind].encode(self.model, (images[rows].float() - self.mean) / self.std)
            codes[rows] = found.view(codes[rows].shape)
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes: int64 [B, h, w]. Pictures: float32 [B, 3, h * downsample, w * downsample] in [0, 1]."""
        check_codes(codes, self.config.codebook_size)
        height, width = (side * self.config.downsample for side in codes.shape[1:])
        pictures = torch.empty(len(codes), 3, height, width, device=codes.device)
        for rows in _groups(len(codes), height * width):
            pictures[rows] = KINDS[self.config.kind].decode(self.model, codes[rows].long()) * self.std + self.mean
        return pictures.clamp_(0, 1)

    @property
    def codebook(self) -> Tensor:
        raise ValueError(f"codebook: expected that of an image tokenizer trained here, got {self.config.kind}")

    @property
    def sha256(self) -> str:
        """Of sizes and weights: names the model in files made with it."""
        return stored.digest(asdict(self.config), self.state_dict())

    def save(self, path: str | Path) -> None:
        """Writes weights and config as safetensors, never half of it."""
        stored.write(path, FORMAT, asdict(self.config), self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> "PublishedCodec":
        """Reads what `save` wrote; ValueError in one sentence if it is anything else, or what to install."""
        sizes, tensors = stored.read(path, FORMAT)
        try:
            config = CodecConfig(**sizes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"path: {str(path)!r} has no valid config ({error})") from error
        codec = cls(without_weights(class_of(config.kind), config.settings), config)
        stored.give(codec, tensors, path)
        return codec.float()


def _groups(count: int, pixels: int) -> list[slice]:
    """Of so many pictures, those that go through a codec together."""
    step = max(1, _AT_ONCE // max(1, pixels))
    return [slice(first, first + step) for first in range(0, count, step)]
