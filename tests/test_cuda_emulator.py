"""The CUDA emulator itself: right kernels pass under any schedule, each wrong one is caught with a message of its own.

Then its use: every instance of the product's kernel templates runs in it, and one that lost a barrier does not pass.
"""

import ctypes
import itertools
import re
from pathlib import Path
from typing import Any

import emulated_cuda
import kept_build
import pytest
import torch
from common import DTYPES, TENSOR_CORE_DTYPES, TENSOR_CORE_HEAD_DIMS
from torch import Tensor

SEEDS = range(1, 9)
LONGEST = 20512  # columns: more than any kernel keeps in registers
pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))


@pytest.fixture(scope="module")
def library() -> Any:
    path = kept_build.build(emulated_cuda.KEPT, "kernels", [*emulated_cuda.KERNELS, *emulated_cuda.CORE])
    library = ctypes.CDLL(str(path))
    library.run.restype = ctypes.c_char_p
    return library


def data(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def run(library: Any, name: str, seed: int, x: Tensor) -> tuple[str, Tensor]:
    out = torch.full((1024,), -1.0)
    return library.run(name.encode(), seed, data(x), data(out)).decode(), out


def uneven(x: Tensor) -> Tensor:
    """Team t of each warp adds its neighbours t times; then the largest of the warp."""
    x = x.view(4, 8, 4).clone()
    for team in range(8):
        for _ in range(team):
            x[:, team] += x[:, team, [1, 0, 3, 2]]
    return x.flatten(1).amax(1).repeat_interleave(32)


X = torch.arange(1024.0)
BLOCK = X[:128]
SWAPPED = BLOCK.view(64, 2).flip(1).flatten()
HALVES = BLOCK.roll(64)
RIGHT = {
    "reverse": BLOCK.flip(0),
    "reverse_warps": BLOCK,
    "teams": BLOCK.view(-1, 4).sum(1).repeat_interleave(4),
    "uneven": uneven(BLOCK),
    "unwritten, not": HALVES,
    "dynamic": SWAPPED,
    "static_overrun, not": BLOCK,
    "vectors": X[4:128],
    "count": torch.full((128,), 128.0),
    "grid": BLOCK.flip(0),
    "48 KB": HALVES,
    "100 KB allowed": BLOCK.flip(0),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(library: Any, name: str) -> None:
    expected = RIGHT[name]
    for seed in SEEDS:
        message, out = run(library, name, seed, X)
        assert not message
        assert torch.equal(out[: len(expected)], expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reverse, no barrier", "race on static shared memory .* nothing orders them|which nothing .* has written"),
        ("reverse_warps, not the first", "race on static shared memory|which nothing in this block has written"),
        ("reverse_warps, not the second", "race on static shared memory .* nothing orders them"),
        ("shuffle_orders", r"race on static shared memory at offset \d+: thread \d+ reads what thread \d+ wrote"),
        ("teams, wrong mask", r"__shfl_xor_sync: lane \d+ is not in its mask [0f]{8}"),
        ("outside", r"lane \d+ reads lane \d+, which is not in mask 0000ffff"),
        ("masks_differ", "lane .* has mask (7fffffff|ffffffff), lane .* mask"),
        ("different_instructions", "lanes of a warp at different instructions: .* __shfl_xor_sync|.* __syncwarp"),
        ("lane_has_left", r"lane 5 .*has exited|lane 5 has exited, and lane"),
        ("some_threads_only", "deadlock: 64 threads wait at __syncthreads, .* and 64 have exited"),
        ("unwritten", "read of static shared memory at offset .*, which nothing in this block has written"),
        ("other_block", "read of dynamic shared memory at offset .*, which nothing in this block has written"),
        ("dynamic, beyond", "access to 4 bytes at offset 508 of 508 bytes of dynamic shared memory"),
        ("dynamic, before", "access to 4 bytes at offset -4 of 512 bytes of dynamic shared memory"),
        ("static_overrun", r"index 128 is beyond 'float \[128\]' \(.*kernels.cu:\d+\)"),
        ("static_too_large", "too much shared memory: 52000 bytes static and 0 dynamic"),
        ("vectors, misaligned", r"misaligned access: 'const struct float4' at .* is not at a multiple of 16 bytes"),
        ("count, not atomic", "race on static shared memory"),
        ("threads", "a block of 1056 x 1 x 1 threads"),
        ("no threads", "a block of 0 x 1 x 1 threads"),
        ("grid y", "a grid of 1 x 65536 x 1 blocks"),
        ("grid z", "a grid of 1 x 1 x 65536 blocks"),
        ("no blocks", "a grid of 0 x 1 x 1 blocks"),
        ("48 KB and one", "49153 bytes of dynamic shared memory, and the kernel's attribute allows 49152"),
        ("more than allowed", "103424 bytes of dynamic shared memory, and the kernel's attribute allows 102400"),
        ("228 KB", "^refused$"),
        ("227 KB and static", "too much shared memory: 512 bytes static and 232448 dynamic"),
        # asynchronous copies
        ("product, no wait", "reads what an asynchronous copy of thread .* writes|which nothing .* has written"),
        ("product, no arrive", "deadlock: 0 threads wait at __syncthreads, 64 at an mbarrier"),
        ("product, no init", "the mbarrier at offset .* was not initialised"),
        ("product, init unseen", "reads what thread 0 wrote, and nothing orders them|was not initialised"),
        ("product, overwritten", "race on dynamic shared memory .* thread .* what .*thread .* (reads?|writes|wrote)"),
        ("product, no return", "deadlock: 0 threads wait at __syncthreads, 64 at an mbarrier"),
        ("box, no wait", "reads what an asynchronous copy of thread 0 writes|which nothing .* has written"),
    ],
)
def test_wrong_kernels_are_caught(library: Any, name: str, message: str) -> None:
    for seed in SEEDS:
        found, _ = run(library, name, seed, X)
        assert re.search(message, found), found


# --- tensor cores, asynchronous copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_by_asynchronous_copies(library: Any, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    name = f"product {'bf16' if dtype == torch.bfloat16 else 'f16'}"
    for seed in SEEDS:
        message, out = run(library, name, seed, torch.stack([a, b]))
        assert not message
        torch.testing.assert_close(out[:256].view(16, 16), a.float() @ b.float())


def test_box_is_swizzled(library: Any) -> None:
    """The upper half is there, what is outside of the tensor is zeros."""
    for seed in SEEDS:
        message, out = run(library, "box", seed, X)
        assert not message
        assert torch.equal(out[:256], X[:256])
        assert not out[256:512].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_exact(library: Any, dtype: torch.dtype) -> None:
    """All 16-bit numbers, and the float32 numbers around each and halfway to the next, which decide the rounding."""
    half = dtype == torch.float16
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    wide = torch.empty(len(bits))
    library.widen(half, data(bits), data(wide), len(bits))
    torch.testing.assert_close(wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    following = torch.cat([wide[1:], wide[-1:]])
    middle = ((wide.double() + following.double()) / 2).float()
    near = torch.cat([x.view(torch.int32) + d for x in (wide, middle) for d in (-1, 0, 1)]).view(torch.float32)
    near = torch.cat([near, torch.tensor([65519.99, 65520.0, 3.4e38, 1e-45, -1e-45, torch.inf, -torch.inf])])
    narrow = torch.empty(len(near), dtype=torch.int16)
    library.narrow(half, data(near), data(narrow), len(near))
    torch.testing.assert_close(narrow.view(dtype), near.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert set(narrow[near.isnan()].tolist()) == {0x7FFF}


# --- the product -----------------------------------------------------------------------------------------------------


def test_every_instance_runs(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel of each template: dtypes, aligned and not, rows kept and read again, with a branch and without."""
    ops = getattr(torch.ops, emulated_cuda.NAMESPACE)
    for dtype, width in itertools.product(DTYPES, (32, 37, LONGEST)):
        x, d = torch.randn(2, 1, width).to(dtype)
        weights = torch.ones(4, width, dtype=dtype).unbind()
        ops.pb_relax_softmax_bwd(d, ops.pb_relax_softmax_fwd(x, None, 1.0, False), 1.0, False)
        _, *stats = ops.layer_norm_fwd(x, *weights[:2], 1e-5, 2, 0.0, False)
        ops.layer_norm_bwd(d, x, weights[0], *stats, 0.0)
        ones = weights[0], None, weights[2], None
        for residual in [d, d.float()] if dtype.itemsize == 2 else [d]:
            step = None, 1.0, 1e-5, 2, 0.0, False, 0.0, False, None
            h, _, *stats = ops.sandwich_layer_norm_fwd(x, residual, *weights, *step)
            ops.sandwich_layer_norm_bwd(residual, d, x, h, *ones, *stats, False, 1.0, 0.0, 0.0, False, None)
            weight = weights[0], None, weights[2], None
            step = None, 1.0, 1e-5, 0, 1.0, True, 0.0, False, None
            h, _, _, post, _, pre = ops.sandwich_rms_norm_fwd(x, residual, *weight, *step)
            step = None, None, post, None, pre, False, 1.0, 1.0, 0.0, False, None
            ops.sandwich_rms_norm_bwd(residual, d, x, h, weight[0], None, weight[2], *step)
        _, _, rstd = ops.rms_norm_fwd(x, weights[0], None, 1e-5, 0, 0.0, False)
        ops.rms_norm_bwd(d, x, weights[0], None, rstd, 0.0)
    for dtype, dim in itertools.product(TENSOR_CORE_DTYPES, TENSOR_CORE_HEAD_DIMS):
        q, k, v, d = torch.randn(4, 1, 1, 9, dim).to(dtype)
        numbers = torch.arange(9)[None], 2, 1, 0.0, 1.0
        out, lse = ops.three_region_attention_fwd(q, k, v, *numbers)
        ops.three_region_attention_bwd(d, None, q, k, v, out, lse, *numbers)
        qkv = [x[0].transpose(0, 1) for x in (q, k, v)]
        numbers = numbers[0], torch.tensor([0, 9]), 9, *numbers[1:]
        out, lse = ops.three_region_attention_varlen_fwd(*qkv, *numbers)
        ops.three_region_attention_varlen_bwd(d[0].transpose(0, 1), None, *qkv, out, lse, *numbers)
    half = {"bf16": torch.bfloat16, "f16": torch.float16}
    for name, dim in emulated_cuda.LOCAL_SHAPES:
        mask = torch.ones(1, 16, dtype=torch.bool)
        for columns, causal, sets in itertools.product((3, 7, 11, 15), (False, True), ("", "sets", "mask")):
            q, k, v, d = torch.randn(4, 1, 1, 16, dim).to(half[name])
            extra = torch.randn(4, 1, 1, 1, dim).to(half[name]) if sets == "sets" else (None,) * 4
            extra = *extra, *((torch.ones(1, 1, 2 * columns - 1), None, mask) if sets == "mask" else (None,) * 3)
            one = [1, 1] if sets == "sets" else []
            window = [2, 8], [1, columns], [1, 1], causal, False, 0.0, one, one
            out, lse = ops.local_attention_2d_fwd(q, k, v, *extra, *window, 0.0, 1.0)
            ops.local_attention_2d_bwd(d, None, q, k, v, *extra, out, lse, *window, 0.0, 1.0)
        if dim <= 64:
            for rows, causal in ((3, False), (2, True)):
                monkeypatch.setenv("COGVIEW_OPS_STRIPS", f"forward=0,0,{rows}")
                q, k, v = torch.randn(3, 1, 1, 64, dim).to(half[name])
                ops.local_attention_2d_fwd(
                    q, k, v, *(None,) * 7, [8, 8], [7, 7], [1, 1], causal, False, 0.0, [], [], 0.0, 1.0
                )
            monkeypatch.delenv("COGVIEW_OPS_STRIPS")
    launched = (ctypes.c_void_p * 1000)()
    count = ctypes.CDLL(str(emulated_library)).cuda_emulator_launched(launched, len(launched))
    instances = emulated_cuda.kernels(emulated_library)
    base = min(launched[:count]) - min(instances)
    local = sum(14 + 2 * (dim <= 64) + 5 + 2 + 1 + 2 for _, dim in emulated_cuda.LOCAL_SHAPES)
    assert len(instances) == 158 + 2 * 4 * 8 + local
    assert set(instances.values()) == {instances.get(at - base) for at in launched[:count]}


@pytest.mark.parametrize("barrier", [True, False])
def test_lost_barrier_is_caught(barrier: bool) -> None:
    """The one barrier of a reduction over several warps."""
    csrc = emulated_cuda.KEPT / ("with-barrier" if barrier else "without-barrier")
    for path in kept_build.reached([emulated_cuda.ROOT / "csrc" / "cuda" / "pb_relax_softmax.cu"]):
        text, copy = path.read_text(), csrc / path.relative_to(emulated_cuda.ROOT / "csrc")
        if path.name == "row_team.cuh" and not barrier:
            assert text.count("__syncthreads();") == 1
            text = text.replace("__syncthreads();", "")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    library = ctypes.CDLL(str(kept_build.build(emulated_cuda.KEPT, csrc.name, emulated_cuda.softmax(csrc))))
    library.softmax.restype = ctypes.c_char_p
    x = torch.randn(3, 2048)
    out = torch.empty_like(x)
    for _ in SEEDS:
        message = library.softmax(data(x), data(out), *map(ctypes.c_long, x.shape)).decode()
        if barrier:
            assert not message
            torch.testing.assert_close(out, x.softmax(-1))
        else:
            assert re.search("race on static shared memory|which nothing in this block has written", message), message
