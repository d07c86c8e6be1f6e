"""The kernels for AMX and for pairs of bfloat16 where there is neither: emulated, in processes of their own.

COGVIEW_TESTS=all, as in `make test-all`, breaks them too, one thing at a time: emulated_faults.py.
"""

import json
import os
import re
from pathlib import Path

import emulated_faults
import emulated_isa
import pytest
from common import python

from cogview_ops import _dispatch

SUPPORTED = _dispatch._C.supported_cpu() if _dispatch._C else []
FILES = [
    f"tests/operators/test_{x}.py"
    for x in (
        "linear_decode",
        "local_attention_2d",
        "natten",
        "sequence_attention",
        "three_region_attention",
        "three_region_leftpad",
        "three_region_varlen",
    )
]

pytestmark = pytest.mark.skipif(emulated_isa.missing() is not None, reason=str(emulated_isa.missing()))
long = pytest.mark.skipif(os.environ.get("COGVIEW_TESTS") != "all", reason="takes minutes: COGVIEW_TESTS=all")


@pytest.mark.parametrize("isa", ["amx", pytest.param("avx512bf16", marks=long)])
def test_attention(isa: str) -> None:
    """Truth, gradients, masks entry by entry, on one thread and several, of what is multiplied in pairs."""
    if isa in SUPPORTED:
        pytest.skip(f"{isa} is here, all tests run on it")
    chosen = "(bfloat16 or float16) and not (triton or cuda or one_gradient or every_instruction_set)"
    there = emulated_isa.run(isa, "-c", "from cogview_ops import _C; print(*_C.supported_cpu())")
    assert there.stdout.split() == [isa], there
    done = emulated_isa.run(isa, "-m", "pytest", *FILES, "-k", chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(map(int, re.findall(r"(\d+) passed", done.stdout))) >= 300, done.stdout


@long
@pytest.mark.skipif("amx" in SUPPORTED, reason="AMX is here")
def test_every_fault_is_found(tmp_path: Path) -> None:
    csrc = emulated_isa.KEPT / "amx" / "broken"
    emulated_faults.copy(emulated_isa.ROOT / "csrc", csrc)
    found = tmp_path / "found"
    done = emulated_isa.run("amx", "-m", "tests.emulated_faults", str(found), csrc=csrc)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(found.read_text()) == {"unfounded": [], "missed": []}


@pytest.mark.skipif("amx" in SUPPORTED, reason="AMX is here")
def test_without_it_tiles_are_refused() -> None:
    done = python("-c", "from cogview_ops import _C; _C.active_cpu()", COGVIEW_OPS_CPU="amx")
    assert "does not support 'amx'" in done.stderr
