"""The compiled extension: what it exports, how it chooses, what it says."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import python

from cogview_ops import _dispatch
from cogview_ops._manifest import KERNELS, OPERATORS

ROOT = Path(__file__).parents[1]
X86, OTHERS = (ROOT / "csrc/cpu/isa_list.h").read_text().split("#else")
ISAS = re.findall(r"X\((\w+), \"", X86 if platform.machine() in ("x86_64", "AMD64") else OTHERS)
EXPECTED = f"expected {', '.join(ISAS[:-1])} or {ISAS[-1]}" if ISAS[1:] else f"expected {ISAS[0]}"
OBJECTS = sorted(p for isa in ISAS for p in ROOT.glob(f"build/{sys.implementation.cache_tag}/{isa}/csrc/cpu/*.o"))
needs_objects = pytest.mark.skipif(
    not OBJECTS or shutil.which("nm") is None, reason="no object files under build/ (not built in this tree), or no nm"
)


def test_what_is_registered_is_in_the_manifest() -> None:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    found = {name for namespace, name in names if namespace == "cogview_ops"}
    assert found == {"seed_on", *(name for operator in OPERATORS.values() for name in operator.registered)}


no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("impl", ["cpp", pytest.param("triton", marks=no_triton)])
@pytest.mark.parametrize("op", [name for operator in KERNELS for name in operator.registered])
def test_every_operator_has_kernels(op: str, impl: str) -> None:
    assert _dispatch.build_error is None
    assert _dispatch.reason_unavailable(op, impl) is None


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


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_asking_for_cuda_without_it_fails_with_the_reason() -> None:
    failed = python("setup.py", "--version", COGVIEW_OPS_CUDA="1")
    assert failed.returncode != 0
    assert f"COGVIEW_OPS_CUDA=1, but torch {torch.__version__} is built without CUDA" in failed.stderr


def test_cuda_home_is_asked_of_nvcc(tmp_path: Path) -> None:
    """On PATH it can be a wrapper, which does not lie in the toolkit."""
    wrapper = tmp_path / "nvcc"
    wrapper.write_text("#!/bin/sh\necho '#$ TOP=/opt/toolkit/bin/..' >&2\n")
    wrapper.chmod(0o755)
    code = "import os, setuptools; setuptools.setup = lambda **_: None; import setup; print(os.environ['CUDA_HOME'])"
    paths = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert python("-c", code, PATH=paths, CUDA_HOME="", CUDA_PATH="").stdout == "/opt/toolkit\n"
    assert python("-c", code, PATH=paths, CUDA_HOME="/mine", CUDA_PATH="").stdout == "/mine\n"


def test_unknown_wish_for_cuda() -> None:
    failed = python("setup.py", "--version", COGVIEW_OPS_CUDA="yes")
    assert failed.returncode != 0
    assert "COGVIEW_OPS_CUDA: expected 0, 1 or auto, got 'yes'" in failed.stderr
