"""What `python -m cogview_ops.bench` can time: the operators and their variants."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .._manifest import OPERATORS as MANIFEST
from .dalle_problems import dalle
from .problems import (
    Problem,
    cogview2,
    cross_resolution,
    local_2d,
    local_2d_bias,
    local_2d_decode,
    neighborhood,
    three_region,
    three_region_decode,
    three_region_varlen,
    upsampling,
)
from .row_problems import add_layer_norm, layer_norm, linear, rms_norm, sandwich, sandwich_rms, softmax


class Timed(NamedTuple):
    build: Callable[..., Problem]
    about: str
    sizes: tuple[str, ...] = ()  # what the numbers of 16x4224x64 are, in this order; a grid is two of them
    sweep: tuple[str, ...] = ()  # shapes of an example


_IMAGE = ("heads", "grid", "dim")
_ROWS = ("rows", "dim")
TIMED = {
    "cogview2_attention": Timed(cogview2, "CogView2's super-resolution over text, coarse and fine image"),
    "dalle_attention": Timed(dalle, "DALL-E's layers: kind=row, column or convolutional"),
    "layer_norm": Timed(layer_norm, "with PB-relax", _ROWS, ("8704x2560",)),
    "linear_decode": Timed(linear, "F.linear of few rows, on CPUs", ("rows", "out", "dim"), ("1x16384x4096",)),
    "local_attention_2d": Timed(local_2d, "windows that end at the edges", _IMAGE, ("8x32x32x64", "8x64x64x64")),
    "local_attention_2d-bias": Timed(local_2d_bias, "with a table by relative position", _IMAGE, ("8x56x56x32",)),
    "local_attention_2d-coarse": Timed(cross_resolution, "raster-causal, and windows in a coarse image", _IMAGE),
    "local_attention_2d-shift": Timed(neighborhood, "windows that move inward, NATTEN's", _IMAGE, ("8x56x56x32",)),
    "local_attention_2d-upsample": Timed(upsampling, "fine queries, coarse keys alone", _IMAGE, ("4x64x64x64",)),
    "local_attention_2d_decode": Timed(local_2d_decode, "the next token against its caches", _IMAGE, ("16x64x64x64",)),
    "pb_relax_softmax": Timed(softmax, "of scores", ("heads", "seqlen", "seqlen"), ("16x1088x1088",)),
    "rms_norm": Timed(rms_norm, "Gemma's", _ROWS, ("2048x4096",)),
    "sandwich_layer_norm": Timed(sandwich, "norm, addition, norm", _ROWS, ("8704x2560",)),
    "sandwich_layer_norm-pre": Timed(add_layer_norm, "addition, norm: GPT-2's, ViT's", _ROWS, ("8704x2560",)),
    "sandwich_rms_norm": Timed(
        partial(sandwich_rms, norms="both"), "norm, addition, norm: Gemma's", _ROWS, ("2048x4096",)
    ),
    "sandwich_rms_norm-post": Timed(partial(sandwich_rms, norms="post"), "norm, addition: OLMo 2's", _ROWS),
    "sandwich_rms_norm-pre": Timed(partial(sandwich_rms, norms="pre"), "addition, norm: Llama's", _ROWS),
    "three_region_attention": Timed(
        three_region, "a window and pivots", ("heads", "seqlen", "dim"), ("4x2048x64", "4x4096x64", "4x8192x64")
    ),
    "three_region_attention_decode": Timed(three_region_decode, "the next token of each sequence against its cache"),
    "three_region_attention_varlen": Timed(three_region_varlen, "packed sequences"),
}


def operator(name: str) -> str:
    """Without its variant."""
    return name.partition("-")[0]


def differentiable(name: str) -> bool:
    return MANIFEST[operator(name)].differentiable
