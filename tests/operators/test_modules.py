"""The nn.Module front ends: parameters, options and modes reach the operators."""

import re
from typing import Any

import pytest
import torch
from cases import some_pivots
from common import DTYPES, assert_as_good_as, refused
from torch import Tensor, nn

from cogview_ops import (
    layer_norm,
    local_attention_2d,
    modules,
    pb_relax_softmax,
    sample_pivots,
    sandwich_layer_norm,
    three_region_attention,
)
from cogview_ops.modules import (
    LocalAttention2d,
    PBRelaxLayerNorm,
    PBRelaxSoftmax,
    SandwichLayerNorm,
    SandwichRMSNorm,
    ThreeRegionAttention,
)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_softmax() -> None:
    scores, mask = torch.randn(2, 5, 7), torch.rand(5, 7) > 0.5
    module = PBRelaxSoftmax(3.0, causal=True)
    assert torch.equal(module(scores), pb_relax_softmax(scores, alpha=3.0, causal=True))
    assert torch.equal(module(scores, mask), pb_relax_softmax(scores, alpha=3.0, causal=True, mask=mask))
    assert repr(module) == "PBRelaxSoftmax(alpha=3.0, causal=True)"


@pytest.mark.parametrize("relax", ["row", "tensor", None])
def test_layer_norm(relax: str | None) -> None:
    x = torch.randn(4, 20, dtype=torch.float64)
    module = randomised(PBRelaxLayerNorm(20, 0.1, relax=relax, dtype=torch.float64))
    assert torch.equal(module(x), layer_norm(x, module.weight, module.bias, eps=0.1, relax=relax))
    plain = nn.LayerNorm(20, 0.1, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    assert torch.allclose(plain(x), module(x)) == (relax is None)
    assert repr(module).endswith(f", relax={relax!r})")


def test_sandwich() -> None:
    branch, residual = torch.randn(2, 4, 20)
    module = randomised(SandwichLayerNorm(20, 0.1, relax="tensor", dropout_p=0.5))
    weights = (module.post.weight, module.post.bias, module.pre.weight, module.pre.bias)
    options = {"eps": 0.1, "relax": "tensor"}
    expected = sandwich_layer_norm(branch, residual, *weights, **options, dropout_p=0.5, seed=3)
    assert all(map(torch.equal, module(branch, residual, seed=3), expected))
    expected = sandwich_layer_norm(branch, residual, *weights, **options)
    assert all(map(torch.equal, module.eval()(branch, residual), expected))
    assert sorted(module.state_dict()) == ["post.bias", "post.weight", "pre.bias", "pre.weight"]


@pytest.mark.parametrize("which", [{"bias": False}, {"elementwise_affine": False}], ids=str)
def test_norms_without_parameters(which: dict[str, bool]) -> None:
    """Those of torch, forward and backward, and two of them in a step."""
    x, branch, grad = torch.randn(3, 4, 20, dtype=torch.float64).unbind()
    ours, plain = (
        randomised(make(20, 0.1, **how, **which, dtype=torch.float64))
        for make, how in ((PBRelaxLayerNorm, {"relax": None}), (nn.LayerNorm, {}))
    )
    plain.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, plain):
        out = module(x.requires_grad_())
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], grad)])
    torch.testing.assert_close(*results)
    step = SandwichLayerNorm(20, 0.1, relax=None, **which, dtype=torch.float64)
    step.load_state_dict({f"{part}.{name}": w for part in ("post", "pre") for name, w in plain.state_dict().items()})
    h, out = step(branch, x)
    torch.testing.assert_close((h, out), (x + plain(branch), plain(x + plain(branch))))
    grads = torch.autograd.grad((h, out), [x, *step.parameters()], (grad, grad))
    assert all(g.isfinite().all() for g in grads)


def test_layers_under_autocast() -> None:
    """The first of any transformer: bfloat16 from a projection meets a residual in float32."""
    x, residual = torch.randn(2, 4, 20)
    project, step = nn.Linear(20, 20), SandwichLayerNorm(20)
    with torch.autocast("cpu", torch.bfloat16):
        branch = project(x)
        h, out = step(branch, residual)
        assert (branch.dtype, h.dtype, out.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        (project(out).sum() + h.sum()).backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in (*project.parameters(), *step.parameters())
    )


def test_sandwich_draws_a_seed() -> None:
    """A new mask each time, repeated by torch.manual_seed and so by activation checkpointing."""
    branch, residual = torch.randn(2, 4, 20)
    module = SandwichLayerNorm(20, dropout_p=0.5)
    torch.manual_seed(0)
    a, b = module(branch, residual)[0], module(branch, residual)[0]
    torch.manual_seed(0)
    assert torch.equal(a, module(branch, residual)[0])
    assert not torch.equal(a, b)


# --- ThreeRegionAttention --------------------------------------------------------------------------------------------

PATTERN: dict[str, Any] = {"block_size": 4, "window_blocks": 2, "pivot_bias": 0.5}


def attention(**options: Any) -> ThreeRegionAttention:
    torch.manual_seed(0)
    return ThreeRegionAttention(24, 6, **{"num_kv_heads": 2, "head_dim": 8, **PATTERN, **options})


def test_attention_is_the_operator_between_projections() -> None:
    module = attention(dtype=torch.float64, scale=0.4)
    x, pivots = torch.randn(2, 30, 24, dtype=torch.float64, requires_grad=True), some_pivots("text", 2, 30)
    parts = [module.q_proj(x), module.k_proj(x), module.v_proj(x)]
    q, k, v = (part.view(2, 30, -1, 8).transpose(1, 2) for part in parts)
    heads = three_region_attention(q, k, v, pivots, **PATTERN, scale=0.4, impl="reference")
    expected = module.out_proj(heads.transpose(1, 2).reshape(2, 30, 48))  # type: ignore[union-attr]
    torch.testing.assert_close(module(x, pivots), expected, atol=1e-12, rtol=0)
    leaves, seed = [x, *module.parameters()], torch.randn_like(expected)
    grads = (torch.autograd.grad(y, leaves, seed) for y in (module(x, pivots), expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_attention_holds_what_it_was_given() -> None:
    shapes = {name: tuple(x.shape) for name, x in attention().state_dict().items()}
    assert shapes == {
        "q_proj.weight": (48, 24),
        "q_proj.bias": (48,),
        "k_proj.weight": (16, 24),
        "k_proj.bias": (16,),
        "v_proj.weight": (16, 24),
        "v_proj.bias": (16,),
        "out_proj.weight": (24, 48),
        "out_proj.bias": (24,),
    }
    module = ThreeRegionAttention(24, 6, bias=False, dtype=torch.bfloat16)
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {
        "q_proj.weight": (24, 24),
        "k_proj.weight": (24, 24),
        "v_proj.weight": (24, 24),
        "out_proj.weight": (24, 24),
    }
    assert module.make_cache(2, 5).keys.dtype == torch.bfloat16
    assert module.make_cache(2, 5, dtype=torch.float32).keys.dtype == torch.float32
    assert attention().make_cache(2, 5).values.shape == (2, 2, 5, 8)
    assert "num_heads=6, num_kv_heads=2, head_dim=8, block_size=4, window_blocks=2" in repr(attention())


def test_checkpoints_with_one_projection_load() -> None:
    module = nn.ModuleDict({"layer": attention()})
    kept = module.state_dict()
    old = {name: x for name, x in kept.items() if "out_proj" in name}
    for kind in ("weight", "bias"):
        old[f"layer.qkv_proj.{kind}"] = torch.cat([kept[f"layer.{name}_proj.{kind}"] for name in "qkv"])
    fresh = nn.ModuleDict({"layer": randomised(attention())})
    fresh.load_state_dict(old)
    assert all(torch.equal(x, kept[name]) for name, x in fresh.state_dict().items())


@torch.no_grad()
def decode(module: ThreeRegionAttention, x: Tensor, pivots: Tensor, prompts: list[int], chunk: int) -> Tensor:
    """Prompts of different lengths padded with garbage, then `chunk` tokens a step, each sample at its own
    place, until all of x has been through."""
    batch, seqlen, _ = x.shape
    rows, out = torch.arange(batch)[:, None], torch.full_like(x, torch.nan)
    cache = module.make_cache(batch, seqlen + chunk)  # padding needs room too
    fed = torch.zeros(batch, dtype=torch.int64)
    counts = torch.tensor(prompts)
    while True:
        given = int(counts.max())
        columns = fed[:, None] + torch.arange(given)
        real = torch.arange(given) < counts[:, None]
        piece = torch.where(real[..., None], x[rows, columns.clamp_max(seqlen - 1)], 7.0)
        y = module(piece, pivots, cache, None if real.all() else counts)
        out[rows.expand_as(real)[real], columns[real]] = y[real]
        fed += counts
        assert cache.lengths.tolist() == fed.tolist()
        counts = (seqlen - fed).clamp_max(chunk)
        if not counts.any():
            return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prompts", "chunk"), [([1, 1], 1), ([9, 20], 1), ([0, 29], 3), ([40, 40], 1)], ids=str)
def test_prefill_and_decode_equal_the_forward(dtype: torch.dtype, prompts: list[int], chunk: int) -> None:
    module = attention(dtype=dtype)
    x, pivots = torch.randn(2, 40, 24, dtype=dtype), some_pivots("text", 2, 40)
    wide = attention(dtype=torch.float64)
    wide.load_state_dict(module.state_dict())
    with torch.no_grad():
        truth, full = wide(x.double(), pivots), module(x, pivots)
    assert_as_good_as(decode(module, x, pivots, prompts, chunk), truth, full)


def test_attention_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    module, pivots = attention(), some_pivots("text", 2, 30)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, seed = torch.randn(2, 30, 24, requires_grad=True), torch.randn(2, 30, 24)
    leaves = [x, *module.parameters()]
    grads = (torch.autograd.grad(f(x, pivots), leaves, seed) for f in (compiled, module))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
    caches = [module.make_cache(2, 30) for _ in range(2)]
    with torch.no_grad():
        for t in range(0, 30, 10):
            steps = (f(x[:, t : t + 10], pivots, c) for f, c in zip((compiled, module), caches, strict=True))
            torch.testing.assert_close(*steps)
    assert caches[0].lengths.tolist() == [30, 30]


def test_attention_under_autocast() -> None:
    module, x, pivots = attention(), torch.randn(2, 30, 24), some_pivots("text", 2, 30)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        full = module(x, pivots)
        assert full.dtype == torch.bfloat16
        steps = module(x, pivots, module.make_cache(2, 30, dtype=torch.bfloat16))
        torch.testing.assert_close(steps, full, atol=0.02, rtol=0.02)
        cache = module.make_cache(2, 30)
        assert cache.keys.dtype == torch.bfloat16
        assert torch.equal(module(x, pivots, cache), steps)
        # keys that a rotary embedding left in float32 are cast, and so are those of a cache in float32
        assert torch.equal(module(x, pivots, module.make_cache(2, 30, dtype=torch.float32)), steps)
        wide = torch.randn(2, 2, 5, 8)
        cache.reset()
        cache.append(wide, wide.bfloat16())
        assert torch.equal(cache.keys[:, :, :5], wide.bfloat16())
    cache = module.make_cache(2, 30, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"^key: expected the cache's dtype torch.bfloat16, got torch.float32"):
        module(x, pivots, cache)


def test_attention_refuses() -> None:
    sizes = {"embed_dim": 24, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4}
    for name in sizes:
        refused(ThreeRegionAttention, sizes, name, 0, ValueError)
        refused(ThreeRegionAttention, sizes, name, 6.0, TypeError)
    refused(ThreeRegionAttention, sizes, "num_kv_heads", 4, ValueError)
    refused(ThreeRegionAttention, {"embed_dim": 24}, "num_heads", 5, ValueError)
    arguments = {"x": torch.zeros(1, 5, 24), "pivots": torch.zeros(1, 1, dtype=torch.int32)}
    refused(attention(), arguments, "x", [1.0], TypeError)
    refused(attention(), arguments, "x", torch.zeros(5, 24), ValueError)
    refused(attention(), arguments, "x", torch.zeros(1, 5, 23), ValueError)
    refused(attention(), arguments, "new_tokens", torch.tensor([5]), ValueError)


# --- LocalAttention2d ------------------------------------------------------------------------------------------------

WINDOW: dict[str, Any] = {"grid": (4, 6), "kernel_size": (3, 5), "prefix_bias": 0.5}
COARSE: dict[str, Any] = {"coarse_grid": (2, 3), "coarse_kernel_size": (3, 1), "coarse_bias": -0.5}


def local(**options: Any) -> LocalAttention2d:
    torch.manual_seed(0)
    return LocalAttention2d(24, 6, **{"num_kv_heads": 2, "head_dim": 8, "raster_causal": True, **WINDOW, **options})


def test_local_is_the_operator_between_projections() -> None:
    """Text and the coarse image come through the same projection."""
    module = local(dtype=torch.float64, scale=0.4, **COARSE)
    text, coarse, x = (torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True) for n in (5, 6, 24))

    def heads(y: Tensor) -> tuple[Tensor, ...]:
        parts = [module.q_proj(y), module.k_proj(y), module.v_proj(y)]
        return tuple(part.view(*y.shape[:2], -1, 8).transpose(1, 2) for part in parts)

    sets = {"prefix_mask": torch.tensor([[True, False, True, True, False], [True] * 5])}
    expected = local_attention_2d(
        *heads(x),
        **WINDOW,
        **COARSE,
        **sets,
        raster_causal=True,
        scale=0.4,
        impl="reference",
        prefix_key=heads(text)[1],
        prefix_value=heads(text)[2],
        coarse_key=heads(coarse)[1],
        coarse_value=heads(coarse)[2],
    )
    expected = module.out_proj(expected.transpose(1, 2).reshape(2, 24, 48))  # type: ignore[union-attr]
    for name, y in (("prefix", text), ("coarse", coarse)):
        sets[f"{name}_key"], sets[f"{name}_value"] = module.keys_values(y)
    out = module(x, **sets)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    leaves, seed = [x, text, coarse, *module.parameters()], torch.randn_like(expected)
    grads = (torch.autograd.grad(y, leaves, seed) for y in (out, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)
    assert "coarse_bias=-0.5, scale=0.4, edge=clip, raster_causal=True" in repr(module)
    assert local(bias=False).keys_values(text.float())[1].shape == (2, 2, 5, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_decode_equals_the_forward(dtype: torch.dtype) -> None:
    """Some tokens at a time; then one sample has forgotten 7, and the other its last ones."""
    module, wide = local(dtype=dtype), local(dtype=torch.float64)
    wide.load_state_dict(module.state_dict())
    x, text = torch.randn(2, 24, 24, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)
    with torch.no_grad():
        sets = dict(zip(("prefix_key", "prefix_value"), wide.keys_values(text.double()), strict=True))
        truth = wide(x.double(), **sets)
        sets = dict(zip(("prefix_key", "prefix_value"), module.keys_values(text), strict=True))
        full, cache = module(x, **sets), module.make_cache(2)
        pieces = [module(piece, cache, **sets) for piece in x.split([5, 1, 3, 1, 14], 1)]
        assert_as_good_as(torch.cat(pieces, 1), truth, full)
        cache.lengths -= torch.tensor([7, 4], dtype=torch.int32)
        rows, columns = torch.arange(2)[:, None], cache.lengths[:, None] + torch.arange(4)
        again = module(x[rows, columns], cache, **sets)
    assert_as_good_as(again, truth[rows, columns], full[rows, columns])
    with pytest.raises(ValueError, match=r"^key: expected at most 0 more tokens in a cache of 24, got 1"):
        module(x[:, :1], cache, **sets)


def test_steps_refuse() -> None:
    for step in (SandwichLayerNorm, SandwichRMSNorm):
        refused(step, {"dim": 20}, "dropout_p", 1.5, ValueError)
        refused(step, {"dim": 20}, "dropout_after_norm", 1, TypeError)
        refused(step, {"dim": 20}, "norms", "all", ValueError)


def test_local_refuses() -> None:
    arguments = {"embed_dim": 24, "num_heads": 6, **WINDOW}
    refused(LocalAttention2d, arguments, "grid", 24, TypeError)
    refused(LocalAttention2d, arguments, "kernel_size", (3, 0), ValueError)
    refused(LocalAttention2d, arguments, "kernel_size", (9, 3), ValueError)
    refused(LocalAttention2d, arguments, "raster_causal", None, TypeError)
    refused(LocalAttention2d, arguments, "dilation", (0, 1), ValueError)
    refused(LocalAttention2d, arguments | {"dilation": 3}, "kernel_size", (5, 3), ValueError)
    refused(LocalAttention2d, arguments | {"raster_causal": True}, "edge", "shift", ValueError)
    refused(LocalAttention2d, arguments, "num_heads", 5, ValueError)
    call = {"x": torch.zeros(1, 24, 24)}
    refused(local(), call, "x", torch.zeros(1, 24, 23), ValueError)
    refused(local(raster_causal=False), call, "cache", local().make_cache(1), ValueError)
    with pytest.raises(ValueError, match=r"^grid: expected key's 23 tokens, got \(4, 6\): 24"):
        local()(torch.zeros(1, 23, 24))


def test_docstring_example() -> None:
    (example,) = re.findall(r"((?:^ {4}.*\n|^\n)+)", modules.__doc__ or "", flags=re.M)[-1:]
    names = {"torch": torch, "x": torch.randn(1, 1024, 512), "ThreeRegionAttention": ThreeRegionAttention}
    exec("if True:\n" + example, names | {"sample_pivots": sample_pivots}, results := {})
    torch.testing.assert_close(results["y"][:, :65], torch.cat([results["prompt"], results["token"]], 1))


def test_gradients_of_each_sample() -> None:
    """Of whole modules, with torch.func: as of the samples one by one."""
    module, pivots, x = attention(), some_pivots("text", 3, 30), torch.randn(3, 30, 24)

    def loss(parameters: dict[str, Tensor], x: Tensor, pivots: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x[None], pivots[None])).square().sum()

    parameters = dict(module.named_parameters())
    detached = {name: p.detach() for name, p in parameters.items()}
    mine = torch.vmap(torch.func.grad(loss), (None, 0, 0))(detached, x, pivots)
    for n in range(3):
        theirs = torch.autograd.grad(loss(parameters, x[n], pivots[n]), list(parameters.values()))
        for a, b in zip(mine.values(), theirs, strict=True):
            torch.testing.assert_close(a[n], b, rtol=1e-4, atol=1e-4)
