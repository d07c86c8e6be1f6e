"""The CUDA kernels on CPU tensors: csrc/cuda and its bindings, compiled as C++ against tests/cuda_emulator.

The library registers the kernels in `cogview_ops_emulated`; conftest.py lets tests of `impl="cuda"` run on it where
there is no GPU. It is kept in build/cuda-emulated until a source, a flag or the compiler changes. CUDA_EMULATOR_SEED
picks other random schedules.
"""

import functools
import importlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from kept_build import COMPILER, Object, build
from torch.utils.cpp_extension import include_paths, library_paths

from cogview_ops import _dispatch

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
BINDINGS = ROOT / "csrc" / "bindings"
KEPT = ROOT / "build" / "cuda-emulated" / f"torch-{torch.__version__}"
NAMESPACE = "cogview_ops_emulated"
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fcf-protection=none", "-Wall", "-Werror"]
COMMON += ["-Wno-unknown-pragmas", f"-I{EMULATOR / 'include'}"]
# -fno-extern-tls-init: shared memory has no constructors; no cleanup in kernels when a launch throws
KERNEL = [*COMMON, "-x", "c++", "-O1", "-g1", "-fno-exceptions", "-fno-extern-tls-init"]
KERNEL += ["-fsanitize=thread,alignment,bounds", "-fno-sanitize-recover=all"]
TORCH = ["-isystem" + path for path in include_paths()]


HEADERS = tuple(EMULATOR.rglob("*.h"))


def of_emulator(stem: str) -> Object:
    return Object(EMULATOR / f"{stem}.cpp", [*COMMON, "-O2"], HEADERS)


CORE = [of_emulator(stem) for stem in ("launch", "schedule", "shadow", "async", "wgmma", "sanitizers")]
KERNELS = [Object(EMULATOR / f"{stem}.cu", [*KERNEL, "-fexceptions"], HEADERS) for stem in ("kernels", "pipelines")]
HOPPER = Object(EMULATOR / "hopper.cu", [*KERNEL, "-fexceptions"], HEADERS)
HOPPER_FORWARD = ROOT / "csrc" / "cuda" / "three_region_hopper.cuh"


def hopper_attention(header: Path = HOPPER_FORWARD) -> list[Object]:
    """The forward for compute capability 9.0 without torch."""
    flags = [*KERNEL, "-fexceptions", f'-DCOGVIEW_HOPPER="{header}"']
    return [Object(EMULATOR / "hopper_attention.cu", flags, (*HEADERS, header)), *CORE]


VARLEN = "instances/three_region_varlen.cu"
# of 2D local attention: dtype and head_dim of the instances, each half a minute to compile
LOCAL_SHAPES = [("bf16", 32), ("f16", 64)]
if os.environ.get("COGVIEW_TESTS") == "all":
    LOCAL_SHAPES = [(dtype, dim) for dtype in ("bf16", "f16") for dim in (32, 64, 96, 128)]


def local_2d_kernels(csrc: Path, shapes: list[tuple[str, int]]) -> list[Object]:
    known = "-DCOGVIEW_LOCAL_SHAPES(X)=" + " ".join(f"X({dtype}, {dim})" for dtype, dim in shapes)
    instances = [csrc / "cuda" / "instances" / f"local_2d_{dtype}_{dim}.cu" for dtype, dim in shapes]
    calls = Object(csrc / "cuda" / "local_attention_2d.cu", [*KERNEL, known], HEADERS)
    return [*(Object(path, KERNEL, HEADERS) for path in instances), calls]


def product(csrc: Path = ROOT / "csrc") -> list[Object]:
    """All that the library consists of, the longest to compile first."""
    kernels = sorted((csrc / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    bindings = [csrc / "bindings" / f"{path.stem}_cuda.cpp" for path in kernels]
    include = ["-O1", "-include", str(EMULATOR / "torch_bindings.h"), *TORCH]
    return [
        *local_2d_kernels(csrc, LOCAL_SHAPES),
        Object(csrc / "cuda" / VARLEN, KERNEL, HEADERS),
        *(Object(path, KERNEL, HEADERS) for path in kernels if path.stem != "local_attention_2d"),
        *(Object(path, [*COMMON, *include], HEADERS) for path in bindings),
        of_emulator("product"),
        *CORE,
    ]


def softmax(csrc: Path) -> list[Object]:
    """One kernel in float32 without torch, a second or two to compile."""
    kernel = Object(csrc / "cuda" / "pb_relax_softmax.cu", [*KERNEL, "-DCOGVIEW_ONE_DTYPE=f32"], HEADERS)
    return [kernel, of_emulator("softmax"), of_emulator("product"), *CORE]


def three_region(csrc: Path) -> list[Object]:
    """Its kernels for bfloat16 and heads of 32 without torch, three seconds to compile."""
    one = ["-DCOGVIEW_ONE_DTYPE=bf16", "-DCOGVIEW_ONE_HEAD_DIM=32"]
    kernels = [Object(csrc / "cuda" / path, [*KERNEL, *one], HEADERS) for path in ("three_region_attention.cu", VARLEN)]
    return [*kernels, of_emulator("three_region"), of_emulator("product"), *CORE]


def local_2d(csrc: Path) -> list[Object]:
    """Its kernels for bfloat16 and heads of 64 without torch."""
    return [*local_2d_kernels(csrc, [("bf16", 64)]), of_emulator("local_2d"), of_emulator("product"), *CORE]


@functools.cache
def missing() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "its fibers are for Linux on x86-64"
    if shutil.which(COMPILER[0]) is None:
        return f"there is no {COMPILER[0]}"
    if _dispatch._C and "sanitizers" in _dispatch._C.compiler():
        return "sanitizers do not follow its fibers"
    macros = subprocess.run([*COMPILER, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    if "__GNUC__" not in macros or "__clang__" in macros:
        return f"{COMPILER[0]} is not GCC, whose instrumentation it needs"
    return None


@functools.cache
def load() -> Path:
    """Builds the library where it must be, and makes its operators complete: schemas, fakes, derivatives."""
    link = [f"-L{path}" for path in library_paths()]
    library = build(KEPT, "product", product(), [*link, "-ltorch_cpu", "-lc10"])
    for path in BINDINGS.glob("*_cuda.cpp"):
        importlib.import_module(f"cogview_ops.{path.stem.removesuffix('_cuda')}").register(NAMESPACE)
    torch.ops.load_library(library)
    return library


def kernels(library: Path) -> dict[int, str]:
    """Address and name of all instances of the product's kernels."""
    names = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    kernel = (
        r"^(\w+) t void cogview::cuda::\(anonymous namespace\)::(\w+<.*>)\(cogview::.*(?:Args|Attention)(?:, .*)?\)$"
    )
    return {int(at, 16): name for at, name in re.findall(kernel, names, re.MULTILINE)}


@functools.cache
def has(op: str) -> bool:
    """Whether there is a CUDA kernel of this operator to emulate."""
    return any(f'm.impl("{op}"' in path.read_text() for path in BINDINGS.glob("*_cuda.cpp"))


def select(original: Any) -> Any:
    """`_dispatch.select` that takes CPU tensors for impl="cuda"."""

    def select(op: str, impl: str, x: torch.Tensor, limits: Any = None) -> Any:
        if impl == "cuda" and x.device.type in ("cpu", "meta"):
            if limits and (why := limits()):
                raise RuntimeError(f"{op} cannot run on a {x.device.type} tensor: cuda: {why}. impl='reference' can.")
            return NAMESPACE
        return original(op, impl, x, limits)

    return select
