"""What only a GPU can show: tensors above 2**31 elements, and the check that `make gpu` runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import each_impl, interpreted

from cogview_ops import layer_norm, pb_relax_softmax, sandwich_layer_norm

ROOT = Path(__file__).parents[1]
WIDE = 2**16  # columns; 2**15 + 8 rows of them pass 2**31 elements
ROWS = 2**15 + 8


def needs_memory(impl: str, tensors: int) -> None:
    if impl == "cpp" or interpreted(impl):
        pytest.skip("the CPU kernels' 64-bit offsets need 8 GB and minutes")
    free = torch.cuda.mem_get_info()[0]
    if free < (tensors + 1) * 2 * WIDE * ROWS:
        pytest.skip(f"needs {tensors * 2 * WIDE * ROWS / 1e9:.0f} GB of GPU memory")


@each_impl("pb_relax_softmax")
def test_softmax_above_31_bits(impl: str) -> None:
    needs_memory(impl, 4)
    scores = torch.randn(ROWS, WIDE, dtype=torch.float16, device="cuda").requires_grad_()
    out = pb_relax_softmax(scores, alpha=4.0, impl=impl)
    last = scores.detach()[-3:].clone().requires_grad_()
    expected = pb_relax_softmax(last, alpha=4.0, impl=impl)
    assert torch.equal(out[-3:], expected)
    out.backward(scores.detach())
    expected.backward(last.detach())
    assert scores.grad is not None
    assert last.grad is not None
    assert torch.equal(scores.grad[-3:], last.grad)


@each_impl("layer_norm")
def test_norm_above_31_bits(impl: str) -> None:
    needs_memory(impl, 4)
    x = torch.randn(ROWS, WIDE, dtype=torch.float16, device="cuda").requires_grad_()
    weight, bias = torch.ones(WIDE, dtype=x.dtype, device="cuda"), torch.zeros(WIDE, dtype=x.dtype, device="cuda")
    out = layer_norm(x, weight, bias, impl=impl)
    last = x.detach()[-3:].clone().requires_grad_()
    expected = layer_norm(last, weight, bias, impl=impl)
    assert torch.equal(out[-3:], expected)
    out.backward(x.detach())
    expected.backward(last.detach())
    assert x.grad is not None
    assert last.grad is not None
    assert torch.equal(x.grad[-3:], last.grad)


@each_impl("sandwich_layer_norm")
def test_dropout_above_31_bits(impl: str) -> None:
    """The last rows' mask is not the first rows'."""
    needs_memory(impl, 4)
    branch = torch.randn(ROWS, WIDE, dtype=torch.float16, device="cuda")
    one, zero = (
        torch.ones(WIDE, dtype=branch.dtype, device="cuda"),
        torch.zeros(WIDE, dtype=branch.dtype, device="cuda"),
    )
    branch[-8:] = branch[:8]
    h, _ = sandwich_layer_norm(branch, branch, one, zero, one, zero, dropout_p=0.5, seed=1, impl=impl)
    assert h[-8:].isfinite().all()
    assert not torch.equal(h[-8:], h[:8])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_check_without_a_gpu_says_so() -> None:
    run = subprocess.run([sys.executable, ROOT / "scripts" / "gpu_check.py"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout.startswith("make gpu: ")
    assert "nothing was checked" in run.stdout


def test_check_survives_parts_that_fail(tmp_path, monkeypatch, capsys) -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    monkeypatch.setattr(check, "OUT", tmp_path)
    part = check.run("bad", [sys.executable, "-c", "print('FAILED tests/x.py::y - z'); raise SystemExit(3)"], 20)
    assert (part["passed"], part["outcome"]) == (False, "exit status 3")
    assert check.failures(part) == ["    tests/x.py::y"]
    assert check.run("none", ["/nonexistent"], 20)["passed"] is False
    assert check.run("late", ["true"], 0)["outcome"] == "no time left"
    row = {"op": "layer_norm", "shape": "33792x2560", "dtype": "bf16", "direction": "forward"}
    lines = check.targets([row | {"floor_s": 0.95, "median_s": 1.0}])
    assert lines[0].split()[0] == "met"
    assert "95% of the floor, wanted 90%" in lines[0]
    assert all(line.split()[0] == "?" for line in lines[1:])
    assert json.dumps(part)
