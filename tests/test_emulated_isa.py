"""The kernels for AMX and for pairs of bfloat16 where there is neither: emulated, in processes of their own."""

import emulated_isa
import pytest
from common import python

from cogview_ops import _dispatch

SUPPORTED = _dispatch._C.supported_cpu() if _dispatch._C else []
OPERATORS = ("local_attention_2d", "three_region_attention")

pytestmark = pytest.mark.skipif(emulated_isa.missing() is not None, reason=str(emulated_isa.missing()))


@pytest.mark.skipif("amx" in SUPPORTED, reason="AMX is here, all tests run on it")
def test_attention_on_tiles() -> None:
    """What is tested on every instruction set, in the dtypes that the tile unit multiplies."""
    files = [f"tests/operators/test_{op}.py" for op in OPERATORS]
    done = emulated_isa.run("amx", "-m", "pytest", *files, "-k", "every_instruction_set and (bfloat16 or float16)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 30


@pytest.mark.skipif("amx" in SUPPORTED, reason="AMX is here")
def test_without_it_tiles_are_refused() -> None:
    done = python("-c", "from cogview_ops import _C; _C.active_cpu()", COGVIEW_OPS_CPU="amx")
    assert "does not support 'amx'" in done.stderr
