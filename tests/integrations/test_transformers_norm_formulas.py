"""fuse_norms on norms made for the test: what they compute, and what is almost a norm."""

import abc
import functools
from collections.abc import Callable

import pytest
import torch
from norm_parts import WIDTH, DropPath, Norm, RoundsOnceNorm, Sandwich, example, results
from torch import Tensor, nn

from cogview_ops.integrations.transformers.norms import fuse_norms
from cogview_ops.integrations.transformers.norms.formula import recognise, scales_samples


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


def test_what_scales_samples() -> None:
    assert scales_samples(DropPath())
    assert scales_samples(DropPath(0.1))
    assert not any(
        map(scales_samples, (nn.Dropout(0.1), nn.Dropout1d(0.1), nn.GELU(), nn.LeakyReLU(), nn.Linear(2, 2)))
    )
