"""The CUDA kernels as nvcc compiles them, on machines without a GPU too: registers, spills, wide loads.

16-byte accesses are read from PTX, where they are explicit; ptxas keeps them (LDG.E.128, STG.E.128).
"""

import concurrent.futures
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from kept_build import reached
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
ARCHS = ("80", "90a", "100")
FILES = sorted((CSRC / "cuda").glob("*.cu"))
WITHOUT_KERNELS = "local_attention_2d"  # which are in instances/
EVERYTHING = os.environ.get("COGVIEW_TESTS") == "all"
# of a thread: 65536 by the largest block; a backward of 2560 columns is 320 threads, of which there are two blocks
# bytes that a thread of the Sandwich step's backward may spill: with two packs it takes 424 us on an H100, with one and
# without spills 629
SPILLED = 300
ATTENTION, ATTENTION_REGISTERS = {"three_region_attention"}, 255  # of a thread, of which a processor has 256 at once
# bytes spilled where sums fill the registers: a few reads a tile, none in inner loops
ATTENTION_SPILLED = ("grad_(pivot|window)I.*Li64E|forwardI.*Li128E", 32)
DTYPE = {"80": "f32", "90a": "bf16", "100": "f16"}  # compiled for it; all of them on each would take minutes
SCALARS = {"d": "f64", "f": "f32", "13__nv_bfloat16": "bf16", "6__half": "f16"}
MACRO = r"\b(?:STD|STABLE|TORCH|C10|AOTI)_[A-Z0-9_]+\b"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


class Kernel(NamedTuple):
    symbol: str
    registers: int
    stack: int
    spilled: int
    code: str  # PTX


Builds = dict[tuple[str, str], list[Kernel]]  # of (file stem, architecture)


def compiled(file: Path, arch: str) -> list[Kernel]:
    """One file compiled for one architecture with the flags of the build, again only when something has changed."""
    folder = ROOT / "build" / "cuda-tests" / f"{file.stem}-{arch}"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    dtype = "bf16" if file.stem in ATTENTION and DTYPE[arch] == "f32" else DTYPE[arch]
    flags = ["-std=c++17", "-O3", *COMMON_NVCC_FLAGS, target, f"-DCOGVIEW_ONE_DTYPE={dtype}", "-Xptxas", "-v"]
    flags += [] if EVERYTHING or file.stem not in ATTENTION else ["-DCOGVIEW_ONE_HEAD_DIM=64"]
    command = ["nvcc", *flags, "--keep", f"--keep-dir={folder}", "-cubin", "-o", str(folder / "k.cubin"), str(file)]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    sources = [path.read_text() for path in reached([file])]
    report = folder / f"{hashlib.sha256(repr([command, version, sources]).encode()).hexdigest()}.txt"
    if not report.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "warning" not in run.stderr, run.stderr
        report.write_text(run.stderr)
    ptx = (folder / f"{file.stem}.ptx").read_text()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE))
    usage = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        report.read_text(),
        re.DOTALL,
    )
    assert len(usage) == len(bodies) > 0
    return [
        Kernel(symbol, int(registers), int(stack), int(spilled), bodies[symbol])
        for symbol, stack, spilled, registers in usage
    ]


@pytest.fixture(scope="module")
def builds() -> Builds:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = {
            (file.stem, arch): pool.submit(compiled, file, arch)
            for file in FILES
            for arch in ARCHS
            if file.stem != WITHOUT_KERNELS and (EVERYTHING or arch == "90a" or file.stem not in ATTENTION)
        }
        return {key: job.result() for key, job in running.items()}


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(builds: Builds, arch: str) -> None:
    """The largest block fits, and nothing that need not goes to local memory."""
    for stem in [stem for stem, of in builds if of == arch]:
        for kernel in builds[stem, arch]:
            most, spilled = 128, SPILLED * bool(re.search(r"backwardI.*Li2ELb1E", kernel.symbol))
            if stem in ATTENTION:
                which, spilled = ATTENTION_SPILLED
                most, spilled = ATTENTION_REGISTERS, spilled * bool(re.search(which, kernel.symbol))
            assert kernel.registers <= most, kernel.symbol
            assert kernel.spilled <= spilled, kernel.symbol
            assert not re.search(r"\b(ld|st)\.local\b", kernel.code), kernel.symbol


@needs_nvcc
def test_local_attention_spills_nothing() -> None:
    """On its default path; of head_dim 64 a multiprocessor has 12 warps of queries, and 8 that own keys."""
    kernels = compiled(ROOT / "tests" / "cuda_default_paths.cu", "90a")
    assert len(kernels) == 3
    for kernel in kernels:
        owns_keys = "Lb1E" in kernel.symbol
        assert kernel.registers <= (255 if owns_keys else 168), kernel.symbol
        assert kernel.spilled == 0, kernel.symbol


@needs_nvcc
@pytest.mark.skipif(not EVERYTHING, reason="takes minutes: COGVIEW_TESTS=all")
@pytest.mark.parametrize("file", sorted((CSRC / "cuda" / "instances").glob("local*.cu")), ids=lambda p: p.stem)
def test_every_instance_of_local_attention_compiles(file: Path) -> None:
    """Some spill: with extra keys and an order, or with all rows of units at once, 610 bytes at most."""
    for kernel in compiled(file, "90a"):
        assert kernel.registers <= 255, kernel.symbol
        assert kernel.spilled <= 610, kernel.symbol


def wide_accesses(code: str) -> tuple[int, int]:
    """Loads and stores of 16 bytes; none of one or two."""
    assert not re.search(r"\b(ld|st)\.global(\.nc)?\.[ubs](8|16)\b", code)
    loads = len(re.findall(r"\bld\.global(?:\.nc)?\.v4\.\w32\b", code))
    return loads, len(re.findall(r"\bst\.global\.v4\.\w32\b", code))


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_pb_relax_softmax_moves_16_bytes_at_once(builds: Builds, arch: str) -> None:
    """Kernels are templates of dtype, alignment, and accesses per thread that stay in registers (or 0)."""
    wide = set()
    for kernel in builds["pb_relax_softmax", arch]:
        match = re.search(rf"(forward|backward)I({'|'.join(SCALARS)})Lb([01])ELi(\d+)E", kernel.symbol)
        assert match, kernel.symbol
        name, scalar, aligned, kept = match[1], SCALARS[match[2]], match[3] == "1", int(match[4])
        if not aligned or scalar == "f64":
            continue
        wide.add((name, scalar, kept > 0))
        loads, stores = wide_accesses(kernel.code)
        tensors = 1 if name == "forward" else 2
        assert stores == max(kept, 1), kernel.symbol
        # rows that fit are read once
        assert loads == tensors * kept if kept else loads >= 2 * tensors, kernel.symbol
    assert wide == set(itertools.product(("forward", "backward"), (DTYPE[arch],), (True, False)))


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_norms_move_16_bytes_at_once(builds: Builds, arch: str) -> None:
    """Templates of the dtypes of branch and residual, alignment, accesses per thread of each tensor, whether there is a
    branch, and whether it is RMSNorm."""
    wide = set()
    for kernel in builds["sandwich_layer_norm", arch]:
        match = re.search(
            rf"(forward|backward)I({'|'.join(SCALARS)})(\w+?)Lb([01])ELi(\d+)ELb([01])ELb([01])E", kernel.symbol
        )
        if not match or match[4] == "0":
            assert match or re.search("total|peaks", kernel.symbol), kernel.symbol
            continue
        name, kept, branch, rms = match[1], int(match[5]), match[6] == "1", match[7] == "1"
        loads, stores = wide_accesses(kernel.code)
        if match[2] != "f" and match[3] == "f":  # of float32, beside 8 bytes of 16 bits
            assert loads >= max(kept, 1), kernel.symbol
            assert stores >= (max(kept, 1) if branch else 0), kernel.symbol
            continue
        wide.add((name, kept > 0, branch, rms))
        # h and x, dresidual and dbranch; in the backward again for each gradient or norm that may not be there
        rows = max(kept, 1) * {"forward": 1 + branch, "backward": 2 + branch}[name]
        copies = 1 if name == "forward" else 2
        # each norm's sums, which are float32 and for which the compiler may not know global memory
        sums = max(kept, 1) * (1 if rms else 2) * (1 + branch) * (1 if match[2] == "f" else 2) * (name == "backward")
        assert rows <= stores <= copies * (rows + sums), kernel.symbol
        assert loads >= max(kept, 1) * (1 + branch if name == "forward" else 2 + 2 * branch), kernel.symbol
    assert wide == set(itertools.product(("forward", "backward"), *3 * [(True, False)]))


def test_no_torch_header() -> None:
    """Whatever is reached from a kernel's file: nvcc alone compiles it."""
    for path in reached([*FILES, *(CSRC / "cuda").glob("*.h"), *(CSRC / "cuda").glob("*.cuh")]):
        for name in re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            assert not re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", name), f"{path.name}: {name}"


def test_bindings_keep_to_the_macros_of_torch_2_11() -> None:
    """Newer headers have more, whatever version of the ABI was asked for. (`make test-all` builds against 2.11.)"""
    used = {name for path in (CSRC / "bindings").iterdir() for name in re.findall(MACRO, path.read_text())}
    allowed = {"STD_TORCH_CHECK", "STD_CUDA_CHECK", "TORCH_ERROR_CODE_CHECK", "TORCH_BOX", "C10_STRINGIZE"}
    allowed |= {"STABLE_TORCH_LIBRARY_IMPL", "STABLE_TORCH_LIBRARY_FRAGMENT"}
    assert used == {*allowed, "TORCH_TARGET_VERSION"}


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_every_kernel_has_a_binding(file: Path) -> None:
    binding = (CSRC / "bindings" / f"{file.stem}_cuda.cpp").read_text()
    assert "STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CUDA, m)" in binding
    assert f'#include "../cuda/{file.stem}.h"' in binding
