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

from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .kv_cache import KVCache
from .pb_relax_softmax import pb_relax_softmax
from .sandwich_layer_norm import layer_norm, sandwich_layer_norm
from .three_region_attention import three_region_attention, three_region_attention_decode

__all__ = ["KVCache", "PBRelaxLayerNorm", "PBRelaxSoftmax", "SandwichLayerNorm", "ThreeRegionAttention"]


class PBRelaxSoftmax(nn.Module):
    """`pb_relax_softmax` with its options held: `forward(scores, mask=None)`.

    Args:
        alpha, causal: as in `cogview_ops.pb_relax_softmax`.
    """

    def __init__(self, alpha: float = 32.0, *, causal: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
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
        device, dtype: of the parameters.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, relax: str | None = "row", **factory: Any) -> None:
        super().__init__(dim, eps, **factory)
        self.relax = relax

    def forward(self, input: Tensor) -> Tensor:
        """Shape and dtype of `input`, `[..., D]`."""
        return layer_norm(input, self.weight, self.bias, eps=self.eps, relax=self.relax)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relax={self.relax!r}"


class SandwichLayerNorm(nn.Module):
    """One step of a Sandwich-LN transformer, `h = residual + post(dropout(branch))` and `x = pre(h)`.

    `post` closes the sub-layer that gave `branch`; `pre` opens the next one.

    Args:
        dim: size D of the last dimension.
        eps, relax: as in `cogview_ops.sandwich_layer_norm`, for both norms.
        dropout_p: of `branch`, in training mode.
        device, dtype: of the parameters.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, *, relax: str | None = "row", dropout_p: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        self.post = PBRelaxLayerNorm(dim, eps, relax=relax, **factory)
        self.pre = PBRelaxLayerNorm(dim, eps, relax=relax, **factory)
        self.dropout_p = dropout_p

    def forward(self, branch: Tensor, residual: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """`(h, x)`, both with shape and dtype of `branch` `[..., D]`.

        `seed` decides what dropout drops; by default it is drawn from torch's CPU generator, which cannot be done
        inside `torch.compile(fullgraph=True)`.
        """
        dropout_p = self.dropout_p if self.training else 0.0
        if dropout_p > 0 and seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        return sandwich_layer_norm(
            branch,
            residual,
            self.post.weight,
            self.post.bias,
            self.pre.weight,
            self.pre.bias,
            eps=self.post.eps,
            relax=self.post.relax,
            dropout_p=dropout_p,
            seed=seed,
        )

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}"


class ThreeRegionAttention(nn.Module):
    """Self-attention over a window of blocks and pivot tokens, with its projections; decodes with a `KVCache`.

    Args:
        embed_dim: C, size of what comes in and goes out.
        num_heads: H query heads.
        num_kv_heads: Hkv key and value heads, dividing H (grouped queries); H by default.
        head_dim: D, `embed_dim // num_heads` by default.
        bias: of both projections.
        block_size, window_blocks, pivot_bias, scale: as in `cogview_ops.three_region_attention`.
        device, dtype: of the parameters.

    Attributes:
        qkv_proj: Linear from C to the heads of query, key and value, one after the other.
        out_proj: Linear from the query heads back to C.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        block_size: int = 128,
        window_blocks: int = 6,
        pivot_bias: float = 0.0,
        scale: float | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _checks.integer(embed_dim, "embed_dim", 1)
        _checks.integer(num_heads, "num_heads", 1)
        _checks.integer(num_kv_heads, "num_kv_heads", 1)
        _checks.require(num_heads % num_kv_heads == 0, "num_kv_heads", f"a divisor of {num_heads} heads", num_kv_heads)
        if head_dim is None:
            _checks.require(embed_dim % num_heads == 0, "num_heads", f"a divisor of embed_dim {embed_dim}", num_heads)
            head_dim = embed_dim // num_heads
        _checks.integer(head_dim, "head_dim", 1)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.pattern: dict[str, Any] = {
            "block_size": block_size,
            "window_blocks": window_blocks,
            "pivot_bias": pivot_bias,
            "scale": scale,
        }
        self.qkv_proj = nn.Linear(embed_dim, (num_heads + 2 * num_kv_heads) * head_dim, bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, **factory)

    def make_cache(self, batch_size: int, max_tokens: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `forward`, on the parameters' device, in their dtype (under autocast: give its dtype)."""
        weight = self.qkv_proj.weight
        return KVCache(
            batch_size, self.num_kv_heads, max_tokens, self.head_dim, device=weight.device, dtype=dtype or weight.dtype
        )

    def forward(
        self, x: Tensor, pivots: Tensor, cache: KVCache | None = None, new_tokens: Tensor | None = None
    ) -> Tensor:
        """Shape and dtype of `x` `[B, S, C]`.

        Args:
            pivots: `[B, P]`, as in `cogview_ops.three_region_attention`; of the whole sequence, also when decoding.
            cache: x are the next S tokens of its samples, and are appended; inference only.
            new_tokens: with a cache, int32 or int64 `[B]`: how many of x's tokens count, if the rest is padding at the
                end. What comes out for padding means nothing.
        """
        _checks.tensor(x, "x", ndim=3)
        _checks.shape(x, "x", (*x.shape[:2], self.qkv_proj.in_features))
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if cache is None:
            _checks.require(new_tokens is None, "new_tokens", "None without a cache", type(new_tokens).__name__)
            out: Any = three_region_attention(q, k, v, pivots, **self.pattern)
        else:
            ends = cache.append(k, v, new_tokens)
            out = three_region_attention_decode(q, cache.keys, cache.values, pivots, ends, **self.pattern)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return ", ".join([heads, *(f"{name}={value}" for name, value in self.pattern.items())])
