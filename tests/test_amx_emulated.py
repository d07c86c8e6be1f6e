"""The tile kernels on processors without AMX: its instructions emulated, in a process of their own."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from common import python

from cogview_ops import _dispatch

SOURCE = Path(__file__).with_name("amx_emulator.cpp")
SUPPORTED = _dispatch._C.supported_cpu() if _dispatch._C else []
COMPILER = os.environ.get("CXX", "c++").split()

pytestmark = [
    pytest.mark.skipif("amx" in SUPPORTED, reason="AMX is here, all tests run on it"),
    pytest.mark.skipif("avx512bf16" not in SUPPORTED, reason="the emulated kernels need AVX512-BF16"),
    pytest.mark.skipif(
        platform.system() != "Linux" or not shutil.which(COMPILER[0]), reason="no Linux, or no compiler"
    ),
]


def test_attention_on_tiles(tmp_path: Path) -> None:
    """What is tested on every instruction set, in the dtypes that the tile unit multiplies."""
    library = tmp_path / "amx.so"
    subprocess.run([*COMPILER, "-O3", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    files = [f"tests/test_{op}.py" for op in ("local_attention_2d", "three_region_attention")]
    chosen = "amx and every_instruction_set and (bfloat16 or float16)"
    command = ("-m", "pytest", "-p", "no:faulthandler", *files, "-k", chosen)
    done = python(*command, LD_PRELOAD=str(library), COGVIEW_OPS_CPU="amx")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 30


def test_without_it_tiles_are_refused() -> None:
    done = python("-c", "from cogview_ops import _C; _C.active_cpu()", COGVIEW_OPS_CPU="amx")
    assert "does not support 'amx'" in done.stderr
