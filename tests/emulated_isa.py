"""Instruction sets that this processor lacks: csrc/cpu's kernels of products, compiled without their instructions.

The library is preloaded into a process of its own, where it is the only instruction set there is (emulated_isa.cpp).
"""

import platform
import shutil
import subprocess
from pathlib import Path

from common import python
from kept_build import COMPILER, Object, build

from cogview_ops import _dispatch

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "isa-emulated"
PLANS = ("linear_decode_plan", "local_attention_2d_plan", "three_region_attention_plan")
# the longest to compile first
KERNELS = ("local_tiles", "three_region_attention", "local_attention_2d", "linear_decode", "tile_engine")
UNIT = ROOT / "tests" / "emulated_tile_unit.h"
FLAGS = ["-std=c++20", "-fPIC", "-O1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-DCOGVIEW_PAIRS"]
FLAGS.append("-ftls-model=initial-exec")  # for tile registers; the library is preloaded
if _dispatch._C and "avx2" in _dispatch._C.supported_cpu():
    FLAGS.append("-mfma")  # -mavx2 would make vectors of 32 bytes


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or shutil.which(COMPILER[0]) is None:
        return f"no Linux on x86-64, or no {COMPILER[0]}"
    return "the compiled extension is missing" if _dispatch._C is None else None


def library(isa: str, csrc: Path = ROOT / "csrc") -> Path:
    """The planners, and the kernels of "amx" or "avx512bf16"; of a changed copy of csrc the files that it has."""
    flags = [*FLAGS, f"-DCOGVIEW_ISA={isa}", *([f'-DCOGVIEW_TILE_UNIT="{UNIT}"'] if isa == "amx" else [])]
    kernels = [source(csrc, stem) for stem in KERNELS]
    plans = Object(
        Path(__file__).with_suffix(".cpp"), [*flags, f"-I{csrc}"], tuple(csrc / "cpu" / f"{x}.cpp" for x in PLANS)
    )
    name = "product" if csrc == ROOT / "csrc" else csrc.name
    return build(KEPT / isa, name, [*(Object(x, flags, (UNIT,)) for x in kernels), plans])


def source(csrc: Path, stem: str) -> Path:
    path = csrc / "cpu" / f"{stem}.cpp"
    return path if path.exists() else ROOT / "csrc" / "cpu" / path.name


def run(isa: str, *arguments: str, csrc: Path = ROOT / "csrc") -> subprocess.CompletedProcess[str]:
    """Another interpreter, whose attention kernels are emulated."""
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # tests that need more set them
    return python(*arguments, LD_PRELOAD=str(library(isa, csrc)), COGVIEW_OPS_CPU="", **threads)
