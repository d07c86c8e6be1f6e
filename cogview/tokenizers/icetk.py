"""CogView2's image tokenizer, icetk's ice_image.pt: the networks of a VQGAN around a codebook for three sizes of codes.

An encoder makes a vector of 4 x 4 pixels, a halving or two more make it of 8 x 8 or 16 x 16, and each of the three has
a decoder of its own. CogView2 (arXiv 2204.14217) takes 8 x 8. Only the networks of one size are kept, without what
trains them; names and shapes of the parameters are those of the file.
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import require
from cogview.tokenizers import stored
from cogview.tokenizers.image import MEAN, STD
from cogview.tokenizers.image_tokenizer import check_codes, check_images

FORMAT = "cogview-icetk-1"
RATES = (4, 8, 16)
GROUPS = 32  # of channels, which a norm goes over
ATTENDS_AT = 16  # pixels of a side to each of a decoder's, where its blocks have attention
_AT_ONCE = 1 << 16  # pixels that go through together: of 128 channels 32 MB a layer
_DISTANCES = 1 << 24  # to codes, found together: 64 MB


@dataclass(frozen=True)
class IcetkConfig:
    """Sizes of the networks; the defaults are the released ones'."""

    codebook_size: int = 20000
    dim: int = 256  # of a code vector
    latent: int = 256  # channels of the encoder's vectors
    widths: tuple[int, ...] = (128, 256, 512)  # channels at the picture's side, at its half and its quarter
    blocks: int = 2  # of the encoder, at each
    decoder_blocks: int = 1
    downsample: int = 8  # picture pixels per code, along each side

    def __post_init__(self):
        three = isinstance(self.widths, tuple) and len(self.widths) == 3
        require(three, "widths", "three of them", self.widths)
        for name, most in (("codebook_size", 1 << 24), ("dim", 1 << 16), ("latent", 1 << 16)):
            _check(name, getattr(self, name), most)
        for width in self.widths:
            _check("widths", width, 1 << 16)
            require(width % GROUPS == 0, "widths", f"multiples of {GROUPS}", width)
        for name in ("blocks", "decoder_blocks"):
            _check(name, getattr(self, name), 100)
        require(self.downsample in RATES, "downsample", "4, 8 or 16", self.downsample)

    @property
    def halvings(self) -> int:
        """Behind the encoder."""
        return RATES.index(self.downsample)

    @property
    def decoder(self) -> str:
        """Its number in the file."""
        return str(2 - self.halvings)


def _check(name: str, value: Any, most: int) -> None:
    require(type(value) is int and 1 <= value <= most, name, f"a number from 1 to {most:,}", value)


def _named(**modules: nn.Module) -> nn.Sequential:
    """One after the other."""
    return nn.Sequential(OrderedDict(modules))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


def _conv(before: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(before, width, 3, padding=1)


def _halving(width: int) -> nn.Sequential:
    """Padded at the right and below only."""
    return _named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def _doubling(width: int) -> nn.Sequential:
    return _named(repeat=nn.Upsample(scale_factor=2), conv=_conv(width, width))


class Block(nn.Module):
    def __init__(self, before: int, width: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(before), _conv(before, width)
        self.norm2, self.conv2 = _norm(width), _conv(width, width)
        self.nin_shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Of every place to every other, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, 1, places, C]; channels side by side, without which SDPA would hold all scores on the CPU
        q, k, v = (of(h).flatten(2).mT.contiguous()[:, None] for of in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended[:, 0].mT.reshape(x.shape))


class Level(nn.Module):
    """What is computed at one side; attention, if there is any, behind each block."""

    def __init__(self, before: int, width: int, blocks: int, attends: bool = False):
        super().__init__()
        self.block = nn.ModuleList(Block(width if i else before, width) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(width) for _ in range(blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Down(Level):
    def __init__(self, before: int, width: int, blocks: int, last: bool):
        super().__init__(before, width, blocks)
        self.downsample = nn.Identity() if last else _halving(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class Up(Level):
    def __init__(self, before: int, width: int, blocks: int, attends: bool, last: bool):
        super().__init__(before, width, blocks, attends)
        self.upsample = nn.Identity() if last else _doubling(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


def _middle(width: int) -> nn.Sequential:
    return _named(block_1=Block(width, width), attn_1=Attention(width), block_2=Block(width, width))


def _encoder(c: IcetkConfig) -> nn.Sequential:
    """Pictures to vectors of 4 x 4 pixels."""
    before = (c.widths[0], *c.widths)
    levels = [Down(before[i], width, c.blocks, last=i == 2) for i, width in enumerate(c.widths)]
    return _named(
        conv_in=_conv(3, c.widths[0]),
        down=nn.Sequential(*levels),
        mid=_middle(c.widths[-1]),
        norm_out=_norm(c.widths[-1]),
        silu=nn.SiLU(),
        conv_out=_conv(c.widths[-1], c.latent),
    )


def _decoder(c: IcetkConfig) -> nn.Sequential:
    """Vectors of codes to pictures; for each halving behind the encoder a level more of the narrowest width."""
    widths = (c.widths[0],) * c.halvings + c.widths
    before = (*widths, widths[-1])[1:]
    levels = {
        str(i): Up(before[i], widths[i], c.decoder_blocks, attends=1 << i == ATTENDS_AT, last=i == 0)
        for i in reversed(range(len(widths)))
    }
    return _named(
        conv_in=_conv(c.dim, widths[-1]),
        mid=_middle(widths[-1]),
        up=_named(**levels),
        norm_out=_norm(widths[0]),
        silu=nn.SiLU(),
        conv_out=_conv(widths[0], 3),
    )


class Halving(nn.Module):
    """Of the encoder's vectors."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_down_sampler = _halving(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) + self.conv_down_sampler(x)


class Quantizer(nn.Module):
    def __init__(self, c: IcetkConfig):
        super().__init__()
        self.proj = nn.Conv2d(c.latent, c.dim, 1)
        self.embed = nn.Embedding(c.codebook_size, c.dim)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes int64 [M] of vectors [M, dim], by distances in float32."""
        codes = self.embed.weight.float()
        squares, rows = codes.square().sum(1), max(1, _DISTANCES // len(codes))
        with torch.autocast(vectors.device.type, enabled=False):
            parts = [torch.addmm(squares, part, codes.t(), alpha=-2).argmin(1) for part in vectors.float().split(rows)]
        return torch.cat(parts)


class IcetkTokenizer(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to codes int64 [B, H / downsample, W / downsample] and back, in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: IcetkConfig):
        super().__init__()
        self.config = config
        self.enc = _encoder(config)
        self.down_samplers = nn.Sequential(*(Halving(config.latent) for _ in range(config.halvings)))
        self.quantize = Quantizer(config)
        self.decs = nn.ModuleDict({config.decoder: _decoder(config)})
        for name, value in (("mean", MEAN), ("std", STD)):  # no file has them: real where the weights are on meta yet
            self.register_buffer(name, torch.tensor(value, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images: float [B, 3, H, W] in [0, 1], H and W multiples of `downsample`. Codes: int64 [B, h, w]."""
        check_images(images, self.config.downsample)
        return torch.cat([self._codes(some.float()) for some in images.split(_at_once(images.shape[2:]))])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes: int64 [B, h, w]. Pictures: float32 [B, 3, h * downsample, w * downsample] in [0, 1]."""
        check_codes(codes, self.config.codebook_size)
        count = _at_once(codes.shape[1:], self.config.downsample)
        return torch.cat([self._pictures(some.long()) for some in codes.split(count)]).clamp_(0, 1)

    def _codes(self, images: Tensor) -> Tensor:
        vectors = self.quantize.proj(self.down_samplers(self.enc((images - self.mean) / self.std)))
        rows = vectors.permute(0, 2, 3, 1)
        return self.quantize.nearest(rows.flatten(0, 2)).view(rows.shape[:3])

    def _pictures(self, codes: Tensor) -> Tensor:
        vectors = self.quantize.embed(codes).permute(0, 3, 1, 2)
        return self.decs[self.config.decoder](vectors) * self.std + self.mean

    @property
    def codebook(self) -> Tensor:
        return self.quantize.embed.weight

    @property
    def sha256(self) -> str:
        """Of sizes and weights: names the model in files made with it."""
        return stored.digest(asdict(self.config), self.state_dict())

    def save(self, path: str | Path) -> None:
        """Writes weights and config as safetensors, never half of it."""
        stored.write(path, FORMAT, asdict(self.config), self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> "IcetkTokenizer":
        """Reads what `save` wrote; ValueError in one sentence if it is anything else."""
        sizes, tensors = stored.read(path, FORMAT)
        if isinstance(widths := sizes.get("widths"), list):
            sizes["widths"] = tuple(widths)
        try:
            config = IcetkConfig(**sizes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"path: {str(path)!r} has no valid config ({error})") from error
        model = cls.without_weights(config)
        stored.give(model, tensors, path)
        return model.float()

    @classmethod
    def without_weights(cls, config: IcetkConfig) -> "IcetkTokenizer":
        """Its weights on the meta device, for `load_state_dict(…, assign=True)`."""
        with torch.device("meta"):
            return cls(config)


def _at_once(sides: torch.Size, pixels: int = 1) -> int:
    """Pictures that go through the networks together, of so many pixels, or places of pixels x pixels."""
    return max(1, _AT_ONCE // max(1, sides.numel() * pixels**2))
