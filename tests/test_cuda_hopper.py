"""Warp groups' products in the CUDA emulator, and the forward of three-region attention that is made of them.

Right kernels pass under any schedule, each wrong one is caught with a message of its own; matrix descriptors are those
that Triton's compiler makes for the same tiles.
"""

import ctypes
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import emulated_cuda
import kept_build
import pytest
import torch
from test_cuda_build import EVERYTHING, compiled, needs_nvcc
from torch import Tensor

from cogview_ops import reference

SEEDS = range(1, 9)
long = pytest.mark.skipif(not EVERYTHING, reason="compiles long: COGVIEW_TESTS=all")
pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))


def data(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@pytest.fixture(scope="module")
def library() -> Any:
    library = ctypes.CDLL(
        str(kept_build.build(emulated_cuda.KEPT, "hopper", [emulated_cuda.HOPPER, *emulated_cuda.CORE]))
    )
    library.run.restype = library.multiply.restype = ctypes.c_char_p
    library.descriptor.restype = ctypes.c_uint64
    return library


# --- the emulator ----------------------------------------------------------------------------------------------------


def operands(dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(64 + n, 64, generator=torch.Generator().manual_seed(0)).to(dtype).split([64, n])
    return a, b.T


@pytest.mark.parametrize("swizzle", range(4))
@pytest.mark.parametrize("n", [64, 128])
def test_descriptors_of_every_kind(library: Any, n: int, swizzle: int) -> None:
    """Rows of both operands along k and across it."""
    a, b = operands(torch.bfloat16, n)
    for across in range(4):
        x = torch.cat([(a.T if across & 2 else a).flatten(), (b if across & 1 else b.T).flatten()])
        out = torch.full((64, n), torch.nan)
        message = library.multiply(across, n == 128, swizzle, across, data(x), data(out)).decode()
        assert not message
        torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def run(library: Any, name: str, seed: int, dtype: torch.dtype) -> tuple[str, Tensor, Tensor]:
    a, b = operands(dtype, 64)
    x = torch.cat([a.flatten(), b.flatten()])
    out = torch.full((64, 64), torch.nan)
    return library.run(name.encode(), seed, data(x), data(out)).decode(), out, a.float() @ b.float()


@pytest.mark.parametrize(
    ("name", "factor"),
    [("steps", 2), ("steps f16", 2), ("steps, proxy fence by writers", 2), ("ring", 2), ("boxes", 1)],
)
def test_right_products_pass(library: Any, name: str, factor: int) -> None:
    for seed in SEEDS:
        message, out, expected = run(library, name, seed, torch.float16 if "f16" in name else torch.bfloat16)
        assert not message
        torch.testing.assert_close(out, factor * expected, rtol=1e-4, atol=1e-4)


def test_named_barriers_order(library: Any) -> None:
    x, out = torch.arange(128.0), torch.zeros(128)
    for seed in SEEDS:
        assert not library.run(b"turns", seed, data(x), data(out)).decode()
        assert torch.equal(out, x.flip(0) + 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steps, no proxy fence", r"wgmma of warp \d reads what thread \d+ wrote, without fence.proxy.async"),
        ("steps, proxy fence too early", r"wgmma of warp \d reads what thread \d+ wrote, without fence.proxy.async"),
        ("steps, no barrier", r"wgmma of warp \d reads what thread \d+ wrote, and nothing orders them|has written"),
        ("steps, no fence", r"lane \d+ has come to no wgmma.fence"),
        ("steps, sums written late", r"lane \d+ has written registers of its sums since its last wgmma.fence"),
        ("steps, operand written late", "has written registers of its first operand since its last wgmma.fence"),
        ("steps, no wait", r"lane \d+ reads sums before wait_group"),
        ("steps, short wait", r"lane \d+ reads sums before wait_group"),
        ("steps, read early", r"lane \d+ reads sums before wait_group"),
        ("steps, operand reused", r"lane \d+ writes registers of a first operand before wait_group"),
        ("steps, no commit", r"lane \d+ reads sums before wait_group"),
        ("steps, overwritten", r"thread \d+ writes what wgmma of warp \d reads, and nothing orders them"),
        ("steps, different descriptors", "lanes of a warp have different descriptors"),
        ("steps, different warps", "warps of a group have different descriptors"),
        ("steps, base offset", "base offset is not emulated"),
        ("steps, unwritten", "wgmma reads dynamic shared memory at offset .*, which nothing in this block has written"),
        ("ring, no return", r"thread \d+ writes what (wgmma of warp|an asynchronous copy|thread)"),
        ("ring, returned too early", r"thread \d+ writes what wgmma of warp \d reads, and nothing orders them"),
        ("ring, no wait", r"reads what an asynchronous copy of thread \d+ writes, and nothing orders|has written"),
        (
            "ring, no proxy fence",
            r"wgmma of warp \d reads what cp.async of thread \d+ wrote, without fence.proxy.async",
        ),
        ("turns, missing", "race on dynamic shared memory|which nothing in this block has written"),
        ("turns, twice", r"named barrier 1: thread \d+ arrives twice|race on dynamic"),
        ("turns, counts", "named barrier 2: for (128|256) threads and for (128|256)|race on dynamic"),
        ("turns, wrong id", "named barrier 0: 1 to 15 are there"),
        ("turns, lost", "deadlock: .* 256 at a named barrier"),
        ("turns, arrives only", "race on dynamic shared memory|which nothing in this block has written"),
    ],
)
def test_wrong_products_are_caught(library: Any, name: str, message: str) -> None:
    for seed in SEEDS:
        found, *_ = run(library, name, seed, torch.bfloat16)
        assert re.search(message, found), found


# --- against Triton's compiler ---------------------------------------------------------------------------------------

SHARED = 9 * 1024  # where its shared memory is taken to begin
OPS: dict[str, Callable[..., int]] = {
    "mov": lambda x: x,
    "cvt": lambda x: x,
    "and": int.__and__,
    "or": int.__or__,
    "xor": int.__xor__,
    "shl": int.__lshift__,
    "shr": int.__rshift__,
    "add": int.__add__,
    "mul": int.__mul__,
    "mad": lambda x, y, z: x * y + z,
    "neg": int.__neg__,
    "bfe": lambda x, start, count: x >> start & (1 << count) - 1,
}


class Run:
    """A thread's integers on the way through PTX without branches: what it stores where until the first product, and
    descriptors. `lines` are operations and operands."""

    def __init__(self, lines: list[tuple[str, str]], thread: int) -> None:
        self.values = {"%tid.x": thread, "global_smem": SHARED}
        self.loaded: dict[str, tuple[int, int]] = {}  # registers: of which parameter, at which byte
        self.stored: dict[int, tuple[int, int]] = {}  # likewise
        self.products: list[tuple[int | None, int]] = []  # descriptors, None: registers
        for op, rest in lines:
            names = re.findall(r"[%\w.]+", rest)
            if op.startswith("wgmma.mma_async"):
                if thread:
                    return
                of_registers = rest.count("{") == 2
                first, second = re.sub(r"^\{.*\}, ", "%, " if of_registers else "", rest).split(", ")[:2]
                self.products.append((None if of_registers else self.values[first], self.values[second]))
            elif self.products or not names:
                self.evaluate(op, names)
            elif op == "ld.param.b64":
                self.values[names[0]] = int(names[1][-1]) << 40
            elif op.startswith("ld.global"):
                source = self.values[names[4]] + int(names[5])
                self.loaded[names[0]] = source >> 40, source & (1 << 40) - 1
            elif op.startswith("st.shared"):
                offset = int(names[1]) if "+" in rest else 0
                self.stored[self.values[names[0]] + offset] = self.loaded[names[-4]]
            else:
                self.evaluate(op, names)

    def evaluate(self, op: str, names: list[str]) -> None:
        function, operands = OPS.get(op.partition(".")[0]), names[1:]
        known = [self.values.get(x) if not x[0].isdigit() else int(x, 0) for x in operands]
        if function and known and None not in known:
            self.values[names[0]] = function(*known)


@functools.cache
def ptx(version: str) -> dict[int, str]:
    """Of products of so many columns."""
    other = emulated_cuda.ROOT / "build" / "triton-3.6.0"
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(emulated_cuda.ROOT / "build/triton-tests")}
    if version != "installed":
        if not other.exists():
            pytest.skip(f"no Triton {version}: pip install --target build/{other.name} --no-deps triton=={version}")
        env["PYTHONPATH"] = str(other)
    script = str(emulated_cuda.ROOT / "tests" / "triton_dot.py")
    done = subprocess.run([sys.executable, script, "64", "128"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return dict(zip((64, 128), json.loads(done.stdout), strict=True))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("version", ["installed", "3.6.0"])
@pytest.mark.parametrize("dim", [64, 128])
def test_tiles_are_tritons(attention: Any, version: str, dim: int) -> None:
    """Where 16-byte parts of rows are in shared memory, and what the tensor cores are told."""
    lines = re.findall(r"^\s*([\w.:]+)\s*(.*?)\s*;", ptx(version)[dim], re.MULTILINE)
    runs = [Run(lines, thread) for thread in range(128)]
    stored = {at: place for run in runs for at, place in run.stored.items()}
    base = {x: next(at for at, place in stored.items() if place == (x, 0)) for x in range(3)}
    expected = {
        base[x] + attention.part(dim, row, part): (x, (row * dim + 8 * part) * 2)
        for x in range(3)
        for row in range(128)
        for part in range(dim // 8)
    }
    assert stored == expected
    scores = {
        (attention.along(dim, base[0] + 64 * 128 * m, k), attention.along(dim, base[1], k))
        for m in range(2)
        for k in range(dim // 16)
    }
    leading = 0x3FFF << 16 if dim == 64 else 0  # of rows as wide as the pattern it means nothing
    sums = {attention.across(dim, base[2], k) & ~leading for k in range(8)}
    products = runs[0].products
    assert {x for x in products if x[0] is not None} == scores
    assert {second & ~leading for first, second in products if first is None} == sums


# --- the forward -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention() -> Any:
    objects = emulated_cuda.hopper_attention()
    library = ctypes.CDLL(str(kept_build.build(emulated_cuda.KEPT, "hopper_attention", objects)))
    library.attend.restype = ctypes.c_char_p
    library.along.restype = library.across.restype = ctypes.c_uint64
    return library


def spread(batch: int, seqlen: int, count: int, room: int) -> Tensor:
    """`count` pivots of each sample, ascending, padding behind them."""
    generator = torch.Generator().manual_seed(seqlen)
    rows = [torch.randperm(seqlen, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.nn.functional.pad(torch.stack(rows), (0, room - count), value=-1)


def attend(
    library: Any,
    seed: int,
    tensors: list[Tensor],
    pivots: Tensor,
    block: int,
    window: int,
    bias: float,
    scale: float,
    ends: Tensor | None = None,
) -> tuple[str, Tensor]:
    """`ends`: cu_seqlens of packed sequences, which are a batch of one here."""
    q, k, _, _ = tensors
    batch, heads, seqlen, dim = q.shape
    lse = torch.full((batch, heads, seqlen), torch.nan)
    sizes = (ctypes.c_long * 8)(batch, heads, k.shape[1], seqlen, dim, pivots.shape[1], block, window)
    strides = (ctypes.c_long * 12)(*(n for x in tensors for n in x.stride()[:3]))
    pointers = (ctypes.c_void_p * 4)(*(x.data_ptr() for x in tensors))
    numbers = (ctypes.c_double * 2)(scale, bias)
    half, wide = q.dtype == torch.float16, pivots.dtype == torch.int64
    longest = 0 if ends is None else max(1, int(ends.diff().max()))
    of = data(ends), ends.dtype == torch.int64 if ends is not None else False
    counts = ctypes.c_long(len(pivots)), ctypes.c_long(longest)
    message = library.attend(seed, half, wide, sizes, numbers, pointers, strides, data(lse), data(pivots), *of, *counts)
    return message.decode(), lse


def check(
    library: Any,
    seed: int,
    dtype: torch.dtype,
    dim: int,
    seqlen: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    count: int = 0,
    room: int | None = None,
    block: int = 64,
    window: int = 2,
    bias: float = 0.0,
    scale: float | None = None,
    index: torch.dtype = torch.int32,
    lengths: tuple[int, ...] = (),
) -> None:
    """`lengths`: of sequences that are packed in one sample."""
    generator = torch.Generator().manual_seed(seed)

    def rows(heads: int) -> Tensor:  # of [batch, seqlen, heads, dim], with other columns between the heads
        x = torch.randn(batch, seqlen, heads, dim + 8, generator=generator).to(dtype)
        return x[..., :dim].transpose(1, 2)

    q, k, v = rows(heads), rows(kv_heads), rows(kv_heads)
    out = torch.full_like(q, torch.nan)
    room = count if room is None else room
    pivots = spread(batch, seqlen, count, room)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(index) if lengths else None
    if lengths:
        pivots = torch.cat([spread(1, x, min(count, x), room) for x in lengths])
    pivots = pivots.to(index)
    scale = dim**-0.5 if scale is None else scale
    message, lse = attend(library, seed, [q, k, v, out], pivots, block, window, bias, scale, ends)
    assert not message
    q, k, v = q.double(), k.double(), v.double()
    if ends is None:
        expected, expected_lse = reference.three_region_attention(q, k, v, pivots, block, window, bias, scale)
    else:
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        expected, expected_lse = reference.three_region_attention_varlen(
            *rows, pivots, ends, block, window, bias, scale
        )
        expected, expected_lse = expected.transpose(0, 1)[None], expected_lse[None]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
    error = 2**-7 if dtype == torch.bfloat16 else 2**-9  # of weights and of the result
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error)


BF16, F16 = torch.bfloat16, torch.float16
FORWARDS: dict[str, tuple[torch.dtype, int, int, dict[str, Any]]] = {
    "plain": (BF16, 64, 256, {"count": 0, "window": 9}),
    "one query": (F16, 128, 1, {"heads": 2}),
    "one tile": (BF16, 128, 128, {"count": 40, "block": 16}),
    "ragged": (F16, 64, 333, {"count": 100, "room": 111, "bias": 0.5}),
    "grouped": (BF16, 128, 200, {"batch": 2, "heads": 4, "kv_heads": 2, "count": 60, "index": torch.int64}),
    "several tiles of pivots": (F16, 64, 520, {"count": 300, "block": 32, "window": 1, "bias": -0.7}),
    "whole tiles of pivots": (BF16, 128, 512, {"count": 512, "block": 128, "window": 1}),
    "blocks across tiles": (BF16, 64, 300, {"count": 150, "block": 50, "index": torch.int64}),
    "blocks of one": (F16, 64, 140, {"count": 70, "block": 1, "window": 20}),
    "negative scale": (BF16, 64, 200, {"count": 30, "scale": -0.2, "bias": 2.0}),
    "no scale": (F16, 64, 200, {"count": 30, "scale": 0.0, "bias": 1.0}),
    "large scale": (F16, 64, 300, {"count": 90, "scale": 3.0, "bias": 20.0}),  # sums are rescaled again and again
    "huge bias": (BF16, 64, 200, {"count": 40, "bias": -300.0}),
    "padding only": (BF16, 64, 200, {"count": 0, "room": 150}),
    "wide, large scale": (F16, 128, 300, {"count": 90, "scale": -3.0, "bias": 20.0}),
    "items in turn": (BF16, 64, 140, {"batch": 2, "heads": 5, "count": 20}),  # a block takes several
}


def packed(dtype: torch.dtype, dim: int, *lengths: int, **options: Any) -> tuple[torch.dtype, int, int, dict[str, Any]]:
    return dtype, dim, sum(lengths), {**options, "lengths": lengths}


FORWARDS |= {
    "packed": packed(BF16, 64, 150, 0, 300, 1, heads=2, count=40, block=32, bias=0.5),
    "packed, wide": packed(F16, 128, 0, 129, 128, heads=2, kv_heads=1, count=50, block=16, window=1, scale=-0.3),
    "packed, short": packed(F16, 64, *(20,) * 9, heads=2, count=7, block=4, window=1, index=torch.int64),
    "packed, all pivots": packed(BF16, 64, 260, 130, count=260, block=64, window=1, bias=-0.7),
    "packed, a block without work": packed(BF16, 64, *(0,) * 9, 5, *(0,) * 9),  # which the emulator has few of
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward(attention: Any, name: str) -> None:
    dtype, dim, seqlen, options = FORWARDS[name]
    check(attention, 1, dtype, dim, seqlen, **options)


@pytest.mark.parametrize("seed", range(2, 8 if EVERYTHING else 4))
def test_forward_under_other_schedules(attention: Any, seed: int) -> None:
    check(attention, seed, BF16, 64 + seed % 2 * 64, 300, heads=2, count=100, block=48, bias=0.3)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_masked_scores_do_not_matter(attention: Any, value: float) -> None:
    """A key that only the last query sees makes only its row what it is."""
    q, k, v = torch.randn(3, 1, 1, 200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    pivots = spread(1, 200, 40, 40)
    pivots[pivots == 199] = 198
    outs = []
    for key in (0.0, value):
        k[..., 199, :] = key
        out = torch.full_like(q, torch.nan)
        message, lse = attend(attention, 1, [q, k, v, out], pivots, 32, 2, 0.0, 0.125)
        assert not message
        outs.append((out[..., :199, :], lse[..., :199]))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


@needs_nvcc
@long
def test_nvcc_leaves_products_asynchronous() -> None:
    """ptxas says so where it makes each wgmma wait, and where registers spill."""
    source = emulated_cuda.EMULATOR / "hopper_build.cu"
    kernels = compiled(source, "90a")
    report = next((emulated_cuda.ROOT / "build" / "cuda-tests" / f"{source.stem}-90a").glob("*.txt")).read_text()
    assert "Potential Performance Loss" not in report  # C7510 and others: products that wait for each other
    # C7517: at the exit that never is, which keeps exponentials behind the turn
    assert not re.search(r"\(C7\d+\)(?!.*injected.*Li64E)", report)
    assert len(kernels) == 8  # of two dtypes and head_dims, of a batch and of packed sequences
    for kernel in kernels:
        match = re.search(r"forwardI\w+Li(\d+)ELb", kernel.symbol)
        assert match
        assert kernel.registers <= 65536 // (128 * 3)
        assert not kernel.spilled
        assert not re.search(r"\b(ld|st)\.local\b", kernel.code)
        # two products before and behind the loop, both in it; the loop is there twice, and once more for what is left
        first, second, steps, ends = int(match[1]) // 16, 8, 3, 2
        assert kernel.code.count("wgmma.mma_async") >= first + ends * second + steps * (first + second)
        assert kernel.code.count("wgmma.fence") == kernel.code.count("wgmma.commit_group") - steps


@needs_nvcc
@long
@pytest.mark.parametrize("arch", ["80", "100"])
def test_nvcc_compiles_nothing_for_others(arch: str) -> None:
    for kernel in compiled(emulated_cuda.EMULATOR / "hopper_build.cu", arch):
        assert "trap;" in kernel.code
        assert "wgmma" not in kernel.code


# Without what is taken away here, the forward must not pass: a fence, a wait, a turn, the order of two steps.
FAULTS = {
    "no proxy fence": ("    gpu::fence_proxy();\n    return slot;", "    return slot;", "without fence.proxy.async"),
    "no wait for a tile": (
        "gpu::barrier_wait(shared.full(slot), step / S::kStages & 1);",
        "",
        "nothing orders them|has written|without fence",
    ),
    "slots are not waited for": (
        "if (step >= S::kStages) gpu::barrier_wait(shared.empty(at), (step / S::kStages - 1) & 1);",
        "",
        "nothing orders them",
    ),
    "slots are returned too early": (
        "        gpu::multiply_wait<0>(acc);\n        release(shared.empty(slot));\n        if (grows)",
        "        release(shared.empty(slot));\n        gpu::multiply_wait<0>(acc);\n        if (grows)",
        "what wgmma of warp .* reads, and nothing orders them",
    ),
    "scores are not waited for": ("gpu::multiply_wait<1>(s);", "", "(reads|writes) sums before wait_group"),
    "sums are not waited for": (
        "        gpu::multiply_wait<0>(acc);\n        release(shared.empty(slot));\n        if (grows)",
        "        release(shared.empty(slot));\n        if (grows)",
        "reads sums before wait_group|has written registers|nothing orders them|writes registers of a first operand",
    ),
    "no fence": (
        "gpu::settle(acc);\n        gpu::multiply_fence();\n        scores",
        "gpu::settle(acc);\n        scores",
        "since its last wgmma.fence",
    ),
    "queries are overwritten": (
        "join_group();  // all have read",
        "__syncwarp();  // all have read",
        "what wgmma of warp .* reads",
    ),
    "queries are not waited for": (
        "if (turn >= 2) gpu::barrier_wait(shared.queries_empty(slot), (turn / 2 - 1) & 1);",
        "",
        "nothing orders them",
    ),
    "a turn is skipped": (
        "gpu::named_barrier_arrive(turn_barrier((group + 1) % kGroups), 256);",
        "",
        "deadlock: .* at a named barrier",
    ),
    "no warp barrier before release": (
        "__syncwarp();\n    if (lane == 0) gpu::barrier_arrive",
        "if (lane == 0) gpu::barrier_arrive",
        "nothing orders them",
    ),
    "negated queries without a barrier": (
        "join_group();  // the fence of proxies",
        "// the fence of proxies",
        "wgmma of warp .* reads what thread",
    ),
    "what is empty is not skipped": ("if (kPacked && item.empty()) continue;", "", "deadlock"),
    "the end is not said": ("      Item::put_empty(shared.item(slot));\n", "", "reads|has written|deadlock"),
}


@long
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(name: str) -> None:
    old, new, message = FAULTS[name]
    csrc = emulated_cuda.KEPT / "hopper-fault" / "csrc"
    found = 0
    for path in kept_build.reached([emulated_cuda.HOPPER_FORWARD]):
        text, copy = path.read_text(), csrc / path.relative_to(emulated_cuda.ROOT / "csrc")
        found += text.count(old) if "hopper" in path.name else 0
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text.replace(old, new) if "hopper" in path.name else text)
    assert found == 1
    header = csrc / "cuda" / emulated_cuda.HOPPER_FORWARD.name
    objects = emulated_cuda.hopper_attention(header)
    library = ctypes.CDLL(str(kept_build.build(csrc, "hopper_attention", objects)))
    library.attend.restype = ctypes.c_char_p
    for seed in SEEDS:
        dim = 128 if "join_group" in old else 64  # of which the products read queries from shared memory
        q, k, v = torch.randn(3, 1, 7, 300, dim, generator=torch.Generator().manual_seed(seed)).bfloat16()
        pivots, ends = spread(1, 300, 100, 100), None
        if "empty()" in old or "put_empty" in old:
            pivots, ends = pivots.expand(5, -1).contiguous(), torch.tensor([0, 0, 0, 150, 150, 300])
        said, _ = attend(library, seed, [q, k, v, torch.empty_like(q)], pivots, 32, 1, 0.0, -0.125, ends)
        assert re.search(message, said), said
