"""2D local attention's kernels: runs in the emulator, and faults that they must show (cuda_faults.py)."""

import ctypes
import math
from collections.abc import Callable
from typing import Any

import emulated_cuda
import torch
from cuda_faults import AROUND, GONE, Fault, Suite, compared
from torch import Tensor

from cogview_ops import reference
from cogview_ops._local_options import Coarse, Options, Prefix, Window

DIM = 64
STRIPS, WALK, OWN, FORWARD = "local_strips.h", "local_walk.cuh", "local_own.cuh", "local_forward.cuh"
BACKWARD, EXTRA, GRAD_EXTRA = "local_backward.cuh", "local_extra.cuh", "local_grad_extra.cuh"
GRAD_TABLE, OPTIONS, MAIN = "local_grad_table.cuh", "local_options.cuh", "local_attention_2d.cu"

Pair = tuple[int, int]


def local_2d(
    grid: Pair,
    kernel: Pair | None,
    *,
    heads: Pair = (1, 1),
    dilation: Pair = (1, 1),
    causal: bool = False,
    shift: bool = False,
    prefix: int = 0,
    masked: bool = False,
    padded: bool = False,
    biased: bool = False,
    coarse: Pair | None = None,
    coarse_kernel: Pair = (1, 1),
    scale: float = 0.2,
    spoil: Callable[[Tensor, Tensor], None] = lambda q, k: None,
) -> Callable[[Any, int], str]:
    """Tokens before heads in memory, all with NaN around, which must stay there."""

    def run(library: Any, seed: int) -> str:
        generator = torch.Generator().manual_seed(grid[0] * grid[1])
        around = []

        def tensor(heads: int, tokens: int, fill: bool = True) -> Tensor:
            count = tokens * heads * DIM
            around.append(torch.full((count + 2 * AROUND,), torch.nan, dtype=torch.bfloat16))
            x = around[-1][AROUND : AROUND + count].view(1, tokens, heads, DIM).transpose(1, 2)
            return x.copy_(torch.randn(x.shape, generator=generator)) if fill else x

        cells, coarse_cells = grid[0] * grid[1], math.prod(coarse or (0, 0))
        sets = [(heads[1], cells), (heads[1], prefix), (heads[1], coarse_cells)]
        q, dout = tensor(heads[0], cells), tensor(heads[0], cells)
        keys = [(tensor(*size), tensor(*size)) for size in sets]
        spoil(q, keys[0][0])
        out, dq = tensor(heads[0], cells, fill=False), tensor(heads[0], cells, fill=False)
        grads = [(tensor(*size, fill=False), tensor(*size, fill=False)) for size in sets]
        around.append(torch.full((cells * heads[0] + 2 * AROUND,), torch.nan))
        lse, dlse = around[-1][AROUND:-AROUND].view(q.shape[:3]), torch.randn(q.shape[:3], generator=generator)
        mask = torch.rand(1, max(prefix, 1), generator=generator) < 0.6
        key_mask = torch.rand(1, cells, generator=generator) < 0.6
        key_mask[:, : cells // 3] = False  # some queries see no key
        rows, columns = (2 * k - 1 for k in kernel or (1, 1))
        table = torch.randn(heads[0], rows, columns, generator=generator)
        around.append(torch.full((table.numel() + 2 * AROUND,), torch.nan))
        dtable = around[-1][AROUND:-AROUND].view(table.shape)
        tensors = [q, *keys[0], out, dout, dq, *grads[0], *keys[1], *grads[1], *keys[2], *grads[2]]
        sizes = [
            1,
            *heads,
            DIM,
            *grid,
            *(kernel or (0, 0)),
            *dilation,
            causal,
            shift,
            prefix,
            *(coarse or (0, 0)),
            *coarse_kernel,
        ]
        library.local_2d.restype = ctypes.c_char_p
        message = library.local_2d(
            seed,
            (ctypes.c_void_p * 16)(*(x.data_ptr() for x in tensors)),
            (ctypes.c_long * 48)(*(s for x in tensors for s in x.stride()[:3])),
            ctypes.c_void_p(lse.data_ptr()),
            ctypes.c_void_p(dlse.data_ptr()),
            ctypes.c_void_p(mask.data_ptr() if masked else None),
            ctypes.c_void_p(key_mask.data_ptr() if padded else None),
            ctypes.c_void_p(table.data_ptr() if biased else None),
            ctypes.c_void_p(dtable.data_ptr() if biased else None),
            (ctypes.c_long * 17)(*map(int, sizes)),
            ctypes.c_double(0.7),
            ctypes.c_double(-0.4),
            ctypes.c_double(scale),
        ).decode()
        if message:
            return message
        if not all(x[:AROUND].isnan().all() and x[-AROUND:].isnan().all() for x in around):
            return "writes where no tensor is"
        exact = [x.double().requires_grad_() for pair in ((q,), *keys, (table,)) for x in pair]
        options = Options(
            Window(grid, kernel or (0, 0), dilation, causal, "shift" if shift else "clip"),
            Prefix(exact[3], exact[4], mask if masked else None, 0.7) if prefix else None,
            Coarse(exact[5], exact[6], coarse, coarse_kernel, -0.4) if coarse else None,
            scale,
            exact[7] if biased else None,
            key_mask if padded else None,
        )
        local = exact[1:3] if kernel else (None, None)
        truth = reference.local_attention_2d(exact[0], *local, options)
        named = {"out": (out, truth[0].detach()), "lse": (finite(lse), finite(truth[1].detach()))}
        wanted = torch.autograd.grad(truth, exact, [dout.double(), dlse.double()], allow_unused=True)
        mine = [dq, *(x for pair in grads for x in pair), dtable]
        names = ("dq", "dk", "dv", "prefix_dk", "prefix_dv", "coarse_dk", "coarse_dv", "dtable")
        for name, actual, expected in zip(names, mine, wanted, strict=True):
            if expected is not None:
                named[name] = actual, expected
        return compared(named)

    return run


def finite(lse: Tensor) -> Tensor:
    """With a number where there are no keys."""
    return lse.masked_fill(lse == -math.inf, -99.0)


def overflow(q: Tensor, k: Tensor) -> None:
    """The score of the first query and a key near by, which it does not see, is infinity minus infinity."""
    q[..., :2] = k[..., :2] = 0
    q[0, 0, 0, :2] = k[0, 0, 24, :2] = 1e30
    q[0, 0, 0, 1] *= -1


def growing(q: Tensor, k: Tensor) -> None:
    """Scores grow from key to key: sums must follow the largest."""
    k *= torch.linspace(0.1, 8, k.shape[2])[:, None].bfloat16()


RUNS = {
    "window": local_2d((13, 21), (9, 5)),
    "causal": local_2d((9, 20), (5, 7), causal=True),
    "shifted": local_2d((21, 20), (9, 9), shift=True),
    "dilated": local_2d((13, 15), (3, 5), dilation=(2, 3)),
    "group": local_2d((12, 9), (3, 3), heads=(4, 2)),
    "long": local_2d((50, 4), (3, 3), heads=(20, 20)),
    "prefix": local_2d((9, 9), (3, 3), prefix=150, masked=True),
    "coarse": local_2d((24, 10), (3, 3), coarse=(12, 10), coarse_kernel=(5, 3)),
    "padded": local_2d((13, 9), (5, 7), heads=(2, 1), padded=True),
    "padded, shifted": local_2d((9, 20), (3, 5), dilation=(1, 2), shift=True, padded=True, prefix=3, masked=True),
    "biased": local_2d((21, 22), (9, 5), heads=(4, 2), biased=True, coarse=(3, 2), coarse_kernel=(3, 3), scale=0.1),
    "biased, causal": local_2d((9, 14), (5, 7), dilation=(2, 1), causal=True, padded=True, biased=True),
    "biased, shifted": local_2d((13, 21), (9, 5), shift=True, biased=True, scale=-0.2),
    "alone": local_2d((24, 10), None, prefix=40, masked=True, coarse=(12, 10), coarse_kernel=(5, 3)),
    "negative scale": local_2d((6, 6), (3, 3), scale=-0.3),
    "overflow": local_2d((3, 11), (3, 3), spoil=overflow),
    "growing": local_2d((13, 9), (9, 9), spoil=growing),
}

FAULTS = [
    Fault("blocks that have not come", WALK, "«gpu::barrier_wait(full(at), phase ^ wraps)»", GONE, "window"),
    Fault("blocks of the turn before", WALK, "«gpu::barrier_wait(full(at), phase ^ wraps)»",
          "gpu::barrier_wait(full(at), phase)", "long"),
    Fault("steps in the wrong phase", WALK, "«(of - u) / kStepBarriers & 1»", "0", "long"),
    Fault("a block into the slot of another", WALK, "slot - p.late : «slot - p.late + p.blocks»", "slot", "long"),
    Fault("a block loaded twice", WALK, "load_v = «group + p.blocks - p.late»", "group + p.blocks", "long"),
    Fault("slots that others still need", WALK, "u < «back» && u <= of", "0", "long"),
    Fault("waits for its own step only", WALK, "u < «back» && u <= of", "1", "long"),
    Fault("blocks that nobody waits for", WALK, "released = true;\n    «gpu::barrier_wait(full(slot), phase)»;", GONE,
          "long"),
    Fault("cells left and right of the image", WALK, "«at >= 0 && at < item.width»", "true", "window"),
    Fault("rows above and below the image", WALK, "static_cast<u32>(height) ? there : «0»", "there", "window"),
    Fault("a phase as large as the first", WALK, "height = «p.y.axis.cells(phase_y)»", "p.y.axis.cells(0)", "dilated"),
    Fault("every phase in the first column", WALK, "p.x.axis.size + «phase_x») * t.line", "0", "dilated"),
    Fault("the keys of the first head", WALK, "other = «p.y.keys ? owner * p.repeats + repeat : owner / p.group»", "0",
          "group"),
    Fault("shifted: the last steps", STRIPS, "tail_at = «at > 0 ? at : 0»", "0", "shifted"),
    Fault("shifted: who sees the first keys", STRIPS, "return {«shift && x <= 2 * radius ? 0 : lo»,", "lo", "shifted"),
    Fault("shifted: who sees the last keys", STRIPS, "«shift && x >= n - 2 * radius - 1 ? n : hi»", "hi", "shifted"),
    Fault("shifted: the box of an edge", WALK, "return «p.x.axis.shift && 4 * tile < item.width ? "
          "p.x.units(tile, item.width).lo : tile»", "tile", "shifted"),
    Fault("a row too many", OWN, "bits_of(y, «y + p.y.above + p.y.below + 1»)", "y + p.y.above + p.y.below + 2",
          "window"),
    Fault("a column too few", OWN, "bits_of(s.lo - left, «s.hi - left») >> shift", "s.hi - left - 1", "window"),
    Fault("rows outside of the image", OWN, "inside = «bits_of(-top, own_.height - top) >> shift»", "~0u", "window"),
    Fault("the next row as its own", OWN, "own[r] = bits_of(«y + p.y.above», y + p.y.above + 1)", "0", "causal"),
    Fault("own rows of the step before", OWN, "parity ^= «1»", "0u", "long"),
    Fault("own rows replaced while others read", OWN, "«__syncwarp()»;\n    if (next < end) fetch", GONE, "window"),
    Fault("forward: its own row without order", FORWARD, "return same ? «before[kCausal ? ux : 0][e % 2]» :",
          "column[ux][e % 2]", "causal"),
    Fault("forward: what is hidden is not finite", FORWARD, "«!(softmax.sum[0] + softmax.sum[1] < INFINITY)»", "false",
          "overflow"),
    Fault("forward: never scales", FORWARD, "as_rows, values, «u0 == 0»", "true", "growing"),
    Fault("forward: queries of the same step", FORWARD, "of.y = «4 * step»", "own.y", "long"),
    Fault("forward: the sign of the scale", FORWARD, "x.flip(«a.flip»)", "0u", "negative scale"),
    Fault("forward: stores while others read", FORWARD, "«__syncwarp()»;\n    own.store(result, out", GONE,
          "window"),
    Fault("backward: no delta", BACKWARD, "«row_products<T>(delta, y, out)»", GONE, "window"),
    Fault("backward: no gradient of lse", BACKWARD, "delta[r] -= «of_row.y»", "0", "window"),
    Fault("backward: lse of the tile's first row", BACKWARD, "own_lse + «lane / 4 * 8» + 64 * r", "0", "window"),
    Fault("backward: no order", BACKWARD, "- p.x.above, «p.ordered»)", "false", "causal"),
    Fault("backward: no scale", BACKWARD, "store(acc, «a.step», first_in", "1.f", "window"),
    Fault("backward: the last head only", BACKWARD, "if (kKeys && «item.repeat»)", "false", "group"),
    Fault("backward: statistics of the first head", BACKWARD, "item.in(stats, p, «item.other»)", "0", "group"),
    Fault("backward: what is hidden", BACKWARD, "if («!(seen[h][e / 2] >> e % 2 & 1)»)", "false", "window"),
    Fault("backward: rows above the image", BACKWARD, "int from = «max(-top, 0) / 4»", "1", "window"),
    Fault("masked keys of the image", OPTIONS, "there && «!attends(column + y * o.key_mask.row)»", "false", "padded"),
    Fault("masked keys: the rows of the other half", OPTIONS, "bits[1] = («lane / 2 % 2 ? of[3] : of[2]») >> shift",
          "of[2]", "padded"),
    Fault("masked keys: of the first phase", OPTIONS, "column = «item.in(o.key_mask, p, 0)» + x", "o.key_mask.at",
          "padded, shifted"),
    Fault("masked keys: their own gradients", OPTIONS, "return o.key_mask.at && «own.inside(r)» &&", "false", "padded"),
    Fault("no keys: not 0", FORWARD, "return «kOptions && softmax.sum[r] == 0» ?", "false", "padded"),
    Fault("no keys: the gradients", BACKWARD, "if («kOptions && lse[r] == -INFINITY») lse[r]", "false", "padded"),
    Fault("no keys of the image", FORWARD, "u0 < («kOptions && !a.options.local» ? 0 : p.unit_rows)", "false", "alone"),
    Fault("biases of the first head", OPTIONS, "at(o.table + «static_cast<int64_t>(head) * o.height * o.width»)", "0",
          "biased"),
    Fault("biases of another row", OPTIONS, "index = «first + kSign * (2 * (i - 1) * width + j)»",
          "first + kSign * j", "biased"),
    Fault("biases of keys: the other way", OPTIONS, "center + «kSign» * (down", "1", "biased"),
    Fault("scaled twice", FORWARD, "(z, «kOptions && a.options.table ? 1.f : a.scale»", "a.scale", "biased"),
    Fault("backward: scaled twice", BACKWARD, "scale = «kOptions && a.options.table ? 1.f : a.scale»", "a.scale",
          "biased"),
    Fault("backward: biases of the key's head", BACKWARD, "«kKeys ? item.other : item.owner»", "item.owner", "biased"),
    Fault("gradient of biases: cells that no window has", GRAD_TABLE, "of >= rows.lo && «of < rows.hi»", "true",
          "biased"),
    Fault("gradient of biases: keys behind in their own row", GRAD_TABLE, "!(same[h][r] && «x > own.column()»)",
          "false", "biased, causal"),
    Fault("gradient of biases: masked keys", GRAD_TABLE,
          "if (there && mask.at) there = «attends(in(mask, 0) + y * mask.row + x * mask.cell)»", "true",
          "biased, causal"),
    Fault("gradient of biases: every phase is the first", GRAD_TABLE, "(static_cast<int64_t>(«phase_y») * a.x.size",
          "0", "biased, causal"),
    Fault("gradient of biases: the tiles of one warp", GRAD_TABLE, "t < end; t += «kWarps»", "2 * kWarps", "biased"),
    Fault("gradient of biases: a share twice", GRAD_TABLE,
          "t = static_cast<int>(«a.tiles * blockIdx.y / a.splits») + warp", "0", "biased"),
    Fault("gradient of biases: the keys of another head", GRAD_TABLE, "rows.load(h, in(plane, «head / a.group»)", "0",
          "biased"),
    Fault("gradient of biases: the sign of the scale", GRAD_TABLE, "q.flip(«a.flip»)", "0u", "biased, shifted"),
    Fault("gradient of biases: sums before they are there", GRAD_TABLE, "«__syncthreads()»", GONE, "biased"),
    Fault("gradient of biases: offsets of shifted windows", MAIN, "t.above = t.y.radius * («w.shift ? 2 : 1»)", "1",
          "biased, shifted"),
    Fault("extra keys that have not come", EXTRA, "«gpu::barrier_wait(full(n % 2), n / 2 & 1)»", GONE, "prefix"),
    Fault("extra keys replaced while others read", EXTRA,
          "if (n >= 2) «gpu::barrier_wait(empty(slot), (n / 2 - 1) & 1)»", GONE, "prefix"),
    Fault("masked keys of the prefix", EXTRA, "if («!e.mask» ||", "true", "prefix"),
    Fault("keys beyond the prefix", EXTRA, "const bool there = «at < run.count»", "true", "prefix"),
    Fault("no bias of the prefix", EXTRA, "i < prefix_slots ? «e.prefix.bias» : e.coarse.bias", "0.f", "prefix"),
    Fault("coarse cells a column away", EXTRA, "rows.lo + down, «columns.lo + at - down * across»",
          "columns.lo + at - down * across + 1", "coarse"),
    Fault("the ratio of rows for columns", EXTRA, "x = (item.phase_x + own.column() * p.x.axis.dilation) / «e.ratio_x»",
          "e.ratio_y", "coarse"),
    Fault("gradients of a prefix: masked keys", GRAD_EXTRA, "«(!mask || mask[first + r])»", "true", "prefix"),
    Fault("gradients of a prefix: half of the parts", GRAD_EXTRA, "split < «e.splits»; ++split", "e.splits / 2",
          "prefix"),
    Fault("gradients of a prefix: no scale", GRAD_EXTRA, "factor = blockIdx.y ? 1 : «scale»", "1.f", "prefix"),
    Fault("gradients of coarse keys: queries near by", GRAD_EXTRA, "abs(qy - y(r)) <= «e.radius_y»", "e.radius_y - 1",
          "coarse"),
    Fault("gradients of coarse keys: the box", GRAD_EXTRA, "return min((x + «radius») * static_cast<int>(ratio.n), n)",
          "0", "coarse"),
]  # fmt: skip

SUITE = Suite("local_2d", emulated_cuda.local_2d, FAULTS, RUNS)
