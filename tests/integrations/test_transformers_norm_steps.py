"""fuse_norms on layers made for the test: which sums are steps, which are left, what the report says."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_parts import WIDTH, Arms, Between, Decorated, Layer, Nested, Norm, Sandwich, Turned, example, results
from torch import Tensor, nn

from cogview_ops.integrations.transformers.norms import fuse_norms


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
