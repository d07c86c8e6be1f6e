"""Three-region attention's kernels: runs in the emulator, and faults that they must show (cuda_faults.py)."""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import emulated_cuda
import torch
from cases import pivots_of, some_pivots
from cuda_faults import AROUND, GONE, Fault, Suite, compared
from torch import Tensor

from cogview_ops import reference


def three_region(
    seqlen: int,
    block_size: int,
    window_blocks: int,
    pivots: str | Tensor = "text",
    *,
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    bias: float = 0.0,
    scale: float = 0.3,
    dlse: bool = True,
    token_major: bool = False,
    dim: int = 32,
    spoil: Callable[[Tensor, Tensor, Tensor], None] = lambda q, k, v: None,
    lengths: tuple[int, ...] = (),
) -> Callable[[Any, int], str]:
    """`lengths`: of sequences that are packed, `seqlen` tokens in all."""

    def run(library: Any, seed: int) -> str:
        generator = torch.Generator().manual_seed(seqlen)
        around = []  # each tensor with what is around it, which is NaN and stays so

        def tensor(heads: int, fill: bool = True) -> Tensor:
            shape = (batch, seqlen, heads, dim) if token_major else (batch, heads, seqlen, dim)
            count = math.prod(shape)
            around.append(torch.full((count + 2 * AROUND,), torch.nan, dtype=torch.bfloat16))
            x = around[-1][AROUND : AROUND + count].view(shape)
            if fill:
                x.copy_(torch.randn(shape, generator=generator))
            return x.transpose(1, 2) if token_major else x

        q, k, v, dout = tensor(heads[0]), tensor(heads[1]), tensor(heads[1]), tensor(heads[0])
        spoil(q, k, v)
        out, dq, dk, dv = (tensor(x, fill=False) for x in (heads[0], *heads, heads[1]))
        around.append(torch.full((q[..., 0].numel() + 2 * AROUND,), torch.nan))
        lse, of_lse = around[-1][AROUND:-AROUND].view(q.shape[:3]), torch.randn(q.shape[:3], generator=generator)
        chosen = some_pivots(pivots, batch, seqlen) if isinstance(pivots, str) else pivots
        ends = torch.tensor((0, *lengths)).cumsum(0)
        if lengths:
            chosen = pivots_of(lengths, str(pivots)).to(ends.dtype)
        tensors = (q, k, v, out, dout, dq, dk, dv)
        packed = (len(lengths), max(lengths, default=0))
        sizes = (batch, *heads, seqlen, dim, chosen.shape[1], block_size, window_blocks, *packed)
        library.three_region.restype = ctypes.c_char_p
        message = library.three_region(
            seed,
            (ctypes.c_void_p * 8)(*(x.data_ptr() for x in tensors)),
            (ctypes.c_long * 24)(*(s for x in tensors for s in x.stride()[:3])),
            ctypes.c_void_p(lse.data_ptr()),
            ctypes.c_void_p(of_lse.data_ptr() if dlse else None),
            ctypes.c_void_p(chosen.data_ptr()),
            chosen.dtype == torch.int64,
            (ctypes.c_long * 10)(*sizes),
            ctypes.c_void_p(ends.data_ptr() if lengths else None),
            ctypes.c_double(bias),
            ctypes.c_double(scale),
        ).decode()
        if message:
            return message
        if not all(x[:AROUND].isnan().all() and x[-AROUND:].isnan().all() for x in around):
            return "writes where no tensor is"
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        numbers = (block_size, window_blocks, bias, scale)
        if lengths:
            rows = (x[0].transpose(0, 1) for x in exact)
            of_all, of_lse_too = reference.three_region_attention_varlen(*rows, chosen, ends, *numbers)
            truth = of_all.transpose(0, 1)[None], of_lse_too[None]
        else:
            truth = reference.three_region_attention(*exact, chosen, *numbers)
        grads = torch.autograd.grad(truth, exact, [dout.double(), of_lse.double() * dlse])
        names = ("out", "lse", "dq", "dk", "dv")
        pairs = zip((out, lse, dq, dk, dv), (*(x.detach() for x in truth), *grads), strict=True)
        return compared(dict(zip(names, pairs, strict=True)))

    return run


def overflow(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Scores of query 60 and key 5, which it does not see, become infinite and NaN."""
    for x in (q, k):
        x[..., :2] = 0
    q[0, 0, 60, :2] = k[0, 0, 5, :2] = 1e30
    k[0, 1 % k.shape[1], 5, 1] *= -1


def growing(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Scores grow from key to key: sums must follow the largest."""
    k *= torch.linspace(0.1, 8, k.shape[2])[:, None].bfloat16()


def packed(lengths: tuple[int, ...], *pattern: Any, **options: Any) -> Callable[[Any, int], str]:
    return three_region(sum(lengths), *pattern, lengths=lengths, token_major=True, **options)


RUNS = {
    "large bias": three_region(135, 16, 1, bias=100.0),  # e^100 is beyond float32
    "window": three_region(70, 16, 2, "none"),
    "windows of a block": three_region(300, 128, 1, "none"),
    "ragged windows": three_region(300, 16, 10, "none"),
    "pivots": three_region(150, 16, 1, "text", bias=0.7),
    "all pivots, blocks of 1": three_region(140, 1, 1, "all"),
    "long windows": three_region(330, 128, 3, "few"),
    "many pivots": three_region(260, 16, 2, "all", bias=-0.5),
    "a tile of pivots and one": three_region(160, 128, 1, torch.arange(65)[None]),
    "group": three_region(90, 16, 1, "text", heads=(4, 2), dlse=False),
    "token-major": three_region(90, 32, 1, "text", heads=(2, 1), batch=2, token_major=True),
    "negative scale": three_region(90, 16, 1, "text", scale=-0.5, bias=0.4),
    "scale 0": three_region(90, 16, 1, "text", scale=0.0, bias=0.4),
    "growing scores": three_region(150, 128, 2, "none", spoil=growing),
    "only padding": three_region(90, 16, 1, torch.full((1, 20), -1)),
    "overflow": three_region(70, 16, 1, torch.tensor([[0, 3]]), heads=(2, 2), spoil=overflow),
    "packed": packed((70, 0, 150, 1), 16, 1, bias=0.7),
    "packed group": packed((0, 90, 140, 0), 16, 1, heads=(4, 2), dlse=False),
    "packed, many": packed((3,) * 34, 1, 1),  # more than lanes of a warp
    "packed, all pivots": packed((129, 30, 260), 16, 2, "all", bias=-0.5),
    "packed, few pivots": packed((40, 300, 70), 16, 1, "few"),
}

RING, PATTERN = "tile_ring.cuh", "three_region_pattern.cuh"
FORWARD, GRAD_QUERY = "three_region_forward.cuh", "three_region_grad_query.cuh"
PASS, GRAD_KEY, TILES = "key_pass.cuh", "three_region_grad_key.cuh", "warp_tiles.cuh"
MAIN, LAUNCH, PLACE = "three_region_attention.cu", "three_region_launch.cuh", "three_region_place.cuh"
FAULTS = [
    # the ring
    Fault("no wait for a tile", RING, "«gpu::barrier_wait(full + 8 * slot, turn & 1)»;", GONE, "window"),
    Fault("the other phase of a tile", RING, "«gpu::barrier_wait(full + 8 * slot, turn & 1)»;",
          "gpu::barrier_wait(full + 8 * slot, ~turn & 1)", "window"),
    Fault("no wait for a slot", RING, "if (turn) «gpu::barrier_wait(empty + 8 * slot, (turn - 1) & 1)»;", GONE,
          "long windows"),
    Fault("a slot's phase before", RING, "if (turn) «gpu::barrier_wait(empty + 8 * slot, (turn - 1) & 1)»;",
          "gpu::barrier_wait(empty + 8 * slot, turn & 1)", "long windows"),
    Fault("no arrival of copies", RING, "«gpu::arrive_after_copies(full + 8 * slot)»;", GONE, "window"),
    Fault("no arrival at the end of a tile", RING, "«gpu::barrier_arrive(empty + 8 * slot)»;", GONE, "long windows"),
    Fault("other lanes are not waited for", RING, "use(t, slot);\n      «__syncwarp()»;", GONE, "long windows"),
    Fault("a unit is stored before it is there", RING, "Unit<D>::rows(lane)), 0);\n  «__syncwarp()»;", GONE, "window"),
    Fault("no rows beyond the end", RING, "if («static_cast<int>(row) < there»)", "there > 0", "token-major"),
    # the pattern
    Fault("windows a block too long", PATTERN, "i / block_size - window_blocks + «1»;", "0", "window"),
    Fault("pivots of the window too", PATTERN, "rank(high, known, «min(regions.num_pivots, known + (high - low))»)",
          "known", "pivots"),
    Fault("rank: not below but at most", PATTERN, "pivot(middle) < «static_cast<u32>(x)»",
          "static_cast<u32>(x) + 1", "pivots"),
    Fault("ranks of the block's first window", PATTERN, "below[r][e] = «low == high»", "true", "pivots"),
    Fault("no causal mask", PATTERN, "KeyRun{window[r][e], «i - window[r][e] + 1»}", "~0u", "window"),
    Fault("itself not seen", PATTERN, "KeyRun{window[r][e], «i - window[r][e] + 1»}", "i - window[r][e]", "window"),
    Fault("a warp's edge tile is whole", PATTERN, "x + S::kTile <= «first + 1»;", "last + 1", "windows of a block"),
    Fault("an edge tile of pivots is whole", PATTERN, "x + S::kTile <= «rank_first»", "rank_last + S::kTile",
          "many pivots"),
    Fault("window's first tiles are whole", PATTERN, "«x >= window_last» && x + S::kTile", "true", "ragged windows"),
    Fault("a tile of pivots less", PATTERN, "is_pivots(t) ? x >= «rank_last»", "rank_last - 1",
          "a tile of pivots and one"),
    Fault("pivots of this tile, not the next", PATTERN, "look_up(«t + 1»);", "t", "many pivots"),
    # forward
    Fault("forward: nothing hidden", PATTERN, "if («!seen[e / 2].has(x)») z[u][h][e] = none;", "false", "pivots"),
    Fault("forward: no bias of pivots", FORWARD, "stream_keys(ring, keys, load, «logits.bias»", "0", "pivots"),
    Fault("forward: the sign of the scale", FORWARD, "x.flip(«logits.flip»);", "0", "negative scale"),
    Fault("logits: a scale of 0", TILES, "«fmaxf(fabsf(static_cast<float>(scale)) * kLog2e, 1e-30f)»",
          "fabsf(static_cast<float>(scale)) * kLog2e", "scale 0"),
    Fault("softmax: sums are not rescaled", TILES, "sum[r] *= «factor»;", "1", "growing scores"),
    Fault("softmax: a quarter of the sum", TILES, "sum[r] = «quad_sum(sum[r])»;", "sum[r]", "window"),
    # gradients of queries
    Fault("delta left out", GRAD_QUERY, "return «-delta[r][e / 2]»;", "0", "window"),
    Fault("dlse left out", GRAD_QUERY, "delta[r][e] -= «static_cast<const float*>(a.dlse)[at]»;", "0", "window"),
    Fault("grad_query: no scale", GRAD_QUERY, "store_unit<T>(acc[r], «logits.scale», logits.scale,", "1", "window"),
    Fault("grad_query: no bias", GRAD_QUERY, "stream_keys(ring, keys, load, «logits.bias»", "0", "pivots"),
    # gradients of keys
    Fault("key pass: delta left out", PASS, "return «e % 2 ? start[h].y : start[h].x»;", "0.0f", "window"),
    Fault("key pass: lse of the neighbour", PASS, "return («e % 2» ? lse[h].y : lse[h].x)", "0", "window"),
    Fault("key pass: no masks", PASS, "|| «!pattern.seen(own, row, tile, at)»)", "false",
          "window"),
    Fault("key pass: the sign of the scale", PASS, "x.flip(«logits.flip»);", "0", "negative scale"),
    Fault("key pass: statistics of the first head", PASS, "+ b) * a.heads + «tile.head») * a.seqlen_q", "0", "group"),
    Fault("key pass: masks before they are there", PASS, "«__syncthreads()»;\n\n    const int own_row", GONE, "window"),
    Fault("key pass: queries that are not there", PASS, "«pattern.query(tile, at) < 0» ||", "false", "large bias"),
    Fault("a head of the group left out", GRAD_KEY, "int tiles() const { return head_tiles * «programs.group»; }", "1",
          "group"),
    Fault("the first head for all", GRAD_KEY, "return {«first_head + head», begin", "first_head", "group"),
    Fault("pivots are seen a query too late", GRAD_KEY, "static_cast<u32>(tile.begin + n) >= «begin»;", "begin + 1",
          "pivots"),
    Fault("grad_pivot: an edge tile is whole", GRAD_KEY, "tile.begin >= «static_cast<int>(rows.last)»;",
          "static_cast<int>(rows.first)", "all pivots, blocks of 1"),
    Fault("grad_window: the last query behind the window", GRAD_KEY,
          "«this->regions.behind(this->begin + r) - (this->begin + r)»;",
          "this->regions.behind(this->begin + r) - (this->begin + r) + 1", "window"),
    Fault("grad_window: an edge tile is whole", GRAD_KEY, "tile.begin >= «this->begin + rows.end - 1» &&", "0",
          "windows of a block"),
    Fault("the first part only", GRAD_KEY, "split < «parts.splits»; ++split", "1", "pivots"),
    Fault("no parts of pivots", GRAD_KEY, "if («!parts.splits» ||", "true", "pivots"),
    Fault("dv of pivots left out", GRAD_KEY, "gpu::load_global_pair(from + «parts.size» + 8 * c)", "0", "pivots"),
    Fault("grad_window: no scale", GRAD_KEY, "store(dk, «logits.scale», a.dk);", "1.0f", "window"),
    Fault("grad_window: stores while others read", PASS, "«__syncthreads()»;  // nobody reads", GONE, "long windows"),
    Fault("forward: stores while others read", FORWARD, "«__syncthreads()»;  // nobody reads", GONE, "long windows"),
    Fault("grad_query: stores while others read", GRAD_QUERY, "«__syncthreads()»;  // nobody reads", GONE,
          "long windows"),
    Fault("no splits for the pivots", LAUNCH, "if (error == cudaSuccess && «scratch.splits»)", "0", "pivots"),
    # packed sequences
    Fault("no rows of their own", PLACE, "(begin / kBlockRows + «number») * kBlockRows", "0", "packed, many"),
    Fault("the sequence before", PLACE, "return «rows.first(n + 1, begin(n + 1)) <= row»;",
          "rows.first(n + 1, begin(n + 1)) < row", "packed"),
    Fault("the first 32 sequences", PLACE, "left = min(«left - whole * step», step - 1);", "0", "packed, many"),
    Fault("tokens of the first sequence", PLACE, "first = gpu::uniform(«begin(number)»)", "0", "packed"),
    Fault("a token too many", PLACE, "gpu::uniform(«begin(number + 1)») - first", "begin(number + 1) + 1", "packed"),
    Fault("a token too few", PLACE, "gpu::uniform(«begin(number + 1)») - first", "begin(number + 1) - 1", "packed"),
    Fault("statistics of the first sequence", PLACE, "kPacked ? head * a.seqlen_q + «sample»", "0", "packed"),
    Fault("statistics of the first head", PLACE, "kPacked ? «head» * a.seqlen_q", "0", "packed group"),
    Fault("samples do not lie a token apart", MAIN, "x->stride[0] = «x->stride[2]»;", "0", "packed"),
    Fault("pivots of the first sequence", PATTERN, "pivots += «of.number» * a.num_pivots", "0", "packed"),
    Fault("key pass: statistics of another head", PASS, "(which * a.heads + «tile.head») * a.seqlen_q", "0",
          "packed group"),
    Fault("key pass: statistics of another sequence", PASS, "a.seqlen_q + «b»", "0", "packed"),
    Fault("sums of another sequence's pivots", GRAD_KEY,
          "kPacked ? «PackedRows(a.num_pivots).first(place.number, place.sample)» : 0", "0", "packed, all pivots"),
]  # fmt: skip

SUITE = Suite("three_region", emulated_cuda.three_region, FAULTS, RUNS)
