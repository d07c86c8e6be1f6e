"""The operators as `torch.nn` modules, for models that are built from modules.

Three-region attention in training and in decoding:

    attention = ThreeRegionAttention(512, 8, block_size=64, window_blocks=3)
    position = torch.arange(1024)[None]
    pivots = sample_pivots(position < 64, position >= 64, num_pivots=256)  # all text, some of the image
    y = attention(x, pivots)  # x, y: [1, 1024, 512]

    with torch.no_grad():  # the same, token by token
        cache = attention.make_cache(batch_size=1, max_tokens=1024)
        prompt = attention(x[:, :64], pivots, cache)
        token = attention(x[:, 64:65], pivots, cache)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .attention_modules import LocalAttention2d, ThreeRegionAttention
from .kv_cache import KVCache
from .pb_relax_softmax import pb_relax_softmax
from .sandwich_layer_norm import layer_norm, sandwich_layer_norm

__all__ = [
    "KVCache",
    "LocalAttention2d",
    "PBRelaxLayerNorm",
    "PBRelaxSoftmax",
    "SandwichLayerNorm",
    "ThreeRegionAttention",
]


class PBRelaxSoftmax(nn.Module):
    """`pb_relax_softmax` with its options held: `forward(scores, mask=None)`.

    Args:
        alpha, causal: as in `cogview_ops.pb_relax_softmax`.
    """

    def __init__(self, alpha: float = 32.0, *, causal: bool = False) -> None:
        super().__init__()
        self.alpha = _checks.finite(alpha, "alpha", positive=True)
        self.causal = causal

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities of `scores` `[..., R, K]`, which are divided by alpha."""
        return pb_relax_softmax(scores, alpha=self.alpha, mask=mask, causal=self.causal)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, causal={self.causal}"


class PBRelaxLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension (same parameters, same checkpoint) with PB-relax.

    Args:
        dim: size D of the last dimension.
        eps, relax: as in `cogview_ops.layer_norm`.
        elementwise_affine, bias, device, dtype: of the parameters, as in `torch.nn.LayerNorm`.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, relax: str | None = "row", **factory: Any) -> None:
        super().__init__(_checks.integer(dim, "dim", 1), _checks.finite(eps, "eps", positive=True), **factory)
        self.relax = relax

    def forward(self, input: Tensor) -> Tensor:
        """Shape and dtype of `input`, `[..., D]`; under autocast its dtype."""
        return layer_norm(input, self.weight, self.bias, eps=self.eps, relax=self.relax)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relax={self.relax!r}"


class _Lender(PBRelaxLayerNorm):
    """A norm that is fused with another: its `forward` can lend weight and bias to who computes with both.

    What shards, offloads or gathers parameters (FSDP, accelerate) has them there for as long as the forward of their
    module runs, so both norms' forwards run around the operator.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, use: Callable[..., Any] | None = None) -> Any:
        return super().forward(input) if use is None else use(input, residual, self.weight, self.bias)


class SandwichLayerNorm(nn.Module):
    """One step of a Sandwich-LN transformer, `h = residual + post(dropout(branch))` and `x = pre(h)`.

    `post` closes the sub-layer that gave `branch`; `pre` opens the next one.

    Args:
        dim: size D of the last dimension.
        eps, relax: as in `cogview_ops.sandwich_layer_norm`, for both norms.
        dropout_p: of `branch`, in training mode.
        elementwise_affine, bias, device, dtype: of the parameters of both, as in `torch.nn.LayerNorm`.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, *, relax: str | None = "row", dropout_p: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        self.post = _Lender(dim, eps, relax=relax, **factory)
        self.pre = _Lender(dim, eps, relax=relax, **factory)
        self.dropout_p = _checks.finite(dropout_p, "dropout_p")

    def forward(self, branch: Tensor, residual: Tensor, seed: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(h, x)`: h with shape and dtype of `residual` `[..., D]`, x of `branch`, which may be in a lower dtype.

        `seed` decides what dropout drops; by default it is drawn from the generator of the branch's device, without
        waiting for it.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        if dropout_p > 0 and seed is None:
            seed = torch.randint(2**63 - 1, (), device=branch.device)
        options: dict[str, Any] = {"eps": self.post.eps, "relax": self.post.relax, "dropout_p": dropout_p, "seed": seed}

        def outer(branch: Tensor, residual: Tensor, *post: Any) -> tuple[Tensor, Tensor]:
            def inner(branch: Tensor, residual: Tensor, *pre: Any) -> tuple[Tensor, Tensor]:
                return sandwich_layer_norm(branch, residual, *post, *pre, **options)

            return self.pre(branch, residual, inner)

        return self.post(branch, residual, outer)

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}"
