"""The CUDA kernels as nvcc compiles them, on machines without a GPU too: registers, spills, wide loads.

16-byte accesses are read from PTX, where they are explicit; ptxas keeps them (LDG.E.128, STG.E.128).
"""

import concurrent.futures
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

CSRC = Path(__file__).parents[1] / "csrc"
ARCHS = ("80", "90a")  # setup.py's default
FILES = sorted((CSRC / "cuda").glob("*.cu"))
SCALARS = {"d": "f64", "f": "f32", "13__nv_bfloat16": "bf16", "6__half": "f16"}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


class Kernel(NamedTuple):
    name: str  # as in the source
    dtype: str
    width: int  # elements of one access
    packs: int  # kept in registers by a thread, 0: none
    registers: int
    stack: int
    spilled: int
    code: str  # PTX


def compiled(file: Path, arch: str, folder: Path) -> list[Kernel]:
    """Compile one file for one architecture with the flags of the build."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", "-O3", *COMMON_NVCC_FLAGS, target, "-Xptxas", "-v", "--keep", f"--keep-dir={folder}"]
    command = ["nvcc", *flags, "-cubin", "-o", str(folder / "k.cubin"), str(file)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    ptx = (folder / f"{file.stem}.ptx").read_text()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE))
    usage = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        run.stderr,
        re.DOTALL,
    )
    assert len(usage) == len(bodies) > 0
    kernels = []
    for symbol, stack, spilled, registers in usage:
        scalar = "|".join(SCALARS)
        match = re.search(rf"(forward|backward)I({scalar})Li(\d+)ELi(\d+)E", symbol)
        assert match, symbol
        name, dtype, width, packs = match[1], SCALARS[match[2]], int(match[3]), int(match[4])
        kernels.append(Kernel(name, dtype, width, packs, int(registers), int(stack), int(spilled), bodies[symbol]))
    return kernels


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Kernel]]:
    """(file stem, architecture) -> its kernels; all compiled at once."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = {
            (file.stem, arch): pool.submit(compiled, file, arch, tmp_path_factory.mktemp(f"{file.stem}_{arch}"))
            for file in FILES
            for arch in ARCHS
        }
        return {key: job.result() for key, job in running.items()}


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(builds: dict[tuple[str, str], list[Kernel]], arch: str) -> None:
    """Blocks have up to 1024 threads, so 64 registers each is all there is; nothing goes to local memory."""
    for file in FILES:
        for kernel in builds[file.stem, arch]:
            assert kernel.registers <= 64, kernel[:-1]
            assert (kernel.stack, kernel.spilled) == (0, 0), kernel[:-1]


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_pb_relax_softmax_moves_16_bytes_at_once(builds: dict[tuple[str, str], list[Kernel]], arch: str) -> None:
    kernels = builds["pb_relax_softmax", arch]
    assert {k.dtype for k in kernels} == set(SCALARS.values())
    wide = [k for k in kernels if k.width > 1]
    assert {(k.name, k.dtype, k.packs > 0) for k in wide} == {
        (name, dtype, kept)
        for name in ("forward", "backward")
        for dtype in ("f32", "bf16", "f16")
        for kept in (True, False)
    }
    for kernel in wide:
        loads = len(re.findall(r"\bld\.global\.nc\.v4\.\w32\b", kernel.code))
        stores = len(re.findall(r"\bst\.global\.v4\.\w32\b", kernel.code))
        assert stores == max(kernel.packs, 1), kernel[:-1]
        tensors = 1 if kernel.name == "forward" else 2
        if kernel.packs:  # every element is loaded once and stored once
            assert loads == tensors * kernel.packs, kernel[:-1]
        else:
            assert loads >= tensors, kernel[:-1]
        assert not re.search(r"\b(ld|st)\.global(\.nc)?\.[ubs](8|16)\b", kernel.code), kernel[:-1]
        assert not re.search(r"\b(ld|st)\.local\b", kernel.code), kernel[:-1]


def test_no_torch_header() -> None:
    """Whatever is reached from a kernel's file: nvcc alone compiles it."""
    seen: set[Path] = set()
    todo = [*FILES, *(CSRC / "cuda").glob("*.h"), *(CSRC / "cuda").glob("*.cuh")]
    while todo:
        path = todo.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        for mark, name in re.findall(r'^#include ([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            assert not re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", name), f"{path.name}: {name}"
            if mark == '"':
                todo.append(path.parent / name)
    assert any(path.suffix == ".cu" for path in seen)


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_every_kernel_has_a_binding(file: Path) -> None:
    binding = (CSRC / "bindings" / f"{file.stem}_cuda.cpp").read_text()
    assert "STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CUDA, m)" in binding
    assert f'#include "../cuda/{file.stem}.h"' in binding
