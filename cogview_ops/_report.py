"""What an issue has to tell of a machine, as Markdown: `python -m cogview_ops.info --report`."""

import importlib.metadata
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import __version__, _dispatch, _environment, _manifest, _selftest

# what operators are built with, used beside and compared with
PACKAGES = (
    *("triton", "transformers", "diffusers", "accelerate", "peft", "natten", "xformers", "flash-attn", "liger-kernel"),
    *("quack-kernels", "flash-linear-attention", "torchao", "apex", "kernels", "numpy", "setuptools", "ninja"),
)
# numbers and names of choices; none that holds a path, an address or a secret
OURS = {x.name for group in _environment.VARIABLES.values() for x in group if x.name.startswith("COGVIEW_OPS_")}
VARIABLES = (
    *sorted(OURS - {"COGVIEW_OPS_COMMIT"}),
    *("MAX_JOBS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "MKL_NUM_THREADS"),
    *("KMP_BLOCKTIME", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *("TORCH_CUDA_ARCH_LIST", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION"),
)
DRIVER = Path("/proc/driver/nvidia/version")


def lines() -> Iterator[str]:
    """The report as it comes about: what is known stays on the screen if a kernel ends the process."""
    yield f"### cogview_ops {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    yield ""
    yield from map(shown, _table(["", ""], _facts()))
    yield ""
    yield from map(shown, _implementations())
    yield ""
    yield from map(shown, _results())
    yield ""
    yield "Left out: names of users and hosts, folders, and all environment variables but"
    yield f"<details><summary>these {len(VARIABLES)}</summary>{', '.join(VARIABLES)}</details>"


def shown(text: str) -> str:
    """As Markdown has it; of every path the name of its file alone, and nothing of a folder's."""
    text = re.sub(r"(['\"`])([~/][^'\"`]*)\1", lambda quoted: quoted[1] + _file(quoted) + quoted[1], text)
    text = re.sub(r"(?<![\w.])()([~/][^\s:'\"`(),;|]+)", _file, text)
    rest = r"(?<![\w.])()([^\s:'\"`(),;|]+/[^\s:'\"`(),;|]+)"  # behind a folder's name with spaces
    text = re.sub(rest, lambda path: _file(path, path[2]), text)
    return text.replace("<", "&lt;")


_FILE = re.compile(r"(\w[^/]*\.(so|py|pyc|cu|cpp|h|o|a|cubin|ptx|json|toml|txt|log)(\.\d+)*|nvcc|ptxas|ninja|[gc]\+\+)")


def _file(path: re.Match[str], instead: str = "…") -> str:
    name = path[2].rpartition("/")[2]
    return name if _FILE.fullmatch(name) else instead


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield _row(head)
    yield _row(["---"] * len(head))
    yield from map(_row, rows)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"


def _facts() -> Iterator[tuple[str, str]]:
    for fact in (_system, _processor, _instruction_sets, _gpus, _torch, _extension, _packages, _variables):
        try:
            found = fact()
        except Exception as exception:  # a driver that fails, a variable that names no instruction set
            found = _message(exception)
        yield fact.__name__.strip("_").replace("_", " "), found


def _message(exception: Exception) -> str:
    return f"{type(exception).__name__}: {' '.join(str(exception).split())[:500]}"


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:  # no Linux, or one without the file
        name = platform.system()
    return f"{name}, kernel {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver()) or 'no glibc'}"


def processor() -> str:
    """Its name; of AMD's with their family and model where a virtual machine hides them: Zen 3 to 5 are one EPYC."""
    try:
        found = dict(re.findall(r"([\w ]+?)\s*: (.*)", Path("/proc/cpuinfo").read_text()))
    except OSError:
        found = {}
    name = found.get("model name") or platform.processor() or platform.machine()
    hidden = found.get("vendor_id") == "AuthenticAMD" and not re.search(r"\d", name)
    return f"{name} {found['cpu family']}-{found['model']}" if hidden else name


def _processor() -> str:
    return f"{processor()}; {os.cpu_count()} CPUs, threads of torch: {torch.get_num_threads()}"


def _instruction_sets() -> str:
    torchs = f"torch takes {torch.backends.cpu.get_cpu_capability()}"
    if _dispatch._C is None:
        return torchs
    return f"{_dispatch._C.active_cpu()}, of {', '.join(_dispatch._C.supported_cpu())}; {torchs}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    all_of_them = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    kinds = Counter(f"{x.name} ({x.major}.{x.minor}, {x.total_memory / 2**30:.0f} GiB)" for x in all_of_them)
    try:
        driver = re.search(r"  (\d[\d.]+)  ", DRIVER.read_text())
    except OSError:
        driver = None
    found = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{found}; driver {driver[1] if driver else 'unknown'}"


def _torch() -> str:
    built = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else ""
    return built or (f"ROCm {torch.version.hip}" if torch.version.hip else "built for CPUs")


def _extension() -> str:
    build = _dispatch._C
    if build is None:
        return f"missing ({_dispatch.build_error})"
    return (
        f"{build.compiler()}, against torch {build.torch_version()}; {_dispatch.no_cuda_part() or build.cuda_archs()}"
    )


def _packages() -> str:
    """Those that are installed, without importing them."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _variables() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none of them is set"


def _implementations() -> Iterator[str]:
    reasons: list[str] = []

    def cell(operator: _manifest.Operator, impl: str) -> str:
        reason = _dispatch.reason_unavailable(operator.forward, impl)
        if reason and reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})" if reason else "yes"

    impls = _dispatch.IMPLS[2:]  # auto is a choice among these, and the reference is always there
    yield from _table(["can be loaded", *impls], ([x.name, *(cell(x, i) for i in impls)] for x in _manifest.KERNELS))
    yield ""
    yield from (f"{i}. {reason}" for i, reason in enumerate(reasons, 1))


def _results() -> Iterator[str]:
    ways = _selftest.ways()
    if not ways:
        yield "No operator was tried: the compiled extension is missing, and torch finds no GPU."
        return
    raised: list[str] = []
    bad = 0

    def cell(name: str, way: _selftest.Way) -> str:
        nonlocal bad
        try:
            error = _selftest.error(name, way)
        except Exception as exception:  # whatever it is, the report says it and goes on
            bad += 1
            raised.append(f"- {name} ({way}): {_message(exception)}")
            return "**raises**"
        if error is None:
            return ""
        right = error <= _selftest.TOLERANCES[way.dtype]  # no NaN is
        bad += not right
        return f"{error:.0e}" if right else f"**{error:.0e}, wrong**"

    yield from _table(["error of", *map(str, ways)], ([x, *(cell(x, way) for way in ways)] for x in _selftest.CALLS))
    yield ""
    yield from raised
    yield (
        f"**{bad} wrong or failed.**"
        if bad
        else "All right: outputs and gradients are the formula's, but for rounding."
    )
