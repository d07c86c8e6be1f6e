"""CogView2's released image tokenizer, icetk's ice_image.pt, read as ours.

The file has the networks of all three sizes of codes, and may have what trained them: all but one size's is left there.
"""

from pathlib import Path

import torch

from cogview.config import require
from cogview.published.inert import Stored
from cogview.published.torch_file import TorchFile
from cogview.tokenizers.icetk import RATES, IcetkConfig, IcetkTokenizer

_MODULE = "module"


def holds(file: TorchFile) -> bool:
    """Whether it is laid out so: tensors by name in "module", where CogView's file has them at once."""
    return isinstance(file.content, dict) and isinstance(file.content.get(_MODULE), dict)


def read(path: Path, downsample: int = 8) -> IcetkTokenizer:
    """The tokenizer of a file, in float32. downsample: pixels of a side to a code, 4, 8 or 16; CogView2 takes 8.

    ValueError in one sentence where the file is of another kind, or these networks are not whole in it."""
    require(downsample in RATES, "downsample", "4, 8 or 16", downsample)
    file = TorchFile(path)
    if not holds(file):
        raise ValueError(f"{path} is no image tokenizer of CogView2: expected tensors by name in {_MODULE!r}, got none")
    halvings = RATES.index(downsample)
    decoder = f"decs.{2 - halvings}."
    own = ("enc.", "quantize.proj.", "quantize.embed.", decoder, *(f"down_samplers.{i}." for i in range(halvings)))
    everything = file.content[_MODULE].items()
    module = {name: value for name, value in everything if isinstance(name, str) and name.startswith(own)}
    stored = file.named(module, "image tokenizer")
    model = IcetkTokenizer.without_weights(_config(path, stored, decoder, downsample))
    found = file.all_of(model.state_dict(), stored)
    # copies, since what is mapped would change with the file
    found = {k: v.to(torch.float32, memory_format=torch.contiguous_format, copy=True) for k, v in found.items()}
    model.load_state_dict(found, assign=True)
    return model


def _config(path: Path, stored: dict[str, Stored], decoder: str, downsample: int) -> IcetkConfig:
    """Sizes as the codebook and the convolutions have them."""

    def shape(name: str, sides: int) -> list[int]:
        got = stored[name].shape if name in stored else "absent"
        if isinstance(got, str) or len(got) != sides:
            raise ValueError(f"{path}: {name}: expected {sides} dimensions, got {got}")
        return got

    def blocks(of: str) -> int:
        return sum(name.startswith(f"{of}.block.") and name.endswith(".conv1.weight") for name in stored)

    codes, dim = shape("quantize.embed.weight", 2)
    latent = shape("quantize.proj.weight", 4)[1]
    widths = tuple(shape(f"enc.down.{i}.block.0.conv1.weight", 4)[0] for i in range(3))
    of_encoder, of_decoder = blocks("enc.down.0"), blocks(f"{decoder}up.0")
    try:
        return IcetkConfig(codes, dim, latent, widths, of_encoder, of_decoder, downsample)
    except ValueError as error:
        raise ValueError(f"{path} is no image tokenizer of CogView2: {error}") from error
