"""Norms and layers made for the tests of fuse_norms, as small as can be."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

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


class DropPath(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x / (1 - self.rate) * torch.rand(len(x), *(1,) * (x.dim() - 1)).ge(self.rate)


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


def results(layer: nn.Module, x: Tensor, *more: Any) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x, *more)
    out.square().sum().backward()
    return [out.detach(), x.grad, *[p.grad.clone() for p in layer.parameters() if p.grad is not None]]  # type: ignore


def example(kind: type[Layer]) -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    return kind(), torch.randn(2, 5, WIDTH)
