"""What is taken as a number, and what is said of those that are none, are too large, or are sizes in another order."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogview_ops import (
    cogview2_attention,
    dalle_attention,
    dalle_attention_decode,
    layer_norm,
    linear_decode,
    local_attention_2d,
    local_attention_2d_decode,
    merge_attentions,
    modules,
    pb_relax_attention,
    pb_relax_softmax,
    sample_pivots,
    sandwich_layer_norm,
    three_region_attention,
    three_region_attention_decode,
    three_region_attention_varlen,
)

Q = torch.randn(2, 4, 16, 8)
PIVOTS, ENDS = torch.tensor([[0, 1], [0, 1]]), torch.tensor([16, 9])
WEIGHTS = dict.fromkeys(("post_weight", "post_bias", "pre_weight", "pre_bias"), torch.ones(8))
QKV, CACHES = {"query": Q, "key": Q, "value": Q}, {"query": Q[:, :, :2], "key_cache": Q, "value_cache": Q}
SETS = {"prefix_key": Q, "prefix_value": Q, "prefix_bias": -0.5, "coarse_key": Q[:, :, :4], "coarse_value": Q[:, :, :4],
        "coarse_grid": (2, 2), "coarse_kernel_size": (1, 3), "coarse_bias": 0.5}  # fmt: skip
WINDOW = {"grid": (4, 4), "kernel_size": (3, 1), "dilation": 1, "scale": 0.3, **SETS}
SEQUENCE = {"text_len": 4, "grid": (3, 4), "scale": 0.3}
REGIONS = {"pivots": PIVOTS, "block_size": 4, "window_blocks": 1, "pivot_bias": 0.5, "scale": 0.3}
PACKED = {**dict.fromkeys(QKV, Q[0].transpose(0, 1)), "cu_seqlens": torch.tensor([0, 5, 16]), "max_seqlen": 12}
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    cogview2_attention: {**QKV, **SEQUENCE, "kernel_size": (3, 1)},
    dalle_attention: {**QKV, **SEQUENCE, "kind": "convolutional", "kernel_size": 3},
    dalle_attention_decode: {**CACHES, **SEQUENCE, "kind": "column", "kernel_size": 3, "cache_seqlens": ENDS},
    layer_norm: {"x": Q, "weight": torch.ones(8), "bias": torch.ones(8), "eps": 0.25},
    linear_decode: {"x": Q, "weight": torch.ones(3, 8), "bias": torch.ones(3)},
    local_attention_2d: {**QKV, **WINDOW},
    local_attention_2d_decode: {**CACHES, **WINDOW, "cache_seqlens": ENDS},
    pb_relax_attention: {**QKV, "alpha": 8.0, "scale": 0.3},
    pb_relax_softmax: {"scores": Q, "alpha": 8.0},
    sample_pivots: {"text_mask": torch.ones(2, 4) > 0, "image_mask": torch.ones(2, 4) < 0, "num_pivots": 6},
    sandwich_layer_norm: {"branch": Q, "residual": Q, **WEIGHTS, "eps": 0.25, "dropout_p": 0.5, "seed": 5},
    three_region_attention: {**QKV, **REGIONS},
    three_region_attention_decode: {**CACHES, **REGIONS, "cache_seqlens": ENDS, "cache_leftpad": torch.tensor([0, 3])},
    three_region_attention_varlen: {**PACKED, **REGIONS},
}
MODULES: dict[Callable[..., Any], dict[str, Any]] = {
    modules.KVCache: {"batch_size": 2, "num_kv_heads": 2, "max_tokens": 3, "head_dim": 4},
    modules.LocalAttention2d: {
        "embed_dim": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
        **{k: x for k, x in WINDOW.items() if not isinstance(x, Tensor)},
    },
    modules.PBRelaxLayerNorm: {"dim": 8, "eps": 0.25},
    modules.PBRelaxSoftmax: {"alpha": 8.0},
    modules.SandwichLayerNorm: {"dim": 8, "eps": 0.25, "dropout_p": 0.5},
    modules.ThreeRegionAttention: {
        "embed_dim": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
        **{k: x for k, x in REGIONS.items() if not isinstance(x, Tensor)},
    },
}  # fmt: skip
BOTH = pytest.mark.parametrize("function", [*CALLS, *MODULES], ids=lambda f: f.__name__)


def as_numpy(x: Any) -> Any:
    """Numbers as NumPy's: 0.5 is exact in all of them."""
    if type(x) is tuple:
        return tuple(map(as_numpy, x))
    if type(x) is int:
        return np.int64(x)
    return np.float32(x) if type(x) is float else x


def numbers_of(arguments: dict[str, Any]) -> dict[str, int | float | tuple[int, ...]]:
    return {name: x for name, x in arguments.items() if type(x) in (int, float, tuple)}


def tensors(x: Any) -> list[Tensor]:
    return list(x) if isinstance(x, tuple) else [x]


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_numbers_of_numpy(function: Callable[..., Any]) -> None:
    """One after the other, and all at once; compiled they interrupt the graph, as they do in torch's operators."""
    plain = {name: np.float32(x).item() if type(x) is float else x for name, x in CALLS[function].items()}
    expected = tensors(function(**plain))
    for name in numbers_of(plain):
        assert all(map(torch.equal, tensors(function(**{**plain, name: as_numpy(plain[name])})), expected)), name
    given = {name: as_numpy(x) for name, x in plain.items()}
    assert all(map(torch.equal, tensors(function(**given)), expected))
    if function in (pb_relax_softmax, three_region_attention):
        torch._dynamo.reset()
        compiled = torch.compile(lambda: function(**given), backend="eager")
        assert all(map(torch.equal, tensors(compiled()), expected))


@pytest.mark.parametrize("function", MODULES, ids=lambda f: f.__name__)
def test_modules_hold_numbers_of_python(function: Callable[..., Any]) -> None:
    """So that they compile as one graph, and their representation is what one would write."""
    held = function(**{name: as_numpy(x) for name, x in MODULES[function].items()})
    assert "np." not in repr(held)
    assert "int64" not in str(vars(held))
    if function is modules.ThreeRegionAttention:
        y = torch.compile(held, fullgraph=True, backend="eager")(Q[:, 0], PIVOTS)
        assert torch.equal(y, held(Q[:, 0], PIVOTS))


@BOTH
def test_what_is_no_number(function: Callable[..., Any]) -> None:
    arguments = {**CALLS, **MODULES}[function]
    for name, x in numbers_of(arguments).items():
        for wrong in (True, np.True_, "3", torch.tensor(3), 1j):
            if name == "seed" and isinstance(wrong, Tensor):
                continue
            value = (wrong, wrong) if isinstance(x, tuple) else wrong
            with pytest.raises((TypeError, ValueError), match=rf"^({name}|coarse_\w+): expected .+, got .+"):
                function(**{**arguments, name: value})


@BOTH
def test_numbers_that_no_kernel_can_hold(function: Callable[..., Any]) -> None:
    arguments = {**CALLS, **MODULES}[function]
    for name, x in numbers_of(arguments).items():
        for huge in (2**63, 2**64, 2**70) if type(x) is not float else (1e39, -1e39, 10**40, np.float64(1e300)):
            value = (huge, 1) if isinstance(x, tuple) else huge
            with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+"):
                function(**{**arguments, name: value})


def test_alpha_at_its_limits() -> None:
    """Equal scores are equal where alpha can be held; where it cannot, nothing is computed."""
    for dtype, least, most in ((torch.float16, 1.2e-38, 1.7e38), (torch.float32, 1.2e-38, 1.7e38),
                               (torch.float64, 2.3e-308, 8.9e307)):  # fmt: skip
        for alpha in (least, most, Fraction(1, 3)):
            for impl in ("auto", "reference"):
                p = pb_relax_softmax(torch.ones(3, 4, dtype=dtype), alpha=alpha, impl=impl)  # type: ignore[arg-type]
                assert torch.equal(p, torch.full_like(p, 0.25))
        for alpha in (least / 10, most * 2, 5e-324):
            with pytest.raises(ValueError, match=r"^alpha: expected a number from [\d.e+-]+ to [\d.e+-]+, got "):
                pb_relax_softmax(torch.ones(3, 4, dtype=dtype), alpha=alpha)
    flat = torch.ones(3, 8)
    for eps, fails in ((1.2e-38, False), (1e-46, True)):
        if fails:
            with pytest.raises(ValueError, match=r"^eps: expected a number from"):
                layer_norm(flat, flat[0], flat[0], eps=eps)
        else:
            assert torch.equal(layer_norm(flat, flat[0], flat[0], eps=eps), flat)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1])
def test_blocks_as_large_as_integers_go(size: int) -> None:
    causal = torch.nn.functional.scaled_dot_product_attention(Q, Q, Q, is_causal=True)
    for blocks in ({"block_size": size, "window_blocks": 3}, {"block_size": 3, "window_blocks": size}):
        torch.testing.assert_close(three_region_attention(Q, Q, Q, PIVOTS, **blocks), causal)  # type: ignore[arg-type]


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name", "most"),
    [
        ({"kernel_size": (9, 3)}, "kernel_size", (7, 9)),
        ({"kernel_size": (3, 11)}, "kernel_size", (7, 9)),
        ({"kernel_size": (9, 3), "dilation": 2}, "kernel_size", (3, 5)),
        ({"kernel_size": (3, 5), "dilation": (1, 4)}, "kernel_size", (7, 3)),
        ({"kernel_size": (5, 3), "edge": "shift"}, "kernel_size", (4, 5)),
        ({"kernel_size": (3, 3), "edge": "shift", "dilation": 2}, "kernel_size", (2, 2)),
        ({"kernel_size": (1, 1), "coarse_grid": (2, 5), "coarse_kernel_size": (5, 1)}, "coarse_kernel_size", (3, 9)),
    ],
)
def test_window_larger_than_the_image(options: dict[str, Any], name: str, most: tuple[int, int]) -> None:
    """What the message gives as the largest is taken, and one step more is not."""
    q = torch.randn(1, 1, 20, 8)
    call = {"grid": (4, 5), **options}
    if "coarse_grid" in options:
        call |= dict.fromkeys(("coarse_key", "coarse_value"), q[:, :, :10])
    with pytest.raises(ValueError, match=rf"^{name}: expected at most \({most[0]}, {most[1]}\)"):
        local_attention_2d(q, q, q, **call)
    local_attention_2d(q, q, q, **{**call, name: most})
    for larger in ((most[0] + 1, most[1]), (most[0], most[1] + 1)):
        with pytest.raises(ValueError, match=rf"^{name}: expected at most"):
            local_attention_2d(q, q, q, **{**call, name: larger})


def test_one_window_for_images_of_several_sizes() -> None:
    for height, width in ((1, 1), (2, 7), (6, 3)):
        q = torch.randn(1, 1, height * width, 8)
        kernel = min(9, 2 * height - 1), min(5, 2 * width - 1)
        everything = 2 * height - 1, 2 * width - 1
        out = local_attention_2d(q, q, q, grid=(height, width), kernel_size=kernel)
        if kernel == everything:
            torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
    with pytest.raises(ValueError, match=r"^dilation: expected at most the grid \(6, 3\) with edge 'shift', got"):
        local_attention_2d(q, q, q, grid=(6, 3), kernel_size=(1, 1), dilation=4, edge="shift")


# --- layout ----------------------------------------------------------------------------------------------------------

HEADS_LAST, GROUPED = torch.randn(2, 16, 4, 8), torch.randn(2, 16, 2, 8)
FAR = torch.tensor([[0, 9], [0, 9]])
SWAPPED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    *((f, dict.fromkeys(("query", "key", "value"), HEADS_LAST), "query|key") for f in (
        cogview2_attention, dalle_attention, local_attention_2d)),
    *((f, {"query": HEADS_LAST, "key": GROUPED, "value": GROUPED}, "query|key") for f in (
        cogview2_attention, dalle_attention, local_attention_2d, three_region_attention)),
    *((f, {"query": HEADS_LAST[:, :1], "key_cache": x, "value_cache": x}, "key_cache")
      for x in (HEADS_LAST, GROUPED)
      for f in (dalle_attention_decode, local_attention_2d_decode, three_region_attention_decode)),
    *((f, dict.fromkeys(("key_cache", "value_cache"), HEADS_LAST), "key_cache")
      for f in (dalle_attention_decode, local_attention_2d_decode, three_region_attention_decode)),
    (three_region_attention, {**dict.fromkeys(("query", "key", "value"), HEADS_LAST), "pivots": FAR}, "query"),
    (local_attention_2d, {"query": HEADS_LAST}, "query"),
    (local_attention_2d, {"key": HEADS_LAST, "value": HEADS_LAST}, "key"),
    (local_attention_2d, {"value": HEADS_LAST}, "value"),
    (local_attention_2d, dict.fromkeys(("prefix_key", "prefix_value"), HEADS_LAST), "prefix_key"),
    (local_attention_2d, dict.fromkeys(("coarse_key", "coarse_value"), HEADS_LAST[:, :4, :1]), "coarse_key"),
    (pb_relax_attention, {**dict.fromkeys(("query", "key", "value"), HEADS_LAST),
                          "mask": torch.ones(16, 16) > 0}, "query"),
    (merge_attentions, {"outputs": [HEADS_LAST], "lses": [HEADS_LAST.sum(-1).mT]}, "its output"),
    (modules.KVCache(2, 4, 16, 8).append, dict.fromkeys(("key", "value"), HEADS_LAST[:, :3]), "key"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "swapped", "name"), SWAPPED)
def test_tokens_before_heads(function: Callable[..., Any], swapped: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"; ({name}) should be \[B, H, S, D\], and its shape .+ \[B, S, H, D\]$"):
        function(**{**CALLS.get(function, {}), **swapped})


def test_other_mistakes_are_not_taken_for_it() -> None:
    for function, wrong in (
        (local_attention_2d, {"grid": (4, 5)}),
        (local_attention_2d, {"query": Q[:, :, 1:]}),
        (three_region_attention, {"key": Q[:, :, 1:], "value": Q[:, :, 1:]}),
        (three_region_attention, {"key": Q[:, :3], "value": Q[:, :3]}),
        (three_region_attention, {"pivots": torch.tensor([[0, 99], [0, 99]])}),
        (pb_relax_attention, {"mask": torch.ones(16, 7) > 0}),
    ):
        with pytest.raises(ValueError, match=r"^\w+: expected [^;]+, got [^;]+$"):
            function(**{**CALLS[function], **wrong})
