"""Published codecs as image tokenizers: codes and pictures are those of the libraries' own models, whose weights are
random here; a run with one is tokenized, trained and drawn from like any other."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogview import cli
from cogview.data.shards import ShardWriter
from cogview.data.tokens import TokenDataset
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.system import System
from cogview.tokenizers import codec_folder
from cogview.tokenizers.image import VQVAE, VQConfig
from cogview.tokenizers.load import load_image_tokenizer
from cogview.tokenizers.published_codec import PublishedCodec
from cogview.tokenizers.text import TextTokenizer

transformers: Any = pytest.importorskip("transformers")
diffusers: Any = pytest.importorskip("diffusers")

NETWORK: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 4}
JANUS = NETWORK | {"num_embeddings": 20, "latent_channels": 8, "num_patches": 4}
EMU3 = NETWORK | {"codebook_size": 24, "latent_channels": 4, "attn_resolutions": [1], "hidden_size": 32}
VQ: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 32, 32),
    "norm_num_groups": 4,
    "num_vq_embeddings": 18,
    "vq_embed_dim": 5,
}


def spread_out(model: Any) -> Any:
    """Codes that pictures use many of, however random the weights are: those of some of them."""
    with torch.no_grad():
        size = model.quantize.embedding.weight.shape[1]
        for name, value in model.named_parameters():
            if name.startswith("quant_conv"):
                value.mul_(3)
        model.quantize.embedding.weight.copy_(torch.randn(len(model.quantize.embedding.weight), size))
    return model.eval()


def janus(**change: Any) -> Any:
    torch.manual_seed(0)
    return spread_out(transformers.JanusVQVAE(transformers.JanusVQVAEConfig(**JANUS | change)))


def emu3(**change: Any) -> Any:
    torch.manual_seed(0)
    return spread_out(transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**EMU3 | change)))


def vq(**change: Any) -> Any:
    torch.manual_seed(0)
    return spread_out(diffusers.VQModel(**VQ | change))


def of_janus(model: Any, images: Tensor) -> Tensor:
    return model(images).decoded_pixel_values


def of_emu3(model: Any, images: Tensor) -> Tensor:
    """As a film of equal frames, of which the first comes back."""
    frames = images[:, None].expand(-1, model.config.temporal_downsample_factor, -1, -1, -1)
    codes = torch.stack(model.encode(frames, [images.shape[2:]] * len(images)).image_tokens)
    return model.decode(codes)[:, 0]


def of_vq(model: Any, images: Tensor) -> Tensor:
    return model(images).sample
