"""What only a GPU can show: tensors above 2**31 elements, and the check that `make gpu` runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import device_of, each_impl

from benchmarks import cases
from cogview_ops import layer_norm, pb_relax_softmax, sandwich_layer_norm

ROOT = Path(__file__).parents[1]
WIDE = 2**16  # columns; 2**15 + 8 rows of them pass 2**31 elements
ROWS = 2**15 + 8


def needs_memory(impl: str, tensors: int) -> None:
    if device_of(impl) == "cpu":
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


@pytest.fixture
def check(tmp_path, monkeypatch) -> Any:
    """scripts/gpu_check.py as a module that writes to a folder of its own."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "OUT", tmp_path / "gpu")
    (tmp_path / "gpu").mkdir()
    return module


def test_check_survives_parts_that_fail(check) -> None:
    part = check.run("bad", [sys.executable, "-c", "print('FAILED tests/x.py::y - z'); raise SystemExit(3)"], 20)
    assert (part["passed"], part["outcome"]) == (False, "exit status 3")
    assert check.failures(part) == ["    tests/x.py::y"]
    assert check.run("none", ["/nonexistent"], 20)["passed"] is False
    assert check.run("late", ["true"], 0)["outcome"] == "no time left"
    assert json.dumps(part)


def row(shape: str, direction: str, floor: float, time: float, **baselines: Any) -> dict[str, Any]:
    """`baselines`: how many times as fast as them, or why they failed."""
    op = {"33792x2560": "layer_norm", "160x4224x64": "three_region_attention"}.get(shape, "local_attention_2d")
    results = {
        name.replace("_", " "): {"failed": x} if isinstance(x, str) else {"ratio": x} for name, x in baselines.items()
    }
    case = {"op": op, "shape": shape, "dtype": "bf16", "direction": direction}
    return case | {"floors_s": {"memory": floor, "matmul": 9.0}, "median_s": time, "baselines": results}


ROWS = [
    row("33792x2560", "forward", 1.9, 2.0),
    row("33792x2560", "forward+backward", 5.0, 6.0),  # the backward took 4.0, a copy of its bytes takes 3.1
    row("160x4224x64", "forward", 1.0, 2.0, causal_SDPA=2.5, flash_causal_SDPA=2.1, cuDNN_causal_SDPA=1.9),
    row("160x4224x64", "forward+backward", 1.0, 2.0, causal_SDPA=2.5, flash_causal_SDPA=2.1, cuDNN_causal_SDPA="no"),
    row("320x64x64x64", "forward", 1.0, 1.4, global_vanilla=55.0, FlexAttention="RuntimeError: no"),
    row("320x64x64x64", "forward+backward", 1.0, 1.4) | {"failed": "no time left"},
]


def test_check_states_every_target(check) -> None:
    lines = check.targets(ROWS)
    assert len(lines) == len(check.TARGETS)
    for line in (
        "  met    layer_norm 33792x2560 forward: 0.95 of copy speed, wanted 0.90",
        "  MISSED layer_norm 33792x2560 backward: 0.78 of copy speed, wanted 0.85",
        "  ?      sandwich_layer_norm 33792x2560 forward: not measured (no such row)",
        "  MISSED three_region_attention 160x4224x64 forward: 1.90 times as fast as cuDNN causal SDPA, wanted 2.00",
        "  met    three_region_attention 160x4224x64 forward+backward: 2.10 times as fast as flash causal SDPA, "
        "wanted 1.80",
        "  met    local_attention_2d 320x64x64x64 forward: 0.71 of copy speed, wanted 0.67",
        "  ?      local_attention_2d 320x64x64x64 backward: not measured (no time left)",
        "  ?      local_attention_2d 320x64x64x64 forward: not measured (RuntimeError: no)",
        "  met    local_attention_2d 320x64x64x64 forward: 55.00 times as fast as global vanilla, wanted 40.00",
    ):
        assert line in lines


def test_every_target_is_a_case(check, monkeypatch) -> None:
    """And its baselines are contestants there."""
    names = {(case.op, case.shape, case.backward) for case in cases.GPU_CASES if case.dtype == "bf16"}
    assert len(names) == sum(case.dtype == "bf16" for case in cases.GPU_CASES)
    directions = {"forward": [False], "forward+backward": [True], "backward": [False, True]}
    for target in check.TARGETS:
        assert all((target.op, target.shape, back) in names for back in directions[target.direction]), target
    monkeypatch.setattr(cases, "on_gpu", lambda: True)
    small = [
        cases.three_region(torch.bfloat16, True, heads=1, seqlen=256, dim=8, pivots=20, text=5),
        cases.local_2d(torch.bfloat16, False, heads=1, grid=(4, 4), dim=8, kernel=(3, 3)),
    ]
    contestants = {name for problem in small for name in problem.baselines | problem.others}
    assert {name for target in check.TARGETS for name in target.against} <= contestants


def test_check_ends_with_one_screen(check, monkeypatch, capsys) -> None:
    """Whatever failed, and all targets."""

    def parts() -> list[dict[str, Any]]:
        found = {"ceilings": {"copy": 4e12, "matmul": 7e14}, "rows": ROWS}
        (check.OUT / "benchmarks.json").write_text(json.dumps(found))
        tail = "\n".join(f"FAILED tests/test_x.py::test_{n} - no" for n in range(100))
        bad = {"part": "tests", "passed": False, "outcome": "exit status 1", "seconds": 1.0, "tail": tail}
        return [bad, {"part": "benchmarks", "passed": True, "outcome": "passed", "seconds": 1.0, "tail": ""}]

    monkeypatch.setattr(check, "missing", lambda: None)
    monkeypatch.setattr(check, "parts", parts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert check.main() == 1
    summary = capsys.readouterr().out.split("Summary\n")[1].splitlines()
    assert len(summary) < 40
    assert max(map(len, summary)) <= 120
    assert summary[:2] == ["  FAILED tests: exit status 1", "    tests/test_x.py::test_0"]
    assert [line for line in summary if line.split()[0] in ("met", "MISSED", "?")] == check.targets(ROWS)
    kept = json.loads((check.OUT / "check.json").read_text())
    assert (kept["device"], len(kept["parts"]), kept["rows"]) == ("a GPU", 2, ROWS)
