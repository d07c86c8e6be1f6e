"""The CUDA emulator itself: right kernels pass under any schedule, and each wrong one is caught with a message of its own.

Then its use: every instance of the product's kernel templates runs in it, and one that lost a barrier does not pass.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import emulated_cuda
import pytest
import torch
from torch import Tensor

SEEDS = range(1, 9)
pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))


@pytest.fixture(scope="module")
def library() -> Any:
    path = emulated_cuda.build("kernels", [emulated_cuda.KERNELS, *emulated_cuda.CORE])
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
    ],
)
def test_wrong_kernels_are_caught(library: Any, name: str, message: str) -> None:
    for seed in SEEDS:
        found, _ = run(library, name, seed, X)
        assert re.search(message, found), found
