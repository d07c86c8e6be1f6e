"""The attentions as `torch.nn` modules: projections, operator, KV cache. `modules` has them under its own name."""

from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, _registration
from .kv_cache import KVCache
from .local_attention_2d import local_attention_2d, local_attention_2d_decode
from .three_region_attention import three_region_attention, three_region_attention_decode


class _Attention(nn.Module):
    """Projections to heads of query, key and value, and of what attention makes of them.

    Parameters are read in the forward of their own module alone, so that projections can be replaced (LoRA,
    quantisation), moved (offloading) or sharded; tensor parallelism splits q, k and v by columns and out by rows.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        bias: bool,
        pattern: dict[str, Any],
        **factory: Any,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        embed_dim = _checks.integer(embed_dim, "embed_dim", 1)
        num_heads = _checks.integer(num_heads, "num_heads", 1)
        num_kv_heads = _checks.integer(num_kv_heads, "num_kv_heads", 1)
        _checks.require(
            num_heads % num_kv_heads == 0, "num_kv_heads", lambda: f"a divisor of {num_heads} heads", num_kv_heads
        )
        if head_dim is None:
            _checks.require(
                embed_dim % num_heads == 0, "num_heads", lambda: f"a divisor of embed_dim {embed_dim}", num_heads
            )
            head_dim = embed_dim // num_heads
        head_dim = _checks.integer(head_dim, "head_dim", 1)
        self.num_heads, self.num_kv_heads, self.head_dim, self.pattern = num_heads, num_kv_heads, head_dim, pattern
        self.embed_dim = embed_dim
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, **factory)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Checkpoints from when the three projections were one, `qkv_proj`, still load."""
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        for kind in ("weight", "bias"):
            whole = state_dict.pop(f"{prefix}qkv_proj.{kind}", None)
            if whole is not None:
                parts = zip("qkv", whole.split(sizes), strict=True)
                state_dict.update({f"{prefix}{name}_proj.{kind}": part for name, part in parts})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _empty_cache(self, batch_size: int, max_tokens: int, dtype: torch.dtype | None) -> KVCache:
        weight = self.k_proj.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():  # quantised
            return KVCache(batch_size, self.num_kv_heads, max_tokens, self.head_dim, dtype=dtype)
        local: Any = weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[operator]
        heads = max(1, local.shape[0] // self.head_dim)  # of those of this process where they are split up
        dtype = dtype or _registration.autocast_dtype(weight) or weight.dtype
        return KVCache(batch_size, heads, max_tokens, self.head_dim, device=weight.device, dtype=dtype)

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """`[B, heads, S, D]`, as many heads as come out: tensor parallelism gives each process its own."""
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _check_input(self, x: Tensor) -> None:
        _checks.tensor(x, "x", ndim=3)
        _checks.shape(x, "x", (*x.shape[:2], self.embed_dim))

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check_input(x)
        return self._heads(self.q_proj, x), self._heads(self.k_proj, x), self._heads(self.v_proj, x)

    def _project(self, out: Any) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return ", ".join([heads, *(f"{name}={value}" for name, value in self.pattern.items())])


class ThreeRegionAttention(_Attention):
    """Self-attention over a window of blocks and pivot tokens, with its projections; decodes with a `KVCache`.

    Args:
        embed_dim: C, size of what comes in and goes out.
        num_heads: H query heads.
        num_kv_heads: Hkv key and value heads, dividing H (grouped queries); H by default.
        head_dim: D, `embed_dim // num_heads` by default.
        bias: of all projections.
        block_size, window_blocks, pivot_bias, scale: as in `cogview_ops.three_region_attention`.
        device, dtype: of the parameters.

    Attributes:
        q_proj, k_proj, v_proj: Linear from C to the heads of query, key and value.
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
        pattern = {
            "block_size": _checks.integer(block_size, "block_size", 1),
            "window_blocks": _checks.integer(window_blocks, "window_blocks", 1),
            "pivot_bias": _checks.finite(pivot_bias, "pivot_bias"),
            "scale": None if scale is None else _checks.finite(scale, "scale"),
        }
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias, pattern, **factory)

    def make_cache(self, batch_size: int, max_tokens: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `forward`, on the parameters' device, in their dtype, under autocast in its own."""
        return self._empty_cache(batch_size, max_tokens, dtype)

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
        q, k, v = self._qkv(x)
        if cache is None:
            _checks.require(new_tokens is None, "new_tokens", "None without a cache", type(new_tokens).__name__)
            out: Any = three_region_attention(q, k, v, pivots, **self.pattern)
        else:
            ends = cache.append(k, v, new_tokens)
            out = three_region_attention_decode(q, cache.keys, cache.values, pivots, ends, **self.pattern)
        return self._project(out)


class LocalAttention2d(_Attention):
    """Self-attention of an image's tokens in a window, with its projections; raster-causal it decodes with a `KVCache`.

    Args:
        embed_dim, num_heads, num_kv_heads, head_dim, bias: as of `ThreeRegionAttention`.
        grid, kernel_size, dilation, edge, raster_causal, prefix_bias, coarse_grid, coarse_kernel_size, coarse_bias,
            scale: as in `cogview_ops.local_attention_2d`.
        rel_pos_bias: learn a bias by relative position (NATTEN's name).
        device, dtype: of the parameters.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: as of `ThreeRegionAttention`.
        rpb: the bias, `[num_heads, 2 * kh - 1, 2 * kw - 1]`, or None.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        grid: tuple[int, int],
        kernel_size: tuple[int, int],
        dilation: int | tuple[int, int] = 1,
        edge: str = "clip",
        raster_causal: bool = False,
        prefix_bias: float = 0.0,
        coarse_grid: tuple[int, int] | None = None,
        coarse_kernel_size: tuple[int, int] | None = None,
        coarse_bias: float = 0.0,
        rel_pos_bias: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        **factory: Any,
    ) -> None:
        window = _checks.local_window(grid, kernel_size, dilation, raster_causal, edge)
        _checks.together(coarse_grid=coarse_grid, coarse_kernel_size=coarse_kernel_size)
        if coarse_grid is not None:
            coarse_grid, coarse_kernel_size = _checks.coarse_window(window.grid, coarse_grid, coarse_kernel_size)
        pattern = {
            "grid": window.grid,
            "kernel_size": window.kernel_size,
            "dilation": window.dilation,
            "prefix_bias": _checks.finite(prefix_bias, "prefix_bias"),
            "coarse_grid": coarse_grid,
            "coarse_kernel_size": coarse_kernel_size,
            "coarse_bias": _checks.finite(coarse_bias, "coarse_bias"),
            "scale": None if scale is None else _checks.finite(scale, "scale"),
        }
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, bias, pattern, **factory)
        self.edge, self.raster_causal = edge, raster_causal
        _checks.boolean(rel_pos_bias, "rel_pos_bias")
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            table = (2 * k - 1 for k in window.kernel_size)
            self.rpb = nn.Parameter(torch.empty(self.num_heads, *table, **factory))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, S, D]` of other tokens `[B, S, C]`, text or a coarser image, for `forward`."""
        return self(x, only_keys_values=True)  # by way of forward: FSDP gathers parameters before that

    def make_cache(self, batch_size: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for an image a sample, on the parameters' device, in their dtype, under autocast
        in its own."""
        grid = self.pattern["grid"]
        return self._empty_cache(batch_size, grid[0] * grid[1], dtype)

    def forward(self, x: Tensor, cache: KVCache | None = None, *, only_keys_values: bool = False, **others: Any) -> Any:
        """Shape and dtype of `x` `[B, H*W, C]`, or `[B, S, C]` with a cache.

        Args:
            cache: x are the next S image tokens of its samples, and are appended; raster-causal, inference only.
            only_keys_values: return those of x and do no more: `keys_values`.
            others: key_mask, prefix_key, prefix_value, prefix_mask, coarse_key and coarse_value, as in
                `cogview_ops.local_attention_2d`; `keys_values` makes keys and values.
        """
        if only_keys_values:
            self._check_input(x)
            return self._heads(self.k_proj, x), self._heads(self.v_proj, x)
        q, k, v = self._qkv(x)
        others["bias"] = self.rpb
        if cache is None:
            window: dict[str, Any] = {"edge": self.edge, "raster_causal": self.raster_causal, **self.pattern}
            out: Any = local_attention_2d(q, k, v, **window, **others)
        else:
            causal = self.raster_causal
            _checks.require(causal, "cache", "None where attention is not raster_causal", type(cache).__name__)
            ends = cache.append(k, v)
            out = local_attention_2d_decode(q, cache.keys, cache.values, ends, **self.pattern, **others)
        return self._project(out)

    def extra_repr(self) -> str:
        bias = "" if self.rpb is None else ", rel_pos_bias=True"
        return f"{super().extra_repr()}, edge={self.edge}, raster_causal={self.raster_causal}{bias}"
