"""`register`: the operators as attention implementations of transformers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ... import _checks, _dispatch
from . import local_2d, pb_relax, sequences, three_region
from .pivots import Pivots, Policy, block_pivots
from .refuse import refuse_models_without_interface


def register(
    *,
    pivots: Policy | None = None,
    block_size: int = 128,
    window_blocks: int = 6,
    pivots_per_block: int | None = None,
    pivot_bias: float = 0.0,
    alpha: float = 32.0,
    grid: tuple[int, int] | None = None,
    kernel_size: tuple[int, int] | None = None,
    dilation: int | tuple[int, int] = 1,
    edge: str = "clip",
    prefix: int = 0,
    impl: str = "auto",
) -> None:
    """Give transformers three attention implementations, for `model.set_attn_implementation(name)` and
    `attn_implementation=name`. Called again it sets all their options anew, also for models that use them already.

    - "cogview_three_region": `three_region_attention` instead of causal self-attention. Every query sees its window of
      blocks and the pivots before it, by the same pattern in training, evaluation and `generate`, whose cache may be
      dynamic or static. Positions and blocks count from the begin of each sequence, behind padding on the left too.
      Sequences are packed where `position_ids` begin anew, or as `cu_seq_lens_q` and `cu_seq_lens_k` say, which
      torch.compile needs: a graph does not know how many sequences it will be given, and raises if they are several.
    - "cogview_local_2d": `local_attention_2d` in models whose tokens are `prefix` tokens (class, registers, text) and
      an image grid. The prefix sees everything, the image the prefix and its neighbourhood. In a causal module the
      image is in raster order and may be unfinished, and the prefix sees the prefix. No padding, no cache.
    - "cogview_pb_relax": `pb_relax_attention`, with any mask: what eager attention gives, but zeros where a query sees
      nothing, and no overflow in float16.

    What an operator cannot do raises when a model asks for it: dropout of weights in training, soft capping, sinks,
    and of the first two sliding windows, other 4D masks, biases and weights as output.

    Args:
        pivots: `pivots(length, device)` returns int64 `[P]`, the pivots of a sequence, ascending. Those of a shorter
            sequence must be the first of those of a longer one, so that decoding sees what the prompt saw. By default
            `block_pivots`: the first block and `pivots_per_block` tokens of each later one, drawn by a hash of their
            place.
        block_size, window_blocks, pivot_bias: of `three_region_attention`.
        pivots_per_block: of `block_pivots`, by default a 16th of block_size. Not beside pivots.
        alpha: of `pb_relax_attention`.
        grid: (H, W) of `local_attention_2d`, by default a square.
        kernel_size, dilation, edge: of `local_attention_2d`; kernel_size has no default.
        prefix: how many tokens stand before the image.
        impl: of all three.

    Raises:
        ValueError, TypeError: for an option that no model could be given. What depends on the model, such as a grid of
            another number of tokens, raises when a model runs.
    """
    block_size = _checks.integer(block_size, "block_size", 1)
    window_blocks = _checks.integer(window_blocks, "window_blocks", 1)
    pivot_bias = _checks.finite(pivot_bias, "pivot_bias")
    alpha = _checks.finite(alpha, "alpha", positive=True)
    prefix = _checks.integer(prefix, "prefix", 0)
    _checks.choice(impl, "impl", _dispatch.IMPLS)
    size = (1, 1) if kernel_size is None else kernel_size
    _checks.local_window(_checks.ANY_GRID if grid is None else grid, size, dilation, edge=edge)
    if pivots is not None:
        _checks.require(pivots_per_block is None, "pivots_per_block", "None beside pivots", pivots_per_block)
        _checks.require(callable(pivots), "pivots", "a function of a length and a device", lambda: repr(pivots))
    else:
        each = max(block_size // 16, 1) if pivots_per_block is None else pivots_per_block
        each = _checks.integer(each, "pivots_per_block", 1)
        _checks.require(each <= block_size, "pivots_per_block", f"at most block_size {block_size}", each)
        pivots = partial(block_pivots, block_size=block_size, pivots_per_block=each)
    pattern = {"block_size": block_size, "window_blocks": window_blocks, "pivot_bias": pivot_bias}
    window = {"kernel_size": kernel_size, "dilation": dilation, "edge": edge}
    functions: dict[str, tuple[Any, Any]] = {
        three_region.NAME: (three_region.ThreeRegion(Pivots(pivots), **pattern, impl=impl), sequences.mask),
        local_2d.NAME: (partial(local_2d.attend, {**window, "impl": impl}, grid, prefix), local_2d.mask),
        pb_relax.NAME: (partial(pb_relax.attend, {"alpha": alpha, "impl": impl}), pb_relax.mask),
    }
    for name, (attention, mask) in functions.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, partial(_mask, mask))


def _mask(mask: Callable[..., Tensor | None], *, config: Any = None, **described: Any) -> Tensor | None:
    if config is not None:
        refuse_models_without_interface(type(config))
    return mask(**described)
