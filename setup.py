"""Builds cogview_ops._C against the torch that is installed: the CPU part always, the CUDA part where it can.

COGVIEW_OPS_CUDA=auto (default) builds the CUDA part when torch has CUDA and nvcc is there, 0 never, 1 or fail.
TORCH_CUDA_ARCH_LIST and MAX_JOBS are torch's own.
COGVIEW_OPS_SANITIZE=address,undefined builds the CPU part with these sanitizers, for `make asan`.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    # pip builds in an isolated environment; the torch to build against is the one of the environment behind it
    sys.path.append(sysconfig.get_paths()["purelib"])
    try:
        import torch
    except ImportError:
        sys.exit("cogview-ops is built against your torch and found none: pip install 'torch>=2.11' first, then again")


def find_cuda() -> None:
    """Sets CUDA_HOME where nobody has: nvcc on PATH may be a wrapper, and torch would take the folder above it."""
    nvcc = shutil.which("nvcc")
    if nvcc and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        if top:
            os.environ["CUDA_HOME"] = os.path.realpath(top[1].strip())


find_cuda()
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).parent


def instruction_sets() -> dict[str, list[str]]:
    """Names and compiler flags of csrc/cpu/isa_list.h: each has those of the ones before it too."""
    x86, others = (ROOT / "csrc/cpu/isa_list.h").read_text().split("#else")
    listed = x86 if platform.machine() in ("x86_64", "AMD64") else others
    flags: list[str] = []
    return {name: list(flags := flags + own.split()) for name, own in re.findall(r'X\((\w+), "(.*?)",', listed)}


EVERY_DTYPE = "-Werror=switch"  # has a case
CXX_FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-falign-functions=64",  # else 10 % of the speed is a matter of where the linker puts a loop
    "-Wall",
    EVERY_DTYPE,
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # inside GCC 12's own intrinsics
    "-Wno-uninitialized",
    "-g0",
]
SANITIZE = os.environ.get("COGVIEW_OPS_SANITIZE", "")
if SANITIZE:
    # the first finding ends the process; Python's own -fwrapv would hide signed overflow
    CXX_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fno-wrapv"]
    CXX_FLAGS += ["-O1", "-g1"]


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(pattern))


# planners and the choice of the instruction set; the other files of csrc/cpu are kernels, compiled for each of them
ONCE = ["csrc/cpu/isa.cpp", *sources("csrc/cpu", "*_plan.cpp")]


def want_cuda() -> bool:
    wish = os.environ.get("COGVIEW_OPS_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"COGVIEW_OPS_CUDA: expected 0, 1 or auto, got {wish!r}")
    missing = []
    if not torch.version.cuda:
        missing.append(f"torch {torch.__version__} is built without CUDA")
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        missing.append("nvcc was not found (CUDA_HOME)")
    if wish == "1" and missing:
        sys.exit(f"COGVIEW_OPS_CUDA=1, but {' and '.join(missing)}")
    return wish != "0" and not missing


class Build(BuildExtension):
    """Compiles the CPU kernels once per instruction set, then the rest as usual."""

    def finalize_options(self):
        super().finalize_options()
        # one folder for every way to build, `pip install -e` too, so that only what has changed is compiled again
        self.build_temp = str(ROOT / "build" / (sys.implementation.cache_tag + "-sanitized" * bool(SANITIZE)))

    def build_extension(self, ext):
        kernels = [s for s in sources("csrc/cpu", "*.cpp") if s not in ONCE]
        for isa, flags in instruction_sets().items():
            ext.extra_objects += self.compiler.compile(
                kernels,
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("COGVIEW_ISA", isa)],
                extra_postargs={"cxx": [*CXX_FLAGS, "-fno-exceptions", *flags]},
                depends=[*sources("csrc", "*.h"), *sources("csrc/cpu", "*.h"), "setup.py"],
            )
        super().build_extension(ext)


cuda = want_cuda()
if cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if cuda else ""
compiler = "clang" if "clang" in os.environ.get("CXX", "") else "g++"
sanitizers = f" with sanitizers {SANITIZE}" if SANITIZE else ""
macros = [
    ("COGVIEW_COMPILER", f'"{compiler} " __VERSION__ "{sanitizers}"'),
    ("COGVIEW_TORCH", f'"{torch.__version__}"'),
    ("COGVIEW_CUDA_ARCHS", f'"{archs}"'),
]
bindings = [s for s in sources("csrc/bindings", "*.cpp") if cuda or not s.endswith("_cuda.cpp")]
extension = (CUDAExtension if cuda else CppExtension)(
    "cogview_ops._C",
    [*bindings, *ONCE, *(sources("csrc/cuda", "*.cu") if cuda else [])],
    define_macros=macros + ([("USE_CUDA", None)] if cuda else []),
    depends=[*sources("csrc", "**/*.h"), *sources("csrc", "**/*.cuh"), "setup.py"],
    extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", f"-Xcompiler={EVERY_DTYPE}"]} if cuda else {"cxx": CXX_FLAGS},
    extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
)
setup(ext_modules=[extension], cmdclass={"build_ext": Build})
