"""DALL-E's attention (arXiv 2102.12092, appendix B.1): a layer of each kind, and those of a whole model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import dalle_attention, patterns
from . import baselines, dalle_baselines
from .problems import Contestant, Problem, check_tokens, flex, self_attention


def dalle(
    dtype: torch.dtype, back: bool, *, kind="row", wrap=False, heads=16, text=256, grid=(32, 32), dim=64
) -> Problem:
    """A layer. DALLE-pytorch's rows do not wrap, and its convolution is the square of 5 up to the token: 25 keys of the
    image, where ours, DALL-E's of 11, has up to 61. Its models can have no other size."""
    seqlen = text + grid[0] * grid[1]
    check_tokens(seqlen)
    how: dict[str, Any] = {"kind": kind, "wrap": wrap, "text_len": text, "grid": grid, "kernel_size": 11}
    i = torch.arange(seqlen)
    mask = patterns.dalle(i[:, None], i, **how)
    same: dict[str, Contestant] = {
        "vanilla": baselines.vanilla_attention(mask),
        "masked SDPA": baselines.sdpa(mask),
        "FlexAttention": flex(lambda b, h, i, j: patterns.dalle(i, j, **how), dtype, back, seqlen),
    }
    other: dict[str, Contestant] = {"causal SDPA": baselines.sdpa(causal=True)}
    if kind == "convolutional":
        other["DALLE-pytorch"] = dalle_baselines.convolutional(text, grid)
    else:
        (other if wrap else same)["DALLE-pytorch"] = dalle_baselines.axial(kind, text, grid)
    op = partial(dalle_attention, **how)
    return self_attention(op, int(mask.sum()), (heads, seqlen, dim), same, other, dtype, back)


def kinds(layers: int) -> list[str]:
    """Of DALL-E's layers 1 to `layers`."""
    before = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)]
    return [*before, "convolutional"]


def dalle_schedule(dtype: torch.dtype, back: bool, *, layers=8, **sizes: Any) -> Problem:
    """The attentions of a model's layers, each on queries, keys and values of its own, as its projections would give
    them: all forward, and then all backward, so that what each keeps for it is there at once. Rows do not wrap, so that
    DALLE-pytorch's rows and columns are the same as ours; its last layer sees fewer keys (`dalle`)."""
    layer = {kind: dalle(dtype, back, kind=kind, **sizes) for kind in dict.fromkeys(kinds(layers))}
    each = [layer[kind] for kind in kinds(layers)]
    same, other = ("vanilla", "masked SDPA", "FlexAttention"), ("causal SDPA", "DALLE-pytorch")
    found = {name: [(x.baselines | x.others)[name] for x in each] for name in (*same, *other)}
    return Problem(
        tuple(torch.randn_like(x) for problem in each for x in problem.inputs),
        in_turn([problem.ours for problem in each]),
        {name: all_or_none(found[name]) for name in same},
        {name: all_or_none(found[name]) for name in other},
        bytes=sum(problem.bytes for problem in each),
        flops=sum(problem.flops for problem in each),
        exps=sum(problem.exps for problem in each),
        tokens=each[0].tokens,
        sample=each[0].sample,
    )


def all_or_none(layers: Sequence[Contestant]) -> Contestant:
    """None of them, where one is left out."""
    return next((layer for layer in layers if isinstance(layer, str)), None) or in_turn(layers)


def in_turn(layers: Sequence[Any]) -> Callable[..., tuple[Tensor, ...]]:
    """All outputs of attentions that are called one after the other, each with three of the tensors."""

    def outputs(*tensors: Tensor, **how: Any) -> tuple[Tensor, ...]:
        inputs = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
        return tuple(layer(*qkv, **how) for layer, qkv in zip(layers, inputs, strict=True))

    return outputs
