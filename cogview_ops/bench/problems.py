"""What is timed, made concrete: inputs, baselines, and the bytes, FLOPs and exponentials that no method can avoid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .. import (
    cogview2_attention,
    local_attention_2d,
    local_attention_2d_decode,
    patterns,
    sample_pivots,
    three_region_attention,
    three_region_attention_decode,
    three_region_attention_varlen,
)
from ..modules import KVCache
from . import baselines, packages

Contestant = Callable[..., Any] | str  # a string says why there is none


@dataclass(frozen=True)
class Problem:
    """One case made concrete. Every function takes `inputs` and returns a tensor or a tuple of them."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]  # takes also impl=
    baselines: dict[str, Contestant]  # the same result
    others: dict[str, Contestant]  # another result: dense attention, a softmax without the relaxation
    bytes: int  # read and written at least, forward and backward
    flops: int = 0  # of matrix products
    exps: int = 0  # exponentials
    tokens: int = 0  # whose time is worth telling one by one
    sample: Callable[[Tensor], Tensor] = lambda x: x  # part that float64 can check in little memory
    truth: Callable[..., Any] | None = None  # in float64; by default ours with impl="reference"

    def only(self, names: Sequence[str]) -> "Problem":
        """With these of its baselines and others alone."""
        same, others = ({n: f for n, f in x.items() if n in names} for x in (self.baselines, self.others))
        return replace(self, baselines=same, others=others)


def on_gpu() -> bool:
    """Where the case is being built: some baselines are for a GPU alone."""
    return torch.get_default_device().type == "cuda"


def gpu_only(**contestants: Contestant) -> dict[str, Contestant]:
    return {name.replace("_", " "): f for name, f in contestants.items()} if on_gpu() else {}


def heads_of_one_key_head(kv_heads: int, x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // kv_heads]


def self_attention(
    op: Callable[..., Any],
    pairs: int,
    shape: tuple[int, int, int],
    same: dict[str, Contestant],
    dense: dict[str, Contestant],
    dtype: torch.dtype,
    back: bool,
    coarse: int = 0,
) -> Problem:
    """Self-attention over so many pairs a head: 2 matrix products forward, 5 backward, both with all exponentials;
    with so many other keys and values."""
    heads, seqlen, dim = shape
    inputs = tuple(torch.randn(1, heads, seqlen, dim, dtype=dtype) for _ in range(3))
    others = tuple(torch.randn(1, heads, coarse, dim, dtype=dtype) for _ in range(2 * bool(coarse)))
    return Problem(
        inputs + others,
        op,
        same,
        dense,
        bytes=(12 if back else 4) * inputs[0].nbytes + (3 if back else 1) * sum(x.nbytes for x in others),
        flops=(7 if back else 2) * 2 * pairs * heads * dim,
        exps=(2 if back else 1) * pairs * heads,
        tokens=seqlen,
        sample=partial(heads_of_one_key_head, heads),
    )


BLOCK, WINDOW = 128, 6
DENSE = 8448  # tokens up to which the baselines with a mask of all pairs are run
LEFT_OUT = f"left out above {DENSE} tokens, memory and time are quadratic"


def check_tokens(tokens: int) -> None:
    """Of problems whose baselines all have a mask of all pairs."""
    if tokens > DENSE:
        raise ValueError(f"expected at most {DENSE} tokens, of which a mask of all pairs is made, got {tokens}")


def spread_pivots(seqlen: int, text: int, total: int) -> Tensor:
    """All text and a random sample of the image, `[1, total]`."""
    position = torch.arange(seqlen)[None]
    return sample_pivots(position < text, position >= text, total)


def three_region(dtype: torch.dtype, back: bool, *, heads=16, seqlen=4224, dim=64, pivots=768, text=128) -> Problem:
    if seqlen > 4224 and seqlen % BLOCK:
        raise ValueError(f"seqlen: expected a multiple of {BLOCK} above 4224 tokens, got {seqlen}")
    chosen = spread_pivots(seqlen, text, pivots)
    position = torch.arange(seqlen)
    window_start = (position // BLOCK + 1 - WINDOW).clamp(min=0) * BLOCK
    before = torch.searchsorted(chosen[0], window_start.int())
    is_pivot = torch.isin(position, chosen)

    def sees(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        near = patterns.three_region_window(i, j, BLOCK, WINDOW)
        return near | is_pivot[j] & patterns.three_region_pivot(i, j, BLOCK, WINDOW)

    published = baselines.published_three_region(chosen, BLOCK, WINDOW)
    same: dict[str, Contestant] = dict.fromkeys(("vanilla", "masked SDPA", "FlexAttention"), LEFT_OUT)
    if seqlen <= DENSE:
        mask = sees(0, 0, position[:, None], position)
        same = {"vanilla": baselines.vanilla_attention(mask), "masked SDPA": baselines.sdpa(mask)}
        same["FlexAttention"] = baselines.flex_attention(sees, seqlen)
    dense: dict[str, Contestant] = {"causal SDPA": baselines.sdpa(causal=True)}
    dense |= gpu_only(
        flash_causal_SDPA=baselines.sdpa(causal=True, backend=SDPBackend.FLASH_ATTENTION),
        cuDNN_causal_SDPA=baselines.sdpa(causal=True, backend=SDPBackend.CUDNN_ATTENTION),
    )
    problem = self_attention(
        partial(three_region_attention, pivots=chosen),
        int((position + 1 - window_start + before).sum()),
        (heads, seqlen, dim),
        same | {"published formula": published},
        dense,
        dtype,
        back,
    )
    return problem if seqlen <= 4224 else replace(problem, truth=published)  # the reference is quadratic


def three_region_varlen(
    dtype: torch.dtype,
    back: bool,
    *,
    lengths: tuple[int, ...] = (1024,) * 4,
    heads=8,
    kv_heads: int | None = None,
    dim=64,
    pivots=256,
    text=64,
) -> Problem:
    """Packed sequences; what users have instead is a batch as long as the longest, or a mask of all pairs. With equal
    ones the batch form alone, since whoever is timed after something long is slower, by 10 % here."""
    total, longest, kv_heads = sum(lengths), max(lengths), kv_heads or heads
    check_tokens(total)
    ends = torch.tensor((0, *lengths)).cumsum(0).int()
    sequence, position = patterns.packed(ends, total)
    chosen = sample_pivots(position < text, position >= text, pivots, cu_seqlens=ends)
    window, pivot = patterns.three_region_packed_masks(chosen, ends, total, BLOCK, WINDOW)
    mask, same = window | pivot, sequence[:, None] == sequence

    def sees(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        return mask[i, j]

    batch = partial(three_region_attention, pivots=chosen)
    alike: dict[str, Contestant] = {"batch form": baselines.of_padded(batch, lengths)}
    dense: dict[str, Contestant] = {}
    if min(lengths) < longest:
        alike["masked SDPA"] = baselines.of_packed(baselines.sdpa(mask))
        alike["FlexAttention"] = baselines.of_packed(baselines.flex_attention(sees, total))
        causal = baselines.sdpa(same & (position[:, None] >= position))
        dense["block-diagonal causal SDPA"] = baselines.of_packed(causal)
    pairs = int(mask.sum())
    query = torch.randn(total, heads, dim, dtype=dtype)
    key, value = torch.randn(2, total, kv_heads, dim, dtype=dtype)
    return Problem(
        (query, key, value),
        partial(three_region_attention_varlen, pivots=chosen, cu_seqlens=ends, max_seqlen=longest),
        alike,
        dense,
        bytes=(6 if back else 2) * (query.nbytes + key.nbytes),
        flops=(7 if back else 2) * 2 * pairs * heads * dim,
        exps=(2 if back else 1) * pairs * heads,
        tokens=total,
        sample=partial(heads_of_one_key_head, kv_heads),
    )


def full_cache(query: Tensor, length: int, pivots: Tensor) -> Contestant:
    """The operator against a KVCache that holds `length` tokens."""
    batch, heads, _, dim = query.shape
    cache = KVCache(batch, heads, length, dim, dtype=query.dtype, device=query.device)
    cache.append(*torch.randn(2, batch, heads, length, dim, dtype=query.dtype))
    return lambda query, *_: three_region_attention_decode(
        query, cache.keys, cache.values, pivots, cache.lengths, block_size=BLOCK, window_blocks=WINDOW
    )


def three_region_decode(
    dtype: torch.dtype,
    back: bool,
    *,
    lengths: tuple[int, ...] = (4224,),
    heads=16,
    kv_heads: int | None = None,
    dim=64,
    pivots=768,
    text=128,
) -> Problem:
    """The last token of every sample against its cache."""
    kv_heads = kv_heads or heads
    chosen = torch.cat([spread_pivots(length, text, pivots) for length in lengths])
    batch, room, ends = len(lengths), max(lengths), torch.tensor(lengths)
    window, pivot = patterns.three_region_masks(ends[:, None] - 1, room, chosen, BLOCK, WINDOW)
    mask = (window | pivot)[:, None]
    cached = None if min(lengths) == room else (torch.arange(room) < ends[:, None])[:, None, None]
    query = torch.randn(batch, heads, 1, dim, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, room, dim, dtype=dtype)
    keys = int(mask.sum())
    others: dict[str, Contestant] = {"SDPA over the cache": baselines.sdpa(cached)}
    if lengths == (4224,):  # as many keys to see in a short and a long cache
        for length in (4224, 33792):
            others[f"KVCache of {length}"] = full_cache(query, length, spread_pivots(length, text, pivots))
    return Problem(
        (query, key, value),
        partial(three_region_attention_decode, pivots=chosen, cache_seqlens=ends),
        {
            "vanilla": baselines.vanilla_attention(mask),
            "masked SDPA": baselines.sdpa(mask),
            "gathered SDPA": baselines.gathered_sdpa(mask),
        },
        others,
        bytes=2 * query.element_size() * (keys * kv_heads + batch * heads) * dim,
        flops=2 * 2 * keys * heads * dim,
        exps=keys * heads,
        tokens=batch,
        sample=partial(heads_of_one_key_head, kv_heads),
    )


def _pairs(grid: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> int:
    """Of queries and keys in windows that end at the edges."""
    rows, columns = (
        sum(max(n - abs(o) * d, 0) for o in range(-(k // 2), k // 2 + 1))
        for n, k, d in zip(grid, kernel, dilation, strict=True)
    )
    return rows * columns


UNFOLDED = 2**30  # bytes of copied keys up to which F.unfold is run


def local_2d(
    dtype: torch.dtype,
    back: bool,
    *,
    heads=16,
    grid=(64, 64),
    dim=64,
    kernel=(9, 9),
    dilation=(1, 1),
    causal=False,
    alone=False,
    without: Sequence[str] = (),
) -> Problem:
    """`alone`: without baselines, where only sizes are compared with each other; `without`: some that take long."""
    seqlen = grid[0] * grid[1]
    window: dict[str, Any] = {"grid": grid, "kernel_size": kernel, "dilation": dilation, "raster_causal": causal}
    pairs = _pairs(grid, kernel, dilation)
    pairs = (pairs + seqlen) // 2 if causal else pairs
    shifted = baselines.shifted_local(**window)
    same: dict[str, Contestant] = {}
    dense: dict[str, Contestant] = {}
    if not alone:
        same = dict.fromkeys(("vanilla", "masked SDPA"), LEFT_OUT)
        dense = {"global SDPA": baselines.sdpa(), "global vanilla": LEFT_OUT}
        if seqlen <= DENSE:
            i = torch.arange(seqlen)
            mask = patterns.local_2d(i[:, None], i, **window)
            same = {"vanilla": baselines.vanilla_attention(mask), "masked SDPA": baselines.sdpa(mask)}
            dense["global vanilla"] = baselines.vanilla_attention(None)
        same["FlexAttention"] = flex(lambda b, h, i, j: patterns.local_2d(i, j, **window), dtype, back, seqlen)
        copied = heads * seqlen * dim * kernel[0] * kernel[1] * dtype.itemsize
        unfolded: Contestant = f"left out, its copies of the keys alone would take {copied / 1e9:.1f} GB"
        same["F.unfold"] = baselines.unfolded_local(**window) if copied <= UNFOLDED else unfolded
    for name in without:
        (same if name in same else dense).pop(name)
    op = partial(local_attention_2d, **window)
    problem = self_attention(op, pairs, (heads, seqlen, dim), same, dense, dtype, back)
    return replace(problem, truth=shifted) if alone or seqlen > DENSE else problem  # the reference is quadratic


NO_BACKWARD = "left out, on CPU it has no backward"


def flex(mask_mod: Callable[..., Tensor], dtype: torch.dtype, back: bool, *shape: int) -> Contestant:
    if back and not on_gpu():
        return NO_BACKWARD
    if dtype != torch.bfloat16:
        return "left out but in bf16, compiling it takes longer than all the timing"
    return baselines.flex_attention(mask_mod, *shape)


def neighborhood(dtype: torch.dtype, back: bool, *, heads=8, grid=(56, 56), dim=32, kernel=(7, 7)) -> Problem:
    """NATTEN's: windows that move inward at the edges; sizes of DiNAT's first layers."""
    window: dict[str, Any] = {"grid": grid, "kernel_size": kernel, "raster_causal": False, "edge": "shift"}
    seqlen = grid[0] * grid[1]
    check_tokens(seqlen)

    def sees(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        return patterns.local_2d(i, j, **window)

    mask = sees(0, 0, torch.arange(seqlen)[:, None], torch.arange(seqlen))
    same: dict[str, Contestant] = {"masked SDPA": baselines.sdpa(mask)}
    same["FlexAttention"] = flex(sees, dtype, back, seqlen)
    same["NATTEN"] = NO_BACKWARD if back and not on_gpu() else packages.natten(grid, kernel)
    op, pairs = partial(local_attention_2d, **window), seqlen * kernel[0] * kernel[1]
    return self_attention(op, pairs, (heads, seqlen, dim), same, {"global SDPA": baselines.sdpa()}, dtype, back)


def local_2d_bias(dtype: torch.dtype, back: bool, *, heads=8, grid=(56, 56), dim=32, kernel=(7, 7)) -> Problem:
    """With a learned table by relative position, as in Swin and DiNAT."""
    window: dict[str, Any] = {"grid": grid, "kernel_size": kernel}
    seqlen = grid[0] * grid[1]
    check_tokens(seqlen)
    i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    mask = patterns.local_2d(i, j, **window, raster_causal=False)
    row, column = patterns.relative_2d(i, j, **window, dilation=(1, 1))
    query, key, value = torch.randn(3, 1, heads, seqlen, dim, dtype=dtype)
    table = torch.randn(heads, *(2 * k - 1 for k in kernel), dtype=dtype)
    whole: Any = flex(lambda b, h, i, j: patterns.local_2d(i, j, **window, raster_causal=False), dtype, back, seqlen)

    def masked(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        scores = table[:, row, column].masked_fill(~mask, float("-inf"))
        return baselines.sdpa(scores[None])(query, key, value)

    def flexible(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        def score(score: Tensor, b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
            return score + table[h, row[i, j], column[i, j]]

        return whole(query, key, value, score_mod=score)

    def ours(query: Tensor, key: Tensor, value: Tensor, table: Tensor, **how: Any) -> Any:
        return local_attention_2d(query, key, value, bias=table, **window, **how)

    without: dict[str, Contestant] = {"no table": lambda *tensors: local_attention_2d(*tensors[:3], **window)}
    pairs = _pairs(grid, kernel)
    return Problem(
        (query, key, value, table),
        ours,
        {"masked SDPA": masked, "FlexAttention": whole if isinstance(whole, str) else flexible},
        {} if back else without,
        bytes=(12 if back else 4) * query.nbytes,
        flops=(7 if back else 2) * 2 * pairs * heads * dim,
        exps=(2 if back else 1) * pairs * heads,
        tokens=seqlen,
    )


def upsampling(
    dtype: torch.dtype, back: bool, *, heads=4, grid=(64, 64), dim=64, coarse=(16, 16), cross=(5, 5)
) -> Problem:
    """Queries of a fine grid, keys of a coarse one alone, as in AnyUp; or a copy of each key for each query."""
    how: dict[str, Any] = {"grid": grid, "coarse_grid": coarse}
    seqlen, cells = grid[0] * grid[1], coarse[0] * coarse[1]
    check_tokens(seqlen)
    ratio = grid[0] // coarse[0], grid[1] // coarse[1]

    def sees(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        return patterns.coarse_2d(i, j, **how, kernel_size=cross)

    def ours(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        given: dict[str, Any] = {"kernel_size": None, "coarse_key": key, "coarse_value": value}
        return local_attention_2d(query, None, None, **given, **how, coarse_kernel_size=cross, **options)

    def copied(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Copies `ratio` rows and columns apart are of the cells around the query's own."""
        fine = (
            x.unflatten(2, coarse).repeat_interleave(ratio[0], 2).repeat_interleave(ratio[1], 3).flatten(2, 3)
            for x in (key, value)
        )
        return local_attention_2d(query, *fine, grid=grid, kernel_size=cross, dilation=ratio)

    mask = sees(0, 0, torch.arange(seqlen)[:, None], torch.arange(cells))
    query = torch.randn(1, heads, seqlen, dim, dtype=dtype)
    key, value = torch.randn(2, 1, heads, cells, dim, dtype=dtype)
    pairs = int(mask.sum())
    return Problem(
        (query, key, value),
        ours,
        {
            "masked SDPA": baselines.sdpa(mask),
            "FlexAttention": flex(sees, dtype, back, seqlen, cells),
            "upsampled keys": copied,
        },
        {"global SDPA": baselines.sdpa()},
        bytes=(6 if back else 2) * (query.nbytes + key.nbytes),
        flops=(7 if back else 2) * 2 * pairs * heads * dim,
        exps=(2 if back else 1) * pairs * heads,
        tokens=seqlen,
    )


def cross_resolution(
    dtype: torch.dtype, back: bool, *, heads=16, grid=(64, 64), dim=64, kernel=(17, 9), coarse=(32, 32), cross=(7, 7)
) -> Problem:
    """Raster-causal window, and a window in a coarse image."""
    seqlen, cells = grid[0] * grid[1], coarse[0] * coarse[1]
    check_tokens(seqlen)

    def sees(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        own = patterns.local_2d(i, j, grid=grid, kernel_size=kernel, raster_causal=True)
        home = patterns.coarse_2d(i, j - seqlen, grid=grid, coarse_grid=coarse, kernel_size=cross)
        return own & (j < seqlen) | home & (j >= seqlen)

    def op(query: Tensor, key: Tensor, value: Tensor, *others: Tensor, **how: Any) -> Any:
        return local_attention_2d(
            query,
            key,
            value,
            grid=grid,
            kernel_size=kernel,
            raster_causal=True,
            coarse_key=others[0],
            coarse_value=others[1],
            coarse_grid=coarse,
            coarse_kernel_size=cross,
            **how,
        )

    mask = sees(0, 0, torch.arange(seqlen)[:, None], torch.arange(seqlen + cells))
    same: dict[str, Contestant] = {
        "vanilla": baselines.joined(baselines.vanilla_attention(mask)),
        "masked SDPA": baselines.joined(baselines.sdpa(mask)),
    }
    flexible = flex(sees, dtype, back, seqlen, seqlen + cells)
    same["FlexAttention"] = flexible if isinstance(flexible, str) else baselines.joined(flexible)
    dense: dict[str, Contestant] = {"global SDPA": baselines.joined(baselines.sdpa())}
    return self_attention(op, int(mask.sum()), (heads, seqlen, dim), same, dense, dtype, back, coarse=cells)


def local_2d_decode(
    dtype: torch.dtype,
    back: bool,
    *,
    heads=16,
    grid=(64, 64),
    dim=64,
    kernel=(17, 9),
    text=64,
    coarse=(32, 32),
    cross=(7, 7),
    alone=False,
) -> Problem:
    """The token in the middle of an image against caches of the image, the text and a coarse image. The baselines
    have one cache, of the tokens there are. `alone` as in `local_2d`."""
    end, cells = grid[0] // 2 * grid[1] + grid[1] // 2 + 1, coarse[0] * coarse[1]
    ends = torch.tensor([end])
    own = patterns.local_2d(ends - 1, torch.arange(end), grid=grid, kernel_size=kernel, raster_causal=True)
    home = patterns.coarse_2d(ends - 1, torch.arange(cells), grid=grid, coarse_grid=coarse, kernel_size=cross)
    mask = torch.cat([torch.ones(text, dtype=torch.bool), home, own])[None, None, None]
    query = torch.randn(1, heads, 1, dim, dtype=dtype)
    fine, words, low = (torch.randn(2, 1, heads, n, dim, dtype=dtype) for n in (grid[0] * grid[1], text, cells))
    key, value = torch.cat([words, low, fine[..., :end, :]], 3)

    def op(query: Tensor, key: Tensor, value: Tensor, *others: Tensor, **how: Any) -> Any:
        return local_attention_2d_decode(
            query,
            key,
            value,
            ends,
            grid=grid,
            kernel_size=kernel,
            prefix_key=others[0],
            prefix_value=others[1],
            coarse_key=others[2],
            coarse_value=others[3],
            coarse_grid=coarse,
            coarse_kernel_size=cross,
            **how,
        )

    def cached(attention: Callable[..., Tensor]) -> Contestant:
        return lambda query, *_: attention(query, key, value)

    same = {
        "vanilla": cached(baselines.vanilla_attention(mask)),
        "masked SDPA": cached(baselines.sdpa(mask)),
        "gathered SDPA": cached(baselines.gathered_sdpa(mask)),
    }
    keys = int(mask.sum())
    return Problem(
        (query, *fine, *words, *low),
        op,
        {} if alone else same,
        {} if alone else {"SDPA over the cache": cached(baselines.sdpa())},
        bytes=2 * query.element_size() * (keys + 1) * heads * dim,
        flops=2 * 2 * keys * heads * dim,
        exps=keys * heads,
        tokens=1,
        sample=partial(heads_of_one_key_head, heads),
    )


def cogview2(
    dtype: torch.dtype,
    back: bool,
    *,
    heads=4,
    text=96,
    grid=(60, 60),
    dim=64,
    kernel=(9, 5),
    coarse: tuple[int, int] | None = (20, 20),
    cross=(5, 5),
) -> Problem:
    """A layer of CogView2's super-resolution: direct, or iterative without a coarse image. The published formula as it
    runs without the CUDA kernels of its authors, which have no bfloat16, and with windows copied in a faster way."""
    how: dict[str, Any] = {"text_len": text, "grid": grid, "kernel_size": kernel}
    how |= {"coarse_grid": coarse, "coarse_kernel_size": cross}
    seqlen = text + grid[0] * grid[1] + (0 if coarse is None else coarse[0] * coarse[1])
    check_tokens(seqlen)

    def sees(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        return patterns.cogview2(i, j, **how, raster_causal=False)

    mask = sees(0, 0, torch.arange(seqlen)[:, None], torch.arange(seqlen))
    return self_attention(
        partial(cogview2_attention, **how),
        int(mask.sum()),
        (heads, seqlen, dim),
        {
            "vanilla": baselines.vanilla_attention(mask),
            "masked SDPA": baselines.sdpa(mask),
            "FlexAttention": flex(sees, dtype, back, seqlen),
            "published formula": baselines.published_cogview2(baselines.unfolded_windows, **how),
            "gathered windows": baselines.published_cogview2(baselines.gathered_windows, **how),
        },
        {"global SDPA": baselines.sdpa()},
        dtype,
        back,
    )
