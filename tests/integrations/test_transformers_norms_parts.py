"""fuse_norms on layers made for the test: which norms are known, which sums are steps, what runs at a call.

Models of transformers are in test_transformers_norms.py.
"""

import abc
import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogview_ops.integrations.transformers.norms import fuse_norms, steps, unfuse_norms
from cogview_ops.integrations.transformers.norms.formula import recognise, scales_samples

WIDTH = 32


class Norm(nn.Module):
    """Rounds before the weight, as Llama's."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(WIDTH)), eps

    def scaled(self, x: Tensor) -> Tensor:
        return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.scaled(x).to(x.dtype)


class RoundsOnceNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.scaled(x)).to(x.dtype)


class OffsetNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return ((1 + self.weight.float()) * self.scaled(x)).to(x.dtype)


class RoundedOffsetNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return ((1 + self.weight) * self.scaled(x)).to(x.dtype)


class NarrowNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class EpsOutsideNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


class AbsoluteNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.abs() * self.scaled(x).to(x.dtype)


class DetachedNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * scale.detach()).to(x.dtype)


class TrainingNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.5 if self.training else 1)


class ShapeNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() < 4 else self.weight * x


class FirstDimensionNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class GatedNorm(Norm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x if gate is None else x * gate)


class CalledNorm(Norm):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class KeepingNorm(Norm):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class ListingNorm(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class AbstractNorm(Norm, abc.ABC):
    pass


class CountedNorm(Norm):
    def __init_subclass__(cls, *, number: int) -> None:
        super().__init_subclass__()


KNOWN: list[tuple[Callable[[], nn.Module], str]] = [
    (Norm, "RMSNorm, x^.to(dtype) * w"),
    (RoundsOnceNorm, "RMSNorm, x^ * w"),
    (OffsetNorm, "RMSNorm, x^ * (1 + w)"),
    (functools.partial(nn.RMSNorm, WIDTH, 1e-5), "RMSNorm, x^ * w"),
    (functools.partial(nn.LayerNorm, WIDTH), "LayerNorm, x^ * w + b"),
    (functools.partial(nn.LayerNorm, WIDTH, bias=False), "LayerNorm, x^ * w"),
    (functools.partial(nn.LayerNorm, WIDTH, elementwise_affine=False), "LayerNorm, x^"),
]
UNKNOWN: list[tuple[Callable[[], nn.Module], str | None]] = [
    (RoundedOffsetNorm, "it computes no formula that is known, in torch.bfloat16"),
    (NarrowNorm, "it computes no formula that is known, in torch.bfloat16"),
    (EpsOutsideNorm, "it computes no formula that is known, in torch.float32"),
    (AbsoluteNorm, "it computes no formula that is known, in torch.float32"),
    (DetachedNorm, "its gradients are not those of its formula"),
    (lambda: TrainingNorm().eval(), "it is another in training"),
    (ShapeNorm, "its rows depend on the shape"),
    (FirstDimensionNorm, "its forward raises RuntimeError"),
    (GatedNorm, "its forward takes more than the input"),
    (CalledNorm, "it is called in a way of its own"),
    (KeepingNorm, "its forward changes its attributes"),
    (ListingNorm, "its forward changes its attributes"),
    (functools.partial(Norm, eps=0.0), "it has no number that could be eps"),
    (functools.partial(nn.GroupNorm, 4, WIDTH), "it computes no formula that is known, in torch.float32"),
    (functools.partial(nn.BatchNorm1d, WIDTH), "it has more than a weight and a bias of the last dimension"),
    (functools.partial(nn.LayerNorm, (4, WIDTH)), "it has more than a weight and a bias of the last dimension"),
    (functools.partial(nn.Linear, 3, 3), None),
    (functools.partial(nn.PReLU, 3), None),
    (functools.partial(nn.Dropout, 0.05), None),
]


@pytest.mark.parametrize(("make", "formula"), KNOWN, ids=[formula for _, formula in KNOWN])
def test_what_a_norm_computes(make: Callable[[], nn.Module], formula: str) -> None:
    assert str(recognise(make())) == formula


@pytest.mark.parametrize(("make", "why"), UNKNOWN, ids=lambda x: getattr(x, "__name__", None))
def test_what_is_almost_a_norm(make: Callable[[], nn.Module], why: str | None) -> None:
    module = make()
    assert recognise(module) == why
    report = fuse_norms(nn.ModuleDict({"n": module}))
    assert not report.steps
    assert not report.norms
    assert report.left == ({"n": why} if why else {})


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (AbstractNorm, "its class has a metaclass"),
        (CountedNorm, "its class cannot be derived from: TypeError"),
        (KeepingNorm, "its forward changes its attributes"),
        (ListingNorm, "its forward changes its attributes"),
    ],
)
def test_norm_that_is_left_in_its_step(norm: type[Norm], why: str) -> None:
    layer, x = example(Sandwich)
    layer.post = norm()
    before = results(layer, x)
    seen = len(getattr(layer.post, "seen", []))
    report = fuse_norms(layer)
    assert report.left["post"] == why
    assert [step[1:] for step in report.steps] == [("pre", None, "next")]
    assert len(getattr(layer.post, "seen", [])) == seen
    torch.testing.assert_close(results(layer, x), before, rtol=1e-4, atol=1e-4)
    assert type(layer.post) is norm
    assert len(getattr(layer.post, "seen", [])) == 2 * seen
    assert getattr(layer.post, "last", x) is not None


def test_looking_at_a_norm_changes_nothing() -> None:
    norm, state = Norm(), torch.get_rng_state()
    before = norm.weight.clone()
    norm.register_forward_hook(lambda *_: pytest.fail("called"))
    recognise(norm.train())
    assert torch.equal(norm.weight, before)
    assert norm.weight.grad is None
    assert norm.training
    assert torch.equal(torch.get_rng_state(), state)


class DropPath(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x / (1 - self.rate) * torch.rand(len(x), *(1,) * (x.dim() - 1)).ge(self.rate)


def test_what_scales_samples() -> None:
    assert scales_samples(DropPath())
    assert scales_samples(DropPath(0.1))
    assert not any(
        map(scales_samples, (nn.Dropout(0.1), nn.Dropout1d(0.1), nn.GELU(), nn.LeakyReLU(), nn.Linear(2, 2)))
    )


class Layer(nn.Module):
    """Norms, branches and what may be between them, for the forwards below."""

    flag = True

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.post, self.next = Norm(), Norm(), Norm()
        self.f, self.g = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.dropout, self.drop_path, self.factor = nn.Dropout(0.0), DropPath(), 0.5
        self.gain = nn.Parameter(torch.randn(WIDTH))


class Sandwich(Layer):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.f(self.pre(x))
        x = self.post(x)
        x = residual + x

        residual = x
        x = self.next(x)
        return residual + self.g(x)


class Nested(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.post(self.f(self.pre(x + self.g(x))))


class Turned(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.post(self.f(x)) + x
        return h + self.g(self.next(h))


class Between(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.post(self.f(x))
        y = self.dropout(y)
        x = x + y
        return x + self.factor * self.next(self.g(x)) + self.drop_path(self.pre(x))


class FactorOfATensor(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gain * self.post(self.f(x))
        return self.next(x)


class ReadAgain(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.post(self.f(x))
        h = x + y
        return self.next(h) + y * h


class ReadAgainInPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.post(self.f(x))
        h = x + y
        z = self.next(h)
        y += z
        return y


class Captured(Layer):
    def forward(self, x: Tensor) -> Tensor:
        late: Callable[[], Tensor] = lambda: y  # noqa: E731
        y = self.post(self.f(x))
        h = x + y
        return self.next(h) + late()


class Changed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = x + self.f(x)
        h.mul_(2)
        return self.next(h)


class ChangedInTheSameLine(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = x + self.f(x)
        return h.mul_(2) + self.next(h)


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        h += self.post(x)
        return self.next(h)


class AtTimes(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = x + self.f(x)
        return self.next(h) if x.shape[0] > 100 else h


class Arms(Layer):
    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        residual = x
        x = residual + self.post(self.f(x))
        if more is not None:
            residual = x
            x = self.pre(x)
            x = residual + x * more
        residual = x
        x = self.next(x)
        return residual + self.g(x)


class ArmsThatReadTheSum(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        if x.requires_grad:
            x = self.next(x)
        return x


class AfterArms(Layer):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if not self.flag:
            x = self.pre(x)
        x = self.f(x)
        if self.flag:
            x = self.post(x)
        x = residual + x
        residual = x
        if not self.flag:
            x = self.next(x)
        return residual + self.g(x)


class Loop(Layer):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            y = self.post(self.f(x))
            x = x + y
            x = self.next(x)
        return x


class Tried(Layer):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.post(self.f(x))
            y = x + y
        finally:
            x = self.next(x)
        return y


class ChangedByTheOther(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        h = self.post(y) + y.neg_()
        return self.next(h)


class ChangesTheOther(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        z = self.post(y.neg_())
        return self.next(x + y + z)


class OfANumber(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.post(self.f(x)))


class Broadcast(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post(self.f(x[:, :1]))
        return self.next(x)


class Numbers(Layer):
    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        for _ in range(2):
            total = total + self.post(self.f(x))
        return total * (1 + self.next(self.g(x)))


class KeptByAMethod(Layer):
    def branch(self, x: Tensor) -> Tensor:
        self.kept = 3 * x
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.post(self.branch(x))
        h = self.kept + x
        return self.next(h)


class FactorOfAMethod(KeptByAMethod):
    def branch(self, x: Tensor) -> Tensor:
        self.factor = 4.0
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        self.factor = 0.5
        return x + self.factor * self.post(self.branch(x)) + self.next(self.branch(x)) * self.factor


class FlagOfAMethod(KeptByAMethod):
    flag = True

    def branch(self, x: Tensor) -> Tensor:
        self.flag = False
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        self.flag = True
        y = self.post(self.branch(x))
        h = x + y
        if self.flag:
            h = 2 * self.next(h)
        return h


class OfBase(Sandwich):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post(super().forward(x))
        return self.next(x)


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, times: int = 1, **kwargs: Any) -> Any:
        return times * function(self, *args, **kwargs)

    return wrapper


class Decorated(Layer):
    @decorated
    @decorated
    def forward(self, x: Tensor, *, twice: bool = True) -> Tensor:
        x = x + self.post(self.f(x))
        return self.next(x) * (1 + twice)


Steps = list[tuple[str, str | None, str | None]]
LAYERS: list[tuple[type[Layer], Steps, int]] = [  # and how many norms are in no step
    (Sandwich, [("both", "post", "next")], 1),
    (Nested, [("post", "post", None), ("pre", None, "pre")], 1),
    (Turned, [("both", "post", "next")], 1),
    (Between, [("post", "post", None), ("post", "pre", None), ("post", "next", None)], 0),
    (FactorOfATensor, [("both", "post", "next")], 1),
    (ReadAgain, [("pre", None, "next")], 2),
    (ReadAgainInPlace, [("pre", None, "next")], 2),
    (Captured, [("pre", None, "next")], 2),
    (Changed, [], 3),
    (ChangedInTheSameLine, [("post", "next", None)], 2),
    (InPlace, [], 3),
    (AtTimes, [], 3),
    (Arms, [("both", "post", "pre"), ("pre", None, "next"), ("both", "post", "next")], 0),
    (ArmsThatReadTheSum, [], 3),
    (AfterArms, [("post", "post", None)], 2),
    (Loop, [("pre", None, "next")], 2),  # y could be read in the next round
    (Tried, [], 3),
    (OfANumber, [("post", "post", None)], 2),
    (Broadcast, [("both", "post", "next")], 1),
    (Numbers, [("post", "post", None), ("post", "next", None)], 1),
    (KeptByAMethod, [("pre", None, "next")], 2),
    (FactorOfAMethod, [("post", "next", None)], 2),
    (FlagOfAMethod, [("post", "post", None)], 2),
    (OfBase, [("both", "post", "next")], 1),
    (Decorated, [("both", "post", "next")], 1),
]


def results(layer: nn.Module, x: Tensor, *more: Any) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x, *more)
    out.square().sum().backward()
    return [out.detach(), x.grad, *[p.grad.clone() for p in layer.parameters() if p.grad is not None]]  # type: ignore


def example(kind: type[Layer]) -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    return kind(), torch.randn(2, 5, WIDTH)


@pytest.mark.parametrize(("kind", "expected", "others"), LAYERS, ids=[kind.__name__ for kind, *_ in LAYERS])
def test_layer(kind: type[Layer], expected: Steps, others: int) -> None:
    layer, x = example(kind)
    before, forward = results(layer, x), kind.forward
    report = fuse_norms(layer)
    assert [step[1:] for step in report.steps] == expected
    assert len(report.norms) == others
    torch.testing.assert_close(results(layer, x), before, rtol=1e-4, atol=1e-4)
    assert type(layer).__name__ == kind.__name__
    assert isinstance(layer, kind)
    report.undo()
    assert type(layer) is kind
    assert kind.forward is forward
    assert type(layer.post) is Norm
    assert all(map(torch.equal, results(layer, x), before))


@torch.no_grad()
@pytest.mark.parametrize("kind", [ChangedByTheOther, ChangesTheOther])
def test_operands_that_change_each_other(kind: type[Layer]) -> None:
    layer, x = example(kind)
    before = layer(x)
    assert [step[1:] for step in fuse_norms(layer).steps] == [("pre", None, "next")]
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


def test_both_arms() -> None:
    for more in (None, torch.tensor(2.0)):
        layer, x = example(Arms)
        before = results(layer, x, more)
        fuse_norms(layer)
        torch.testing.assert_close(results(layer, x, more), before, rtol=1e-4, atol=1e-4)


def test_arms_are_those_of_the_layer() -> None:
    layer, x = example(AfterArms)
    layer.flag = False
    before = results(layer, x)
    report = fuse_norms(layer)
    assert [step[1:] for step in report.steps] == [("pre", None, "next")]
    torch.testing.assert_close(results(layer, x), before, rtol=1e-4, atol=1e-4)
    assert report.left == {"": "`return residual + self.g(x)` has no norm beside it"}


def exotic() -> dict[str, tuple[type, str]]:
    @functools.wraps(Sandwich.forward)
    def elsewhere(self: Any, x: Tensor) -> Tensor:
        return Sandwich.forward(self, x)

    class Kept(Layer):
        forward = elsewhere

    class Object:
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * x

    class NoFunction(Layer):
        forward = Object()

    class Private(Layer):
        def forward(self, x: Tensor) -> Tensor:
            self.__h = x + self.f(x)
            return self.next(self.__h)

    class Naming(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.post(h := x + self.f(x))
            return self.next(h + y)

    class Watching(Layer):
        def forward(self, x: Tensor) -> Tensor:
            h = x + self.f(x)
            return self.next(h) * len(locals())

    made: dict[str, Any] = {"Layer": Layer}
    exec("class Made(Layer):\n    def forward(self, x):\n        return self.next(x + self.f(x))\n", made)

    class Counted(Sandwich):
        def __init_subclass__(cls, *, number: int) -> None:
            super().__init_subclass__()

    class Meta(type):
        pass

    class WithMeta(Sandwich, metaclass=Meta):
        pass

    return {
        "kept": (Kept, "its forward is decorated by what does not hold it in a closure"),
        "object": (NoFunction, "its forward is no Python function"),
        "private": (Private, "the source of its forward is not what runs"),
        "naming": (Naming, "its forward gives names values inside of expressions"),
        "watching": (Watching, "its forward looks at its own names"),
        "counted": (Counted, "its class cannot be derived from: TypeError"),
        "made": (made["Made"], "the source of its forward is not at hand"),
        "meta": (WithMeta, "its class has a metaclass"),
    }


@pytest.mark.parametrize("name", exotic())
def test_layer_that_is_left(name: str) -> None:
    kind, why = exotic()[name]
    layer, x = example(kind)
    before = results(layer, x)
    report = fuse_norms(layer)
    assert report.left == {"": why}
    assert not report.steps
    assert len(report.norms) == 3
    assert type(layer) is kind
    torch.testing.assert_close(results(layer, x), before, rtol=1e-4, atol=1e-4)


def test_forward_that_has_been_replaced() -> None:
    layer, _ = example(Sandwich)
    layer.forward = layer.post.forward = lambda x: x  # type: ignore[method-assign]
    report = fuse_norms(layer)
    assert report.left == {"": "its forward has been replaced", "post": "its forward has been replaced"}
    assert set(report.norms) == {"pre", "next"}


def test_differentiated_twice() -> None:
    layer, x = example(Sandwich)
    second = []
    for impl in (None, "reference"):
        if impl:
            fuse_norms(layer, impl=impl)
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        second += torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(*second, rtol=1e-3, atol=1e-3)


def test_nothing_that_is_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Conv1d(4, 4, 1))
    before = [type(module) for module in model.modules()]
    report = fuse_norms(model)
    assert [type(module) for module in model.modules()] == before
    assert (report.steps, report.norms, report.left) == ([], {}, {})
    assert str(report) == "Sequential: 0 steps and 0 other norms are fused"


def test_modules_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True), torch.jit.script(nn.Linear(WIDTH, 4))
    )
    x = torch.randn(2, 5, WIDTH)
    before = model(x)
    report = fuse_norms(model)
    assert [step[1:] for step in report.steps] == [("pre", None, "norm1"), ("pre", None, "norm2")]
    torch.testing.assert_close(model(x), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_neighbours(called: list[str]) -> None:
    layer, x = example(Sandwich)
    quantise = functools.partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    expected = quantise(layer)(x)
    fuse_norms(layer)
    torch.testing.assert_close(quantise(layer)(x), expected, rtol=1e-3, atol=1e-3)
    assert called == STEP


def test_report() -> None:
    report = fuse_norms(nn.Sequential(*(Sandwich() for _ in range(3))))
    assert str(report).splitlines() == [
        "Sequential: 3 steps and 3 other norms are fused",
        "  3 x *: residual + post(branch), next",
        "  3 x *.pre: RMSNorm, x^.to(dtype) * w",
        "left:",
        "  3 x *: `return residual + self.g(x)` has no norm beside it",
    ]


def test_impl_is_checked() -> None:
    with pytest.raises(ValueError, match=r"impl: expected .*, got 'none'"):
        fuse_norms(Sandwich(), impl="none")


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
