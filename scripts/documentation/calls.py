"""A small call of every operator that has kernels, and one with each of its options."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import cogview_ops


class Call(NamedTuple):
    name: str
    shapes: dict[str, tuple[int, ...]]  # of floating-point arguments; -1 is head_dim
    always: dict[str, Any]  # what a call cannot do without
    options: dict[str, dict[str, Any]]  # by what the table says; tuples of "shape" are tensors to be made

    @property
    def has_heads(self) -> bool:
        return any(-1 in shape for shape in self.shapes.values())

    def run(self, dtype: torch.dtype, head_dim: int, impl: str, options: dict[str, Any]) -> tuple[Tensor, ...]:
        def tensor(shape: tuple[int, ...], of: torch.dtype = dtype) -> Tensor:
            sizes = [head_dim if n == -1 else n for n in shape]
            gradient = not self.name.endswith("_decode")
            return torch.full(sizes, 0.5, dtype=of).requires_grad_(gradient)

        def value(given: Any) -> Any:
            if isinstance(given, Floats):
                return tensor(given.shape, given.dtype or dtype)
            return torch.tensor(given.values, dtype=given.dtype) if isinstance(given, Values) else given

        given = {name: tensor(shape) for name, shape in self.shapes.items()}
        given |= {name: value(x) for name, x in (self.always | options).items()}
        out = getattr(cogview_ops, self.name)(**given, impl=impl)
        return out if isinstance(out, tuple) else (out,)


class Floats(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None  # None: as all others


class Values(NamedTuple):
    values: Any
    dtype: torch.dtype = torch.int32


def attention(batch: int, queries: int, keys: int, names: str = "query key value") -> dict[str, tuple[int, ...]]:
    query, key, value = names.split()
    return {query: (batch, 2, queries, -1), key: (batch, 2, keys, -1), value: (batch, 2, keys, -1)}


CACHE = "query key_cache value_cache"
NORM = {"weight": (64,)}
STEP: dict[str, tuple[int, ...]] = {"branch": (2, 3, 64), "residual": (2, 3, 64)}
DROPS = {"dropout_p": 0.1, "seed": 1}
THREE_REGION = {"return_lse": {"return_lse": True}, "scale": {"scale": 0.1}, "pivot_bias": {"pivot_bias": 1.0}}
THREE_REGION["block_size, window_blocks: any"] = {"block_size": 3, "window_blocks": 1}
GROUPED = {"grouped queries": {"key": Floats((1, 1, 192, -1)), "value": Floats((1, 1, 192, -1))}}
PREFIX = {"prefix_key": Floats((1, 2, 5, -1)), "prefix_value": Floats((1, 2, 5, -1))}
COARSE: dict[str, Any] = {"coarse_key": Floats((1, 2, 48, -1)), "coarse_value": Floats((1, 2, 48, -1))}
COARSE |= {"coarse_grid": (6, 8), "coarse_kernel_size": (3, 3)}
LOCAL: dict[str, dict[str, Any]] = {
    "dilation": {"dilation": 2},
    'edge="shift"': {"edge": "shift"},
    "raster_causal": {"raster_causal": True},
    "even windows": {"kernel_size": (4, 4)},
    "windows of 19 columns": {"kernel_size": (3, 19)},
    "bias": {"bias": Floats((2, 9, 9))},
    "bias in float32": {"bias": Floats((2, 9, 9), torch.float32)},
    "key_mask": {"key_mask": Values([[True] * 191 + [False]], torch.bool)},
    "prefix_key, prefix_value": PREFIX,
    "prefix_mask": PREFIX | {"prefix_mask": Values([[True] * 4 + [False]], torch.bool)},
    "prefix_bias": PREFIX | {"prefix_bias": 1.0},
    "coarse_key, coarse_value": COARSE,
    "coarse_bias": COARSE | {"coarse_bias": 1.0},
    "scale": {"scale": 0.1},
}
PACKED = dict.fromkeys(("query", "key", "value"), (192, 2, -1))
STEPS: dict[str, dict[str, Any]] = {
    'norms="pre"': {"norms": "pre"},
    'norms="post"': {"norms": "post"},
    "eps": {"eps": 1e-3},
    "weight_offset": {"weight_offset": 1.0},
    "branch_scale, a number": {"branch_scale": 0.5},
    "branch_scale, a tensor": {"branch_scale": Floats((2, 1, 1))},
    "residual in float32": {"residual": Floats((2, 3, 64), torch.float32)},
    "dropout_p": DROPS,
    "dropout_after_norm": DROPS | {"dropout_after_norm": True},
    "a seed for each sample": DROPS | {"seed": Values([1, 2], torch.int64)},
}
RELAX = {'relax="tensor"': {"relax": "tensor"}, "relax=None": {"relax": None}}
ROUND = {"round_before_weight": {"round_before_weight": True}}

CALLS = {
    call.name: call
    for call in (
        Call("pb_relax_softmax", {"scores": (2, 5, 64)}, {}, {
            "alpha": {"alpha": 8.0},
            "causal": {"causal": True},
            "mask": {"mask": Values([[True] * 60 + [False] * 4], torch.bool)},
        }),
        Call("layer_norm", {"x": (3, 64)} | NORM, {}, {
            "eps": {"eps": 1e-3}, "bias": {"bias": Floats((64,))}, "weight_offset": {"weight_offset": 1.0}, **RELAX,
        }),
        Call("rms_norm", {"x": (3, 64)} | NORM, {}, {
            "eps": {"eps": 1e-3}, "weight_offset": {"weight_offset": 1.0}, **ROUND,
        }),
        Call("sandwich_layer_norm", STEP, {}, STEPS | RELAX),
        Call("sandwich_rms_norm", STEP, {}, STEPS | ROUND),
        Call("linear_decode", {"x": (2, 64), "weight": (8, 64)}, {}, {
            "bias": {"bias": Floats((8,))},
            "scale, with an int8 weight": {
                "weight": Values([[1] * 64] * 8, torch.int8), "scale": Floats((8,), torch.float32)
            },
        }),
        Call("three_region_attention", attention(1, 192, 192), {"pivots": Values([[0, 1, 70]])},
             THREE_REGION | GROUPED),
        Call("three_region_attention_varlen", PACKED, {
            "pivots": Values([[0, 1], [0, -1]]), "cu_seqlens": Values([0, 100, 192])
        }, THREE_REGION | {"max_seqlen": {"max_seqlen": 100}}),
        Call("three_region_attention_decode", attention(2, 1, 192, CACHE), {
            "pivots": Values([[0, 1, 70]] * 2), "cache_seqlens": Values([100, 192])
        }, THREE_REGION | {"cache_leftpad": {"cache_leftpad": Values([3, 0])}}),
        Call("local_attention_2d", attention(1, 192, 192), {"grid": (12, 16), "kernel_size": (5, 5)},
             LOCAL | GROUPED | {"return_lse": {"return_lse": True}}),
        Call("local_attention_2d_decode", attention(1, 1, 192, CACHE), {
            "grid": (12, 16), "kernel_size": (5, 5), "cache_seqlens": Values([192])
        }, LOCAL | {
                'edge="shift"': {"edge": "shift", "raster_causal": False},
                "query_index": {"query_index": Values([[7]]), "raster_causal": False},
             }),
    )
}  # fmt: skip
