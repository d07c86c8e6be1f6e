"""torch.compile: sizes are symbolic, so that few graphs serve all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import python
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import cogview_ops
from cogview_ops import modules
from cogview_ops._manifest import OPERATORS

Call = tuple[Callable[..., Any], dict[str, Any]]
SIZES = range(6)


def heads(batch: int, tokens: int, num_heads: int = 2) -> Tensor:
    return torch.randn(batch, num_heads, tokens, 8)


def qkv(batch: int, tokens: int, new: int | None = None) -> dict[str, Tensor]:
    """Of a decode with the number of its new tokens."""
    query = heads(batch, tokens if new is None else new, 4)
    names = ("key", "value") if new is None else ("key_cache", "value_cache")
    return {"query": query, **{name: heads(batch, tokens) for name in names}}


def ends(batch: int, tokens: int) -> Tensor:
    return torch.full((batch,), tokens)


def lengths(k: int) -> tuple[int, ...]:
    """Of more and more sequences."""
    return 0, *(9 + 2 * n for n in range(3 + k)), 0


def packed(k: int) -> dict[str, Tensor]:
    total = sum(lengths(k))
    names = {"query": 4, "key": 2, "value": 2}
    ends = torch.tensor((0, *lengths(k))).cumsum(0)
    return {"cu_seqlens": ends, **{name: torch.randn(total, n, 8) for name, n in names.items()}}


def some_pivots(batch: int, tokens: int, number: int) -> Tensor:
    return torch.rand(batch, tokens).topk(number).indices.sort().values


def grid_of(k: int) -> tuple[int, int]:
    return 12 - k, 6 + 2 * k


def attention_on_grid(k: int, text: int = 0, coarse: int = 0, new: int | None = None) -> dict[str, Any]:
    grid = grid_of(k)
    return {**qkv(3 + k, text + coarse + grid[0] * grid[1], new), "grid": grid}


def sets(k: int) -> dict[str, Any]:
    """A prefix and a coarse grid, of sizes of their own."""
    keys = {name: heads(3 + k, 10 + k) for name in ("prefix_key", "prefix_value")}
    grid = (12 - k, 3 + k)
    keys |= {name: heads(3 + k, grid[0] * grid[1]) for name in ("coarse_key", "coarse_value")}
    return {**keys, "coarse_grid": grid, "coarse_kernel_size": (3, 3), "prefix_mask": torch.rand(3 + k, 10 + k) > 0.3}


def norm_weights(*names: str) -> dict[str, Tensor]:
    return {name: torch.randn(8) for name in names}


ATTENTION = modules.ThreeRegionAttention(16, 2, block_size=4, window_blocks=2)
LOCAL = modules.LocalAttention2d(16, 2, grid=(4, 5), kernel_size=(3, 3), raster_causal=True)
SANDWICH = modules.SandwichLayerNorm(8, dropout_p=0.25)
SANDWICH_RMS = modules.SandwichRMSNorm(8, dropout_p=0.25)


def append(cache: modules.KVCache, key: Tensor, value: Tensor) -> Tensor:
    return cache.append(key, value)


# arguments of every public function and module, of size k: batch, length, grid and all else that may change, do
FUNCTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "cogview2_attention": lambda k: (
        attention_on_grid(k, 5 + k, (12 - k) * (3 + k))
        | {"text_len": 5 + k, "coarse_grid": (12 - k, 3 + k), "text_mask": torch.rand(3 + k, 5 + k) > 0.3}
    ),
    "dalle_attention": lambda k: attention_on_grid(k, 5 + k) | {"text_len": 5 + k, "kind": "convolutional"},
    "dalle_attention_decode": lambda k: (
        attention_on_grid(k, 5 + k, new=3 + k) | {"text_len": 5 + k, "kind": "row", "cache_seqlens": ends(3 + k, 40)}
    ),
    "layer_norm": lambda k: {"x": torch.randn(3 + k, 9 - k, 8), **norm_weights("weight", "bias")},
    "linear_decode": lambda k: {
        "x": torch.randn(3 + k, 9 - k, 5 + k),
        "weight": torch.randint(-9, 9, (7 + k, 5 + k), dtype=torch.int8),
        **{name: torch.randn(7 + k) for name in ("bias", "scale")},
    },
    "local_attention_2d": lambda k: attention_on_grid(k) | sets(k) | {"kernel_size": (5, 3)},
    "local_attention_2d_decode": lambda k: (
        attention_on_grid(k, new=3 + k) | sets(k) | {"kernel_size": (5, 3), "cache_seqlens": ends(3 + k, 40)}
    ),
    "merge_attentions": lambda k: {
        "outputs": [heads(3 + k, 12 - k) for _ in range(2)],
        "lses": [torch.randn(3 + k, 2, 12 - k) for _ in range(2)],
    },
    "pb_relax_attention": lambda k: qkv(3 + k, 12 - k) | {"causal": True},
    "pb_relax_softmax": lambda k: {"scores": torch.randn(3 + k, 9 - k, 5 + k), "mask": torch.rand(5 + k) > 0.3},
    "rms_norm": lambda k: {"x": torch.randn(3 + k, 9 - k, 8), **norm_weights("weight")},
    "sample_pivots": lambda k: {
        "text_mask": (torch.arange(17 + 2 * k) < 4).expand(3 + k, -1),
        "image_mask": (torch.arange(17 + 2 * k) >= 4).expand(3 + k, -1),
        "num_pivots": 20 + k,  # fewer than tokens, and more
    },
    "sandwich_layer_norm": lambda k: {
        **{name: torch.randn(3 + k, 9 - k, 8) for name in ("branch", "residual")},
        **norm_weights("post_weight", "post_bias", "pre_weight", "pre_bias"),
        "dropout_p": 0.25,
        "seed": 2**40 + k,
    },
    "sandwich_rms_norm": lambda k: {
        **{name: torch.randn(3 + k, 9 - k, 8) for name in ("branch", "residual")},
        **norm_weights("post_weight", "pre_weight"),
        "branch_scale": torch.rand(3 + k, 1, 1),
        "dropout_p": 0.25,
        "seed": torch.arange(3 + k),  # of samples
    },
    "three_region_attention": lambda k: (
        qkv(3 + k, 17 + k) | {"pivots": some_pivots(3 + k, 17 + k, 9 - k), "block_size": 4 + k, "window_blocks": 2}
    ),
    "three_region_attention_decode": lambda k: (
        qkv(3 + k, 17 + k, new=3 + k)
        | {"pivots": some_pivots(3 + k, 17 + k, 9 - k), "cache_seqlens": ends(3 + k, 15)}
        | {"cache_leftpad": torch.arange(3 + k), "return_lse": True}
    ),
    "three_region_attention_varlen": lambda k: (
        packed(k)
        | {"pivots": torch.arange(9 - k).repeat(5 + k, 1).where(torch.tensor(lengths(k))[:, None] > 0, -1)}
        | {"max_seqlen": 30 + k, "block_size": 4 + k, "window_blocks": 2}
    ),
}
MODULES: dict[str, Callable[[int], Call]] = {
    "KVCache": lambda k: (
        append,
        {"cache": modules.KVCache(3 + k, 2, 30 + k, 8), "key": heads(3 + k, 12 - k), "value": heads(3 + k, 12 - k)},
    ),
    "LocalAttention2d": lambda k: (LOCAL, {"x": torch.randn(3 + k, 20, 16)}),
    "PBRelaxLayerNorm": lambda k: (SANDWICH.pre, {"input": torch.randn(3 + k, 9 - k, 8)}),
    "PBRelaxSoftmax": lambda k: (modules.PBRelaxSoftmax(), {"scores": torch.randn(3 + k, 9 - k, 5 + k)}),
    "RMSNorm": lambda k: (SANDWICH_RMS.pre, {"input": torch.randn(3 + k, 9 - k, 8)}),
    "SandwichLayerNorm": lambda k: (
        SANDWICH,
        {"branch": torch.randn(3 + k, 9 - k, 8), "residual": torch.randn(3 + k, 9 - k, 8)},
    ),
    "SandwichRMSNorm": lambda k: (
        SANDWICH_RMS,
        {"branch": torch.randn(3 + k, 9 - k, 8), "residual": torch.randn(3 + k, 9 - k, 8)},
    ),
    "ThreeRegionAttention": lambda k: (
        ATTENTION,
        {"x": torch.randn(3 + k, 17 + k, 16), "pivots": some_pivots(3 + k, 17 + k, 9 - k)},
    ),
}
DECODING: dict[str, Callable[[int], Call]] = {
    "LocalAttention2d with a cache": lambda k: (
        LOCAL,
        {"x": torch.randn(3 + k, 3 + k, 16), "cache": LOCAL.make_cache(3 + k)},
    ),
    "ThreeRegionAttention with a cache": lambda k: (
        ATTENTION,
        {
            "x": torch.randn(3 + k, 3 + k, 16),
            "pivots": some_pivots(3 + k, 17, 9),
            "cache": ATTENTION.make_cache(3 + k, 20 + k),
        },
    ),
}
CALLS: dict[str, Callable[[int], Call]] = {
    **{name: lambda k, name=name: (getattr(cogview_ops, name), FUNCTIONS[name](k)) for name in FUNCTIONS},
    **MODULES,
    **DECODING,
}


def test_every_public_name_is_here() -> None:
    assert sorted(FUNCTIONS) == cogview_ops.__all__
    assert sorted(MODULES) == modules.__all__


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def graphs(name: str, dynamic: bool | None, sizes: range = SIZES) -> int:
    """Made for calls of all sizes, the values of each compared with those without compilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    trains = name in OPERATORS and OPERATORS[name].differentiable
    compiled: dict[Any, Any] = {}
    for k in sizes:
        function, arguments = CALLS[name](k)
        if function not in compiled:
            compiled[function] = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
        leaves = [x for x in arguments.values() if trains and isinstance(x, Tensor) and x.is_floating_point()]
        for x in leaves:
            x.requires_grad_()
        results = []
        for call in (compiled[function], function):
            torch.manual_seed(k)
            if name.endswith("cache"):
                arguments["cache"].reset()
            with torch.set_grad_enabled(not name.endswith("cache")):
                out = outputs_of(call(**arguments))
            grads = torch.autograd.grad([x.sum() for x in out], leaves) if leaves else ()
            results.append([*out, *grads])
        if name != "KVCache":  # which goes on where it was
            torch.testing.assert_close(*results)
    return counter.frame_count


@pytest.mark.parametrize("name", CALLS)
def test_two_graphs_for_all_sizes(name: str) -> None:
    """The first is for its own sizes alone, before torch knows that they change."""
    assert graphs(name, dynamic=None) <= 2


@pytest.mark.parametrize(
    "name", ["dalle_attention", "sample_pivots", "three_region_attention", "three_region_attention_varlen"]
)
def test_one_graph_where_all_is_dynamic(name: str) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        graphs(name, dynamic=True, sizes=range(2))


def test_schedules_make_as_many_graphs_as_one_of_sdpas_scale() -> None:
    """Torch keeps a number that an operator takes as a constant."""
    query, x, weight = heads(3, 6), torch.randn(3, 8), torch.randn(8)
    pivots = some_pivots(3, 6, 2)
    schedules: list[Callable[[float], Any]] = [
        lambda number: torch.nn.functional.scaled_dot_product_attention(query, query, query, scale=number),
        lambda number: cogview_ops.pb_relax_softmax(x, alpha=number),
        lambda number: cogview_ops.pb_relax_attention(query, query, query, alpha=number),
        lambda number: cogview_ops.three_region_attention(query, query, query, pivots, scale=number),
        lambda number: cogview_ops.three_region_attention(query, query, query, pivots, pivot_bias=number),
        lambda number: cogview_ops.sandwich_layer_norm(x, x, *4 * [weight], dropout_p=number, seed=1),
    ]
    made = []
    for schedule in schedules:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(schedule, backend=counter, fullgraph=True)
        for step in range(1, 6):
            torch.testing.assert_close(compiled(step / 8), schedule(step / 8))
        made.append(counter.frame_count)
    assert max(made) == made[0], made


def test_a_seed_may_be_read_from_a_tensor_inside_a_graph() -> None:
    """Its value is not known while the graph is made; one that is no seed is refused when it runs."""
    arguments = FUNCTIONS["sandwich_layer_norm"](0)
    del arguments["seed"]

    def step(seed: Tensor) -> Tensor:
        return cogview_ops.sandwich_layer_norm(**arguments, seed=int(2 * seed))[0]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for seed in (torch.tensor(7), torch.tensor(2**61)):
            assert torch.equal(compiled(seed), step(seed))
        with pytest.raises(ValueError, match=r"^seed: expected at least 0, got -2"):
            compiled(torch.tensor(-1))


def test_module_draws_its_seed_inside_the_graph() -> None:
    """Every call another one, the same in forward and backward."""
    torch._dynamo.reset()
    module = modules.SandwichLayerNorm(8, relax=None, dropout_p=0.5)
    compiled = torch.compile(module, backend="inductor", fullgraph=True)
    branch, residual = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    kept = []
    for _ in range(3):
        h, _ = compiled(branch, residual)
        (grad,) = torch.autograd.grad(h.square().sum(), branch)
        kept.append(grad != 0)
        assert 0 < kept[-1].sum() < grad.numel()
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


FIRST = """
import torch, cogview_ops
from torch._dynamo.testing import CompileCounter
graphs = CompileCounter()
compiled = torch.compile(cogview_ops.layer_norm, backend=graphs, fullgraph=True)
for _ in range(3):
    compiled(torch.ones(4, 8))
print(graphs.frame_count)
"""


def test_the_first_call_of_a_process_is_compiled_once() -> None:
    """What the operators find out and keep is no part of a graph's conditions."""
    first = python("-c", FIRST)
    assert first.stdout.strip() == "1", first
