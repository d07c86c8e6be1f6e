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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .attention_modules import LocalAttention2d, ThreeRegionAttention
from .kv_cache import KVCache
from .pb_relax_softmax import pb_relax_softmax
from .sandwich_layer_norm import layer_norm, sandwich_layer_norm
from .sandwich_rms_norm import rms_norm, sandwich_rms_norm

__all__ = [
    "KVCache",
    "LocalAttention2d",
    "PBRelaxLayerNorm",
    "PBRelaxSoftmax",
    "RMSNorm",
    "SandwichLayerNorm",
    "SandwichRMSNorm",
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


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension (same parameter, same checkpoint) as language models have it.

    Args:
        dim: size D of the last dimension.
        eps, weight_offset, round_before_weight: as in `cogview_ops.rms_norm`; a new weight is 1 - weight_offset. There
            is no eps=None.
        elementwise_affine, device, dtype: of the weight, as in `torch.nn.RMSNorm`.
    """

    eps: float

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        round_before_weight: bool = False,
        **factory: Any,
    ) -> None:
        self.weight_offset = _checks.finite(weight_offset, "weight_offset")  # for what fills the weight, next
        super().__init__(_checks.integer(dim, "dim", 1), _checks.finite(eps, "eps", positive=True), **factory)
        self.round_before_weight = round_before_weight

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1 - self.weight_offset)

    def forward(self, input: Tensor) -> Tensor:
        """Shape and dtype of `input`, `[..., D]`; under autocast its dtype."""
        rounds = self.round_before_weight
        return rms_norm(input, self.weight, eps=self.eps, weight_offset=self.weight_offset, round_before_weight=rounds)

    def extra_repr(self) -> str:
        options = f"weight_offset={self.weight_offset}, round_before_weight={self.round_before_weight}"
        return f"{super().extra_repr()}, {options}"


class _Lender(nn.Module):
    """A norm that is fused with another: its `forward` can lend weights to who computes with both.

    What shards, offloads or gathers parameters (FSDP, accelerate) has them there for as long as the forward of their
    module runs, so both norms' forwards run around the operator.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, use: Callable[..., Any] | None = None) -> Any:
        if use is None:
            return super().forward(input)
        names = ("weight", "bias") if isinstance(self, nn.LayerNorm) else ("weight",)
        return use(input, residual, **{name: getattr(self, name) for name in names})


class _LayerNorm(_Lender, PBRelaxLayerNorm): ...


class _RMSNorm(_Lender, RMSNorm): ...


class _Step(nn.Module):
    """`post` closes the sub-layer that gave `branch`; `pre` opens the next one; one of them may not be there."""

    def __init__(
        self,
        op: Callable[..., Any],
        norm: Callable[[], nn.Module],
        norms: str,
        branch_scale: float,
        dropout_p: float,
        dropout_after_norm: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        _checks.choice(norms, "norms", ("both", "pre", "post"))
        for name in ("post", "pre"):
            setattr(self, name, norm() if norms in (name, "both") else None)
        self.norms, self.dropout_after_norm = norms, dropout_after_norm
        self.branch_scale = _checks.finite(branch_scale, "branch_scale")
        self.dropout_p = _checks.probability(dropout_p, "dropout_p")
        _checks.boolean(dropout_after_norm, "dropout_after_norm")
        self._op, self._options = op, options

    def forward(
        self,
        branch: Tensor,
        residual: Tensor,
        seed: int | Tensor | None = None,
        branch_scale: float | Tensor | None = None,
    ) -> Any:
        """`(h, x)`: h with shape and dtype of `residual` `[..., D]`, x of `branch`, which may be in a lower dtype; with
        norms="post" h alone.

        `seed`, one or a tensor `[B]` of one for each sample, decides what dropout drops; by default one is drawn from
        the generator of the branch's device, without waiting for it. `branch_scale`, in place of the module's:
        drop-path of samples, gates of tokens.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        if dropout_p > 0 and seed is None:
            seed = torch.randint(2**63 - 1, (), device=branch.device)
        options: dict[str, Any] = {"norms": self.norms, "dropout_after_norm": self.dropout_after_norm}
        options |= {"branch_scale": self.branch_scale if branch_scale is None else branch_scale}
        options |= {"dropout_p": dropout_p, "seed": seed}

        def lend(names: tuple[str, ...], branch: Tensor, residual: Tensor, given: dict[str, Any]) -> Any:
            if not names:
                return self._op(branch, residual, **given, **options, **self._options)

            def use(branch: Tensor, residual: Tensor, **weights: Tensor | None) -> Any:
                mine = {f"{names[0]}_{key}": weight for key, weight in weights.items()}
                return lend(names[1:], branch, residual, given | mine)

            return getattr(self, names[0])(branch, residual, use)

        return lend(("post", "pre") if self.norms == "both" else (self.norms,), branch, residual, {})

    def extra_repr(self) -> str:
        dropout = f"dropout_p={self.dropout_p}, dropout_after_norm={self.dropout_after_norm}"
        return f"norms={self.norms!r}, branch_scale={self.branch_scale}, {dropout}"


class SandwichLayerNorm(_Step):
    """One step of a transformer with LayerNorm, `h = residual + branch_scale * post(dropout(branch))`, `x = pre(h)`.

    `post` closes the sub-layer that gave `branch`; `pre` opens the next one.

    Args:
        dim: size D of the last dimension.
        eps, relax: as in `cogview_ops.sandwich_layer_norm`, for both norms.
        norms: "both", "pre" or "post", those that there are.
        branch_scale: a number; a call may have another, or a tensor.
        dropout_p: of `branch`, in training mode.
        dropout_after_norm: dropout of `post(branch)` instead.
        elementwise_affine, bias, device, dtype: of the parameters of both, as in `torch.nn.LayerNorm`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        relax: str | None = "row",
        norms: str = "both",
        branch_scale: float = 1.0,
        dropout_p: float = 0.0,
        dropout_after_norm: bool = False,
        **factory: Any,
    ) -> None:
        options: dict[str, Any] = {"eps": eps, "relax": relax}
        norm = partial(_LayerNorm, dim, **options, **factory)
        super().__init__(sandwich_layer_norm, norm, norms, branch_scale, dropout_p, dropout_after_norm, **options)


class SandwichRMSNorm(_Step):
    """The same step with RMSNorm.

    Args:
        dim: size D of the last dimension.
        eps, weight_offset, round_before_weight: as in `cogview_ops.sandwich_rms_norm`, for both norms.
        norms, branch_scale, dropout_p, dropout_after_norm: as in `SandwichLayerNorm`.
        elementwise_affine, device, dtype: of the weights of both, as in `torch.nn.RMSNorm`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        round_before_weight: bool = False,
        norms: str = "both",
        branch_scale: float = 1.0,
        dropout_p: float = 0.0,
        dropout_after_norm: bool = False,
        **factory: Any,
    ) -> None:
        options: dict[str, Any] = {"eps": eps, "weight_offset": weight_offset}
        options |= {"round_before_weight": round_before_weight}
        norm = partial(_RMSNorm, dim, **options, **factory)
        super().__init__(sandwich_rms_norm, norm, norms, branch_scale, dropout_p, dropout_after_norm, **options)
