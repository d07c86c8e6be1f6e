"""The compiled extension: what it exports, how it chooses, what it says."""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import emulated_cuda
import pytest
import setuptools
import torch
import torch.utils
from common import python

from cogview_ops import _dispatch, info
from cogview_ops._manifest import KERNELS, OPERATORS

ROOT = Path(__file__).parents[1]
X86, OTHERS = (ROOT / "csrc/cpu/isa_list.h").read_text().split("#else")
ISAS = re.findall(r"X\((\w+), \"", X86 if platform.machine() in ("x86_64", "AMD64") else OTHERS)
EXPECTED = f"expected {', '.join(ISAS[:-1])} or {ISAS[-1]}" if ISAS[1:] else f"expected {ISAS[0]}"
OBJECTS = sorted(p for isa in ISAS for p in ROOT.glob(f"build/torch-{torch.__version__}/{isa}/csrc/cpu/*.o"))
needs_objects = pytest.mark.skipif(
    not OBJECTS or shutil.which("nm") is None, reason="no object files under build/ (not built in this tree), or no nm"
)


def test_what_is_registered_is_in_the_manifest() -> None:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    found = {name for namespace, name in names if namespace == "cogview_ops"}
    assert found == {"seed_on", *(name for operator in OPERATORS.values() for name in operator.registered)}


no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("impl", ["cpp", pytest.param("triton", marks=no_triton)])
@pytest.mark.parametrize("operator", KERNELS, ids=lambda operator: operator.name)
def test_every_operator_has_kernels(operator, impl: str) -> None:
    assert _dispatch.build_error is None
    for op in operator.registered:
        reason = _dispatch.reason_unavailable(op, impl)
        assert reason == (None if impl == "cpp" or operator.triton else "there is no Triton kernel of this operator")


@needs_objects
def test_kernels_export_their_own_namespace_only() -> None:
    """Anything else with linkage would be merged by the linker across instruction sets: an AVX-512 copy of a
    template could then run on a processor that has no AVX-512."""
    for path in OBJECTS:
        isa = path.parts[-4]
        table = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        symbols = [line.split(maxsplit=2)[1:] for line in table.splitlines() if line]
        exported = [name for kind, name in symbols if kind.isupper() or kind in "uvw"]
        foreign = [name for name in exported if not name.startswith(f"cogview::{isa}::")]
        assert exported or path.stem.endswith("engine"), f"{isa}/{path.name} exports nothing"
        assert not foreign, f"{isa}/{path.name} exports {foreign[:3]}"


@needs_objects
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_kernels_have_no_static_initialisers() -> None:
    """They would run at import, with instructions that the processor may not have."""
    for path in OBJECTS:
        sections = subprocess.run(["objdump", "-h", path], capture_output=True, text=True, check=True).stdout
        assert ".init_array" not in sections, path
        assert ".ctors" not in sections, path


@needs_objects
def test_every_instruction_set_is_in_the_build() -> None:
    once = {"isa", *(p.stem for p in (ROOT / "csrc/cpu").glob("*_plan.cpp"))}
    kernels = {p.stem for p in (ROOT / "csrc/cpu").glob("*.cpp")} - once
    assert {p.parts[-4] for p in OBJECTS} == set(ISAS)
    for isa in ISAS:
        assert {p.stem for p in OBJECTS if p.parts[-4] == isa} >= kernels, isa


def test_choice_of_instruction_set() -> None:
    build = _dispatch._C
    names = build.supported_cpu()
    assert names[0] == "baseline"
    assert set(names) <= set(ISAS)
    try:
        for name in names:
            build.force_cpu(name)
            assert build.active_cpu() == name
        with pytest.raises(RuntimeError, match=f"{EXPECTED}, got 'sse9'"):
            build.force_cpu("sse9")
        assert build.active_cpu() == names[-1]  # the failed wish changed nothing
    finally:
        build.force_cpu(None)


def test_environment_forces_an_instruction_set() -> None:
    code = "import torch, cogview_ops as c; c.pb_relax_softmax(torch.ones(2, 3)); print(c._dispatch._C.active_cpu())"
    assert python("-c", code, COGVIEW_OPS_CPU="baseline").stdout.strip() == "baseline"
    failed = python("-c", code, COGVIEW_OPS_CPU="AVX2")
    assert failed.returncode != 0
    assert f"COGVIEW_OPS_CPU: {EXPECTED}, got 'AVX2'" in failed.stderr


def test_info_lists_every_operator() -> None:
    lines = python("-m", "cogview_ops.info").stdout.splitlines()
    assert torch.__version__ in lines[0]
    assert any(line.startswith("CPU: ") and "in use" in line for line in lines)
    assert any(line.startswith("CUDA: ") for line in lines)
    for operator in KERNELS:
        at = lines.index(operator.name)
        block = [line.split() for line in lines[at + 1 : at + 5]]
        assert [words[0] for words in block] == ["reference", "cpp", "cuda", "triton"]
        assert all(len(words) > 1 for words in block)
        assert block[1][1] == "available", operator


def planned(torch_cuda: str | None, path: Path, home: str = "", wish: str = "auto") -> list[str]:
    """CUDA_HOME and what setup.py would build for a torch of this CUDA with this folder first on PATH, or its error."""
    paths = f"{path}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": paths, "CUDA_HOME": home, "CUDA_PATH": "", "COGVIEW_OPS_CUDA": wish}
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ, environment):
        for name in ("CC", "CXX", "TORCH_CUDA_ARCH_LIST", "PYTORCH_NVCC", "UV"):
            os.environ.pop(name, None)
        patch.setattr(torch.version, "cuda", torch_cuda)
        patch.setattr(torch.cuda, "_is_compiled", lambda: torch_cuda is not None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)  # looks for CUDA when imported
        patch.delattr(torch.utils, "cpp_extension", raising=False)
        try:
            build = runpy.run_path(str(ROOT / "setup.py"))["Build"]
        except SystemExit as failed:
            return [str(failed)]
        return [os.environ["CUDA_HOME"], build.plan]


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def toolkit(folder: Path, release: str = "13.0", works: bool = True) -> Path:
    """One whose compiler does nothing, with the header."""
    version = f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1"'
    plan = f'[ "$1" = --dryrun ] && echo "#$ TOP={folder}/bin/.." >&2'
    end = "exit 0" if works else "echo 'nvcc fatal: Unsupported gpu architecture' >&2; exit 1"
    script(folder / "bin" / "nvcc", version, plan, end)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime_api.h").write_text("int cudaGetDeviceCount(int*);\n")
    (folder / "lib64").mkdir()
    source = folder / "cudart.cpp"
    source.write_text("int cudaGetDeviceCount(int*) { return 0; }\n")
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", folder / "lib64" / "libcudart.so"], check=True)
    return folder


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no c++")


@needs_compiler
def test_cuda_part_is_built_where_toolkit_and_header_are(tmp_path: Path) -> None:
    """On PATH nvcc can be a wrapper, which does not lie in the toolkit."""
    home = toolkit(tmp_path / "toolkit")
    wrapper = script(tmp_path / "elsewhere" / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    found = [str(home), "with its CUDA part"]
    assert planned("13.0", wrapper.parent) == found
    assert planned("13.0", tmp_path, home=str(tmp_path / "elsewhere")) == found
    assert planned("13.0", tmp_path, home=str(home)) == found


@needs_compiler
@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (
            lambda home: (home / "include" / "cuda_runtime_api.h").unlink(),
            "cuda_runtime_api.h: No such file or directory",
        ),
        (lambda home: (home / "lib64" / "libcudart.so").unlink(), "cudart"),
        (lambda home: toolkit_again(home, works=False), "nvcc fatal: Unsupported gpu architecture"),
        (lambda home: toolkit_again(home, release="12.6"), "nvcc is of CUDA 12.6, torch"),
        (lambda home: (home / "bin" / "nvcc").unlink(), "bin/nvcc"),
    ],
    ids=["header", "library", "compiler", "version", "nvcc"],
)
def test_else_it_is_built_for_cpus_and_says_why(break_it, why: str, tmp_path: Path) -> None:
    home = toolkit(tmp_path / "toolkit")
    break_it(home)
    plan = planned("13.0", tmp_path, home=str(home))[1]
    assert plan.startswith("without its CUDA part (")
    assert why in plan
    if why == "bin/nvcc":
        [failed] = planned("13.0", tmp_path, home=str(home), wish="1")
        assert failed.startswith("cogview-ops cannot be built: COGVIEW_OPS_CUDA=1, but there is no ")
        assert failed.endswith("bin/nvcc: CUDA_HOME=/path/to/cuda-13 COGVIEW_OPS_CUDA=1 pip install .")


def test_asking_for_cuda_without_it_fails_with_the_reason(tmp_path: Path) -> None:
    [failed] = planned(None, tmp_path, wish="1")
    assert f"COGVIEW_OPS_CUDA=1, but torch {torch.__version__} is built without CUDA: pip install" in failed
    assert failed.endswith("then COGVIEW_OPS_CUDA=1 pip install .")
    assert planned(None, tmp_path)[1] == f"without its CUDA part (torch {torch.__version__} is built without CUDA)"
    assert planned("13.0", tmp_path, wish="0")[1] == "without its CUDA part (COGVIEW_OPS_CUDA=0)"


def toolkit_again(home: Path, **different: Any) -> None:
    shutil.rmtree(home)
    toolkit(home, **different)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_part_would_be_built_with_the_nvcc_that_is_here(tmp_path: Path) -> None:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.findall(r"release (\d+\.\d+)", said)[0]
    assert planned(release, tmp_path)[1] == "with its CUDA part"


class OnGpu(NamedTuple):
    device: torch.device


@pytest.mark.skipif(bool(_dispatch._C and _dispatch._C.cuda_archs()), reason="this build has its CUDA part")
def test_a_build_without_cuda_says_so_why_and_how_to_make_one(monkeypatch, capsys) -> None:
    why = f"this build has no CUDA part ({_dispatch._C.no_cuda()}); `COGVIEW_OPS_CUDA=1 pip install .`"
    info.main()
    assert f"CUDA: {why}" in capsys.readouterr().out
    assert _dispatch._C.no_cuda()
    x = OnGpu(torch.device("cuda"))
    monkeypatch.setattr(_dispatch, "_load_triton", lambda: "Triton is not installed")
    for operator in KERNELS:
        reason = _dispatch.reason_unavailable(operator.forward, "cuda")
        assert reason is not None
        assert reason.startswith(why if operator.cuda else "there is no CUDA kernel of this operator"), operator
        for impl in ("auto", "cuda"):
            with pytest.raises(RuntimeError, match=re.escape(f"cannot run on a cuda tensor: cuda: {reason}")):
                _dispatch.select(operator.forward, impl, x)  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", KERNELS, ids=lambda operator: operator.name)
def test_manifest_knows_what_has_cuda_kernels(operator) -> None:
    assert operator.cuda == emulated_cuda.has(operator.forward)


NO_NAME = "a name that does not end in _cu13, _triton or _mixed, got"


@pytest.mark.parametrize(
    ("namespace", "why"),
    [
        *((name, f"{NO_NAME} {name!r}") for name in ("3x", "a b", "é", "", "class", "x_cu13", "x_triton", "x_mixed")),
        *((name, f"a name of your own, {name!r} is torch's") for name in ("aten", "prim", "prims")),
    ],
)
def test_namespaces_that_are_none(namespace: str, why: str, tmp_path: Path) -> None:
    with mock.patch.dict(os.environ, {"COGVIEW_OPS_NAMESPACE": namespace}):
        [failed] = planned(None, tmp_path)
    assert failed == f"cogview-ops cannot be built: COGVIEW_OPS_NAMESPACE: expected {why}"


def test_unknown_wish_for_cuda(tmp_path: Path) -> None:
    [failed] = planned("13.0", tmp_path, wish="yes")
    assert failed.endswith("COGVIEW_OPS_CUDA: expected 0, 1 or auto, got 'yes'")
