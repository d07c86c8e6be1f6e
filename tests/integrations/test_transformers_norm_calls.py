"""fuse_norms on layers made for the test: what runs at a call, also after the model has changed.

Models of transformers are in test_transformers_norms.py.
"""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from norm_parts import (
    WIDTH,
    Arms,
    Between,
    Decorated,
    Layer,
    Nested,
    Norm,
    RoundsOnceNorm,
    Sandwich,
    Turned,
    example,
    results,
)
from torch import Tensor, nn

from cogview_ops.integrations.transformers.norms import fuse_norms, steps, unfuse_norms


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_neighbours(called: list[str]) -> None:
    layer, x = example(Sandwich)
    quantise = functools.partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    expected = quantise(layer)(x)
    fuse_norms(layer)
    torch.testing.assert_close(quantise(layer)(x), expected, rtol=1e-3, atol=1e-3)
    assert called == STEP


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that are called, with the norms of a step."""
    names: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def note(*args: Any, **kwargs: Any) -> Any:
            names.append(f"{name} {kwargs['norms']}" if "norms" in kwargs else name)
            return function(*args, **kwargs)

        return note

    for name in ("rms_norm", "layer_norm", "sandwich_rms_norm", "sandwich_layer_norm"):
        monkeypatch.setattr(steps, name, noting(name, getattr(steps, name)))
    return names


STEP = ["rms_norm", "sandwich_rms_norm both"]


def test_operators_run(called: list[str]) -> None:
    layer, x = example(Sandwich)
    fuse_norms(layer)
    layer(x)
    assert called == STEP
    unfuse_norms(layer)
    layer(x)
    assert called == STEP


@pytest.mark.parametrize(
    ("name", "steps_then"), [("post", "sandwich_rms_norm pre"), ("next", "sandwich_rms_norm post")]
)
@pytest.mark.parametrize("late", [False, True])
def test_hooks(called: list[str], name: str, steps_then: str, late: bool) -> None:
    layer, x = example(Sandwich)
    before = results(layer, x)
    seen: list[Tensor] = []
    if late:
        report = fuse_norms(layer)
    handle = getattr(layer, name).register_forward_hook(lambda module, args, out: seen.append(out))
    if not late:
        report = fuse_norms(layer)
        assert report.left[name] == "it has hooks, so that it is in no step"
        assert report.steps[0].norms == steps_then.split()[1]
    torch.testing.assert_close(results(layer, x), before, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1
    assert called.count("rms_norm") == 2
    assert steps_then in called
    called.clear()
    handle.remove()
    layer(x)
    assert called == STEP


def test_hooks_of_all_modules(called: list[str]) -> None:
    layer, x = example(Sandwich)
    fuse_norms(layer)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    layer(x)
    handle.remove()
    assert [layer.pre, layer.post, layer.next] == [module for module in seen if isinstance(module, Norm)]
    assert called == ["rms_norm"] * 3
    called.clear()
    layer(x)
    assert called == STEP


def test_undone_below_a_wrapped_forward() -> None:
    """As accelerate wraps forwards of modules."""
    (layer, x), (own, _) = example(Sandwich), example(Sandwich)
    report = fuse_norms(layer)
    for module in (layer.post, layer):
        module.forward = functools.partial(module.forward)  # type: ignore[method-assign]
    report.undo()
    assert all(map(torch.equal, results(layer, x), results(own, x)))


def test_backward_hooks(called: list[str]) -> None:
    layer, x = example(Sandwich)
    fuse_norms(layer)
    seen: list[Any] = []
    layer.post.register_full_backward_hook(lambda module, into, out: seen.append(out))
    results(layer, x)
    assert len(seen) == 1
    assert called == ["rms_norm", "rms_norm", "sandwich_rms_norm pre"]


class Around(nn.Module):
    """As adapters wrap what they adapt, attributes included."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def changed(layer: Any, how: str) -> None:
    if how == "wrapped":
        layer.post = Around(layer.post)
    elif how == "replaced":
        layer.next = nn.LayerNorm(WIDTH)
    elif how == "forward":
        layer.post.forward = lambda x: 3 * x
    elif how == "parametrised":
        nn.utils.parametrize.register_parametrization(layer.post, "weight", Doubled())
    elif how == "eps":
        layer.post.eps = 0.5
    elif how == "float64":
        layer.double()
    elif how == "weights of two dtypes":
        layer.next.double()


@pytest.mark.parametrize(
    "how", ["wrapped", "replaced", "forward", "parametrised", "eps", "float64", "weights of two dtypes"]
)
def test_what_changes_afterwards_is_respected(how: str) -> None:
    (layer, x), (own, _) = example(Sandwich), example(Sandwich)
    fuse_norms(layer)
    for each in (layer, own):
        torch.manual_seed(1)
        changed(each, how)
    x = x.double() if how == "float64" else x
    if how == "weights of two dtypes":
        own.g.double(), layer.g.double()
    got, expected = results(layer, x), results(own, x)
    assert all(a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if how == "float64":
        assert all(map(torch.equal, got, expected))


def test_class_that_has_been_derived_from_is_not_undone() -> None:
    layer, _ = example(Sandwich)
    fuse_norms(layer)
    layer.post.__class__ = type("Other", (type(layer.post),), {})
    with pytest.raises(RuntimeError, match=r"post: its class has been replaced since by .*Other.*; undo that first"):
        unfuse_norms(layer)
    assert type(layer) is not Sandwich  # nothing was


def test_copies() -> None:
    layer, x = example(Sandwich)
    fuse_norms(layer)
    out = layer(x)
    copied = copy.deepcopy(layer)
    assert type(copied) is type(layer)
    assert type(copied.post) is type(layer.post)
    with torch.no_grad():
        copied.post.weight.zero_()
    assert torch.equal(layer(x), out)
    assert not torch.equal(copied(x), out)
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(loaded) is Sandwich
    assert type(loaded.post) is Norm
    torch.testing.assert_close(loaded(x), out)


def test_twice_is_once() -> None:
    layer, _ = example(Sandwich)
    first, second = fuse_norms(layer), fuse_norms(layer)
    assert (first.steps, first.norms, first.left) == (second.steps, second.norms, second.left)
    first.undo()
    assert type(layer) is Sandwich


class WideResidual(Layer):
    """A 16-bit branch beside a residual stream in float32."""

    def forward(self, x: Tensor) -> Tensor:
        residual = x.float()
        h = residual + self.post(x)
        return self.next(h)


@pytest.mark.parametrize("norm", [Norm, RoundsOnceNorm])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_wide_residual(norm: type[Norm], weights: torch.dtype, called: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = WideResidual(), torch.randn(2, 5, WIDTH).bfloat16()
    layer.post, layer.next = norm(), norm()
    layer.to(weights)
    own = layer(x)
    fuse_norms(layer)
    out = layer(x)
    assert out.dtype == own.dtype
    torch.testing.assert_close(out, own, rtol=1e-2, atol=2e-2)
    assert called[0] == "sandwich_rms_norm post"


@pytest.mark.parametrize("kind", [Sandwich, Turned, Nested])
@pytest.mark.parametrize("norm", [Norm, RoundsOnceNorm, functools.partial(nn.LayerNorm, WIDTH)])
def test_autocast(kind: type[Layer], norm: Any) -> None:
    layer, x = example(kind)
    layer.pre, layer.post, layer.next = norm(), norm(), norm()
    exact = layer(x).detach()
    outs, into = [], []
    layer.g.register_forward_pre_hook(lambda _, args: into.append(args[0].dtype))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(layer(x).detach())
        fuse_norms(layer)
    own, fused = ((out.double() - exact).norm() for out in outs)
    assert outs[0].dtype == outs[1].dtype
    assert into[0] == into[1]
    assert fused <= 2 * own


def test_dropout_after_the_norm() -> None:
    torch.manual_seed(0)
    layer = Between()
    layer.dropout.p = 0.25
    x = torch.randn(64, 50, WIDTH)
    report = fuse_norms(layer)
    step = report.steps[0]
    assert step.post == "post"
    out = [steps.add(x, x, post=layer.post, at=1, between=layer.dropout) - x for _ in range(2)]
    normed = layer.post(x)
    for y in out:
        kept = y.abs() > 1e-4
        assert 0.24 < 1 - kept[normed.abs() > 1e-3].float().mean() < 0.26
        torch.testing.assert_close(y[kept], normed[kept] / 0.75, rtol=1e-3, atol=1e-4)
    assert not torch.equal(*out)
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    layer.eval()
    fused = layer(x)
    unfuse_norms(layer)
    torch.testing.assert_close(fused, layer(x), rtol=1e-4, atol=1e-4)


def test_drop_path_draws_as_the_model_draws() -> None:
    torch.manual_seed(0)
    layer, x = Between(), torch.randn(16, 3, WIDTH)
    layer.drop_path.rate = 0.5
    outs = []
    for fuse in (False, True):
        if fuse:
            fuse_norms(layer)
        torch.manual_seed(7)
        outs.append(results(layer, x))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer.eval()(x), outs[0][0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [Sandwich, Nested, Between, Arms, Decorated])
def test_compiled(kind: type[Layer]) -> None:
    layer, x = example(kind)
    before = results(layer, x)
    fuse_norms(layer)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, x), before, rtol=1e-4, atol=1e-4)
