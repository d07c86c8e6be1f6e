"""Released image tokenizers, read as ours, whose names are the same: CogView's, vqvae_hard_biggerset_011.pt, and
CogView2's, ice_image.pt."""

from pathlib import Path

import torch

from cogview.published import icetk
from cogview.published.inert import Stored
from cogview.published.torch_file import TorchFile
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.image_tokenizer import ImageTokenizer

_PREFIX = "module."
_CODEBOOK, _FIRST = "quantize_t.embed", "enc_b.blocks.0.weight"


def read_image_tokenizer(path: Path) -> ImageTokenizer:
    """That of CogView or of CogView2, by what is in the file."""
    return icetk.read(path) if icetk.holds(TorchFile(path)) else read_vqvae(path)


def read_vqvae(path: Path) -> VQVAE:
    """The tokenizer of a file of tensors by name, all of them with or without "module." before it, in float32."""
    file = TorchFile(path)
    stored = file.named(file.content, "image tokenizer")
    if all(name.startswith(_PREFIX) for name in stored):
        stored = {name.removeprefix(_PREFIX): value for name, value in stored.items()}
    config = _config(path, stored)
    with torch.device("meta"):
        wanted = VQVAE(config).state_dict()
    found = file.all_of(wanted, stored)
    model = VQVAE(config)
    model.load_state_dict(found)
    return model.eval()


def _config(path: Path, stored: dict[str, Stored]) -> VQConfig:
    """Sizes as the codebook and the first convolution have them; a halving for each but the last of the encoder."""
    for name, sides in ((_CODEBOOK, 2), (_FIRST, 4)):
        got = stored[name].shape if name in stored else "absent"
        if name not in stored or len(got) != sides:
            raise ValueError(f"{path}: {name}: expected {sides} dimensions, got {got}")
    convolutions = sum(name.startswith("enc_b.") and name.endswith(".weight") for name in stored)
    (dim, count), (hidden, channels, *_) = stored[_CODEBOOK].shape, stored[_FIRST].shape
    try:
        return VQConfig(count, dim, hidden, channels, downsample=1 << min(convolutions - 1, 30))
    except ValueError as error:
        raise ValueError(f"{path} is no image tokenizer of CogView: {error}") from error
