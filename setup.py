"""Builds cogview_ops/libcogview_ops.so against the torch that is installed: the CPU part always, the CUDA part where
it can. There is no Python in it, and of torch its stable ABI alone: it serves every Python, and this torch and later.

COGVIEW_OPS_CUDA=auto (default) builds the CUDA part when torch has CUDA and a toolkit is there that works, 0 never,
1 or fail. TORCH_CUDA_ARCH_LIST and MAX_JOBS are torch's own.
COGVIEW_OPS_SANITIZE=address,undefined builds the CPU part with these sanitizers, for `make asan`.
COGVIEW_OPS_NAMESPACE=cogview_ops is where torch has the operators: several builds can then be in one process.

What is missing is one sentence with the command that helps, said before anything is compiled. A source distribution
needs no torch.
"""

import importlib.util
import keyword
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import setuptools

PIP = "uv pip" if os.environ.get("UV") else "pip"
BUILD_TOOLS = f"{PIP} install 'setuptools>=77' ninja"
NOT_ISOLATED = f"{PIP} install --no-build-isolation ."
CUDA_AGAIN = f"COGVIEW_OPS_CUDA=1 {PIP} install ."
DESCRIBES_ONLY = bool({"sdist", "egg_info"} & set(sys.argv))  # builds nothing


def fail(why: str) -> NoReturn:
    sys.exit(f"cogview-ops cannot be built: {why}")


def version(of: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", of)[:2]))


def find_torch() -> bool:
    """Whether torch can be imported, if need be from the environment that pip has isolated this build from."""
    if importlib.util.find_spec("torch") is None:
        hidden = {"PYTHONPATH", "PYTHONNOUSERSITE"}  # pip's
        own = {name: value for name, value in os.environ.items() if name not in hidden}
        code = "import sys; print(*sys.path, sep='\\n')"
        run = subprocess.run([sys.executable, "-P", "-c", code], env=own, capture_output=True, text=True)
        sys.path += [path for path in run.stdout.splitlines() if path not in sys.path]
        importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


def without_torch() -> NoReturn:
    if "build-env-" in sys.prefix:
        fail(f"it is isolated from your torch: {BUILD_TOOLS}, then python -m build --no-isolation")
    if re.search(r"builds-v\d", sys.prefix) or sys.prefix.startswith(tempfile.gettempdir() + os.sep + "tmp"):
        fail(f"it is isolated from your torch: {BUILD_TOOLS}, then {NOT_ISOLATED}")
    fail(f"there is no torch in {sys.prefix}: {PIP} install 'torch>=2.11', then {PIP} install .")


def find_cuda() -> None:
    """Sets CUDA_HOME to the toolkit of nvcc, which may be a wrapper elsewhere: torch takes the folder above it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if nvcc and not (home and os.path.exists(os.path.join(home, "include", "cuda_runtime_api.h"))):
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        if top:
            os.environ["CUDA_HOME"] = os.path.realpath(top[1].strip())


if version(setuptools.__version__) < (77,):
    fail(f"setuptools is {setuptools.__version__}, 77 or newer is needed: {BUILD_TOOLS}, then {NOT_ISOLATED}")
if DESCRIBES_ONLY:
    from setuptools.command.build_ext import build_ext as BuildExtension
else:
    if not find_torch():
        without_torch()
    find_cuda()
    try:
        import torch
    except Exception as error:
        fail(f"your torch cannot be imported ({error}): {PIP} install --force-reinstall 'torch>=2.11'")
    if version(torch.__version__) < (2, 11):
        fail(f"torch is {torch.__version__}: {PIP} install 'torch>=2.11', then {PIP} install .")
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension

    os.environ.setdefault("CXX", "c++")  # torch's choice to compile with; to link with it as well

ROOT = Path(__file__).parent
CUDA_ARCHS = "8.0+PTX;9.0a"


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
if "clang" not in os.environ.get("CXX", "c++"):
    CXX_FLAGS.append("-fno-gnu-unique")  # else two builds in one process share what is static in templates
SANITIZE = os.environ.get("COGVIEW_OPS_SANITIZE", "")
if SANITIZE:
    # the first finding ends the process; Python's own -fwrapv would hide signed overflow
    CXX_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-fno-wrapv"]
    CXX_FLAGS += ["-O1", "-g1"]


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(pattern))


# planners and the choice of the instruction set; the other files of csrc/cpu are kernels, compiled for each of them
ONCE = ["csrc/cpu/isa.cpp", *sources("csrc/cpu", "*_plan.cpp")]


def first_error(command: list[str], source: str) -> str:
    """What a compiler says first about a source, "" if it takes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trial")
        path.write_text(source)
        try:
            run = subprocess.run([*command, path, "-o", f"{path}.out"], cwd=folder, capture_output=True, text=True)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
    lines = [line.strip() for line in run.stderr.splitlines()] or [f"{command[0]} ends with {run.returncode}"]
    return next((x for x in lines if re.search("error|fatal|cannot find", x)), lines[-1]) if run.returncode else ""


def check_compiler() -> None:
    flags = [*list(instruction_sets().values())[-1], "-std=c++17", "-fPIC", "-shared", "-x", "c++"]
    error = first_error([*shlex.split(os.environ["CXX"]), *flags], "#include <optional>\n")
    if error:
        fail(f"{error}\ng++ 11, clang++ 12 or newer is needed: apt install g++, or CXX=/path/to/g++ {PIP} install .")


def no_cuda() -> str:
    """Why this build has no CUDA part, or ""."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None:
        return "nvcc was found neither on PATH nor in CUDA_HOME"
    nvcc = os.environ.get("PYTORCH_NVCC") or os.path.join(CUDA_HOME, "bin", "nvcc")
    if not shutil.which(nvcc):
        return f"there is no {nvcc}"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release and int(release[1]) != version(torch.version.cuda)[0]:
        return f"nvcc is of CUDA {release[0].split()[1]}, torch {torch.__version__} of {torch.version.cuda}"
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    try:
        archs = cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        fail(f"TORCH_CUDA_ARCH_LIST: {error}")
    headers = [f"-I{path}" for path in cpp_extension.include_paths("cuda", torch_include_dirs=False)]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths("cuda")]
    source = "#include <cuda_runtime_api.h>\nint count(int* n) { return cudaGetDeviceCount(n); }\n"
    host = [*shlex.split(os.environ["CXX"]), *headers, "-fPIC", "-shared", "-Wl,--no-as-needed"]
    ccbin = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
    device = [nvcc, *ccbin, *archs, *headers, "-c", "-x", "cu"]
    return first_error([*host, *libraries, "-lcudart", "-x", "c++"], source) or first_error(device, source)


def want_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA part, and why not."""
    wish = os.environ.get("COGVIEW_OPS_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        fail(f"COGVIEW_OPS_CUDA: expected 0, 1 or auto, got {wish!r}")
    why = "COGVIEW_OPS_CUDA=0" if wish == "0" else no_cuda()
    if wish == "1" and why:
        if torch.version.cuda:
            then = f"CUDA_HOME=/path/to/cuda-{version(torch.version.cuda)[0]} {CUDA_AGAIN}"
        else:
            then = f"{PIP} install --force-reinstall 'torch>=2.11' (with CUDA), then {CUDA_AGAIN}"
        fail(f"COGVIEW_OPS_CUDA=1, but {why}: {then}")
    return not why, why


class Build(BuildExtension):
    """Compiles the CPU kernels once per instruction set, then the rest as usual."""

    plan = ""

    def finalize_options(self):
        super().finalize_options()
        # one folder for every way to build, `pip install -e` too, so that only what has changed is compiled again
        self.build_temp = str(ROOT / "build" / (f"torch-{torch.__version__}" + "-sanitized" * bool(SANITIZE)))
        self.force = True  # what was built for another torch, or without CUDA, is not newer; ninja knows what to redo
        self.no_python_abi_suffix = True

    def run(self):
        print(f"Building cogview-ops {self.plan}", flush=True)
        # left by a build of before there was a library: Python would take it for _C.py
        for old in (ROOT / "cogview_ops").glob("_C.*.so"):
            old.unlink()
        try:
            super().run()
        except Exception as error:  # its traceback would bury the compiler's errors
            memory = f"if a compiler was killed for want of memory, MAX_JOBS=1 {PIP} install ."
            fail(f"{error}\nThe first 'error:' above says why; {memory}")

    def build_extension(self, ext):
        write_schemas(Path(self.build_temp))
        ext.include_dirs.append(str(Path(self.build_temp).absolute()))
        kernels = [s for s in sources("csrc/cpu", "*.cpp") if s not in ONCE]
        for isa, flags in instruction_sets().items():
            ext.extra_objects += self.compiler.compile(
                kernels,
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("COGVIEW_ISA", isa)],
                extra_postargs={"cxx": [*CXX_FLAGS, "-fno-exceptions", *flags]},
                depends=[*sources("csrc", "*.h"), *sources("csrc/cpu", "*.h"), "setup.py"],
            )
        for name in ("linker_so", "linker_so_cxx"):  # Debian's Python binds functions at once: tests preload others
            if hasattr(self.compiler, name):
                words = [word for word in getattr(self.compiler, name) if word != "-Wl,-Bsymbolic-functions"]
                setattr(self.compiler, name, words)
        super().build_extension(ext)


SCHEMAS = """
sys.modules["cogview_ops._C"] = None  # what was built before
import cogview_ops, torch
for operator in cogview_ops._manifest.KERNELS:
    for name in operator.registered:
        schema = str(getattr(torch.ops.cogview_ops, name).default._schema)
        print(f'COGVIEW_SCHEMA("{schema.removeprefix("cogview_ops::")}")')
"""


def write_schemas(folder: Path) -> None:
    """For the library, out of the Python package, which defines them: a program that loads it may have no Python."""
    code = f"import sys\nsys.path[:] = {[str(ROOT), *sys.path]!r}\n{SCHEMAS}"  # pip would take torch out of PYTHONPATH
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    if run.returncode:
        fail(f"cogview_ops cannot be imported with torch {torch.__version__}: {run.stderr.strip().splitlines()[-1]}")
    path = folder / "schemas.inc"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != run.stdout:
        path.write_text(run.stdout)


def extension() -> setuptools.Extension:
    namespace = os.environ.get("COGVIEW_OPS_NAMESPACE", "cogview_ops")
    torchs = {schema.name.partition("::")[0] for schema in torch._C._jit_get_all_schemas()} - {"cogview_ops"}
    ours = re.search(r"_(cu\d+|triton|mixed)$", namespace)  # names of files and of namespaces beside it
    if not namespace.isidentifier() or not namespace.isascii() or keyword.iskeyword(namespace) or ours:
        fail(f"COGVIEW_OPS_NAMESPACE: expected a name that does not end in _cu13, _triton or _mixed, got {namespace!r}")
    if namespace in torchs:
        fail(f"COGVIEW_OPS_NAMESPACE: expected a name of your own, {namespace!r} is torch's")
    cuda, why_not = want_cuda()
    Build.plan = "with its CUDA part" if cuda else f"without its CUDA part ({why_not})"
    compiler = "clang" if "clang" in os.environ["CXX"] else "g++"
    sanitizers = f" with sanitizers {SANITIZE}" if SANITIZE else ""
    facts = {
        "COGVIEW_TORCH": torch.__version__,
        "COGVIEW_CUDA_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else "",
        "COGVIEW_NO_CUDA": re.sub(r"[^\w .,:;/+=()-]", "", why_not),  # as a string of C and of a shell
    }
    macros = [("COGVIEW_OPS_NAMESPACE", namespace)]
    macros += [("COGVIEW_COMPILER", f'"{compiler} " __VERSION__ "{sanitizers}"')]
    macros += [(name, f'"{fact}"') for name, fact in facts.items()]
    bindings = [s for s in sources("csrc/bindings", "*.cpp") if cuda or not s.endswith("_cuda.cpp")]
    # kernels for what only 9.0a has; code for 9.0 beside it could be taken in its place
    archs = set(re.split("[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")))
    hopper = [("COGVIEW_SM_90A", None)] if cuda and "9.0a" in archs and not {"9.0", "9.0+PTX"} & archs else []
    flags = {"cxx": CXX_FLAGS, "nvcc": ["-O3", f"-Xcompiler={EVERY_DTYPE}"]} if cuda else {"cxx": CXX_FLAGS}
    for_cuda = f"_cu{version(torch.version.cuda)[0]}" if cuda else ""
    library = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        f"cogview_ops.lib{namespace}{for_cuda}",
        [*bindings, *ONCE, *(sources("csrc/cuda", "**/*.cu") if cuda else [])],
        define_macros=macros + ([("USE_CUDA", None)] if cuda else []) + hopper,
        depends=[*sources("csrc", "**/*.h"), *sources("csrc", "**/*.cuh"), "setup.py"],
        extra_compile_args=flags,
        extra_link_args=["-Wl,--as-needed", *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])],
    )
    library.libraries = [name for name in library.libraries if name not in ("c10", "c10_cuda", "torch_python")]
    return library


if DESCRIBES_ONLY:
    setuptools.setup(ext_modules=[setuptools.Extension("cogview_ops.libcogview_ops", [])])
else:
    from setuptools.command.bdist_wheel import bdist_wheel

    class Wheel(bdist_wheel):
        """For every Python: there is none in the library."""

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    if {"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv):
        check_compiler()  # before a hundred lines about other files
    setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
