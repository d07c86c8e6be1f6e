"""What only a GPU can show: tensors above 2**31 elements, and the check that `make gpu` runs."""

import importlib.util
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import device_of, each_impl, python

from benchmarks import __main__ as everywhere
from benchmarks import cases, gpu, targets
from cogview.generate import fill
from cogview.recipes.cogview import CogView, CogViewConfig
from cogview.sampling import Sampling
from cogview_ops import layer_norm, pb_relax_softmax, sandwich_layer_norm
from cogview_ops.bench import problems

ROOT = Path(__file__).parents[1]
TEXTS = torch.tensor([[[1, 2, 3, 4], [5, 6, -1, -1], [7, 8, 9, -1]], [[9, 8, -1, -1], [7, 6, 5, 4], [3, 2, 1, -1]]])
WIDE = 2**16  # columns; 2**15 + 8 rows of them pass 2**31 elements
ROWS = 2**15 + 8


def needs_memory(impl: str, tensors: int) -> None:
    if device_of(impl) == "cpu":
        pytest.skip("64-bit offsets take a CPU 8 GB and minutes")
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


@pytest.mark.parametrize("attention", ["dense", "three_region"])
def test_recorded_steps_draw_what_eager_ones_do(attention) -> None:
    """In float64, where no rounding makes another token the likeliest: the recording is replayed for two batches."""
    if not torch.cuda.is_available():
        pytest.skip("steps are recorded on a GPU alone")
    sizes = {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "image_grid": 8, "max_positions": 90}
    recipe = CogView(CogViewConfig(**sizes, image_vocab=64, text_vocab=50, attention=attention, num_pivots=40))
    torch.manual_seed(0)
    model = recipe.model().cuda().double().requires_grad_(False)
    prompts = [recipe.prompt(text, [torch.Generator().manual_seed(n) for n in range(3)]) for text in TEXTS]
    uniforms, how = torch.full((3, 64), 0.5), Sampling(top_k=1)
    eager = [fill(model, prompt, uniforms, how) for prompt in prompts]
    assert not torch.equal(*eager)
    model.compile_step()
    assert model.records_steps
    for wanted, prompt in zip(eager, prompts, strict=True):
        assert torch.equal(fill(model, prompt, uniforms, how), wanted)


FAULT = """
import torch

def test_one():
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize

def test_two():
    raise AssertionError("it ran in a process that lost its GPU")

def synchronize():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


def test_a_process_that_lost_its_gpu_ends(tmp_path) -> None:
    """And xdist starts another one: no later test of this one would mean anything."""
    (tmp_path / "test_fault.py").write_text(FAULT)
    plugin = ("-p", "conftest", "-o", "addopts=", "-v", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    run = python("-m", "pytest", *plugin, str(tmp_path), PYTHONPATH="tests")
    assert run.returncode == 70, run.stdout
    assert "test_fault.py::test_one" in run.stdout
    assert "the GPU is lost to this process (CUDA error: an illegal memory access" in run.stdout
    assert "test_two" not in run.stdout


# --- scripts/gpu_check.py --------------------------------------------------------------------------------------------


@pytest.fixture
def check() -> Any:
    """scripts/gpu_check.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_check_without_a_gpu_says_so(check, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "first"])
    assert check.main() == 2
    said = capsys.readouterr().out
    assert said.startswith("gpu_check: ")
    assert said.endswith("; nothing was checked\n")


def script(check: Any, code: str, limit: float = 60) -> Any:
    return check.Part("x", [sys.executable, "-c", code], limit)


def test_parts_end_as_they_do(check) -> None:
    soon = time.monotonic() + 600
    bad = check.run(script(check, "print('FAILED tests/x.py::y - z'); raise SystemExit(3)"), soon)
    assert (bad.passed, bad.outcome, bad.failures()) == (False, "exit status 3", ["tests/x.py::y"])
    good = check.run(script(check, "print(1)"), soon)
    assert (good.passed, good.outcome, good.output) == (True, "passed", "1\n")
    assert "nonexistent" in check.run(check.Part("x", ["/nonexistent"], 9), soon).outcome
    assert check.run(script(check, "print(1)"), time.monotonic() + 9).outcome == "no time left"


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def shell(request, check) -> Iterator[None]:
    """In the background many shells have Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    check.let_parts_hear_interrupts()
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("shell")
def test_parts_hear_that_they_take_too_long(check) -> None:
    sleep = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far')"
    part = check.run(script(check, sleep, 3), time.monotonic() + 60)
    assert (part.outcome, part.output) == ("interrupted after 3 s", "begun\nso far\n")


def test_parts_that_do_not_listen_are_killed(check, tmp_path) -> None:
    orphan = f"import time; time.sleep(5); open({str(tmp_path / 'orphan')!r}, 'w')"
    deaf = "import subprocess, sys, signal, time; signal.signal(2, lambda *_: None); print('begun', flush=True)\n"
    deaf += f"subprocess.Popen([sys.executable, '-c', {orphan!r}]); [time.sleep(1) for _ in range(60)]"
    part = check.run(script(check, deaf, 3), time.monotonic() + 60, grace=0.5)
    assert (part.outcome, part.output) == ("killed after 4 s", "begun\n")
    time.sleep(4)
    assert not (tmp_path / "orphan").exists()


def test_failing_tests_are_found_in_every_form_of_output(check) -> None:
    part = script(check, "")
    part.output = "tests/a.py::one PASSED\n[gw3] [ 12%] FAILED tests/a.py::two[x-1]\nERROR tests/b.py::three - no\n"
    part.output += "FAILED tests/a.py::two[x-1] - no\n" + "".join(f"FAILED tests/c.py::t{n} - no\n" for n in range(9))
    assert part.failures()[:2] == ["tests/a.py::two[x-1]", "tests/b.py::three"]
    assert len(part.failures()) == 8
    part.output = "a\n\nb\nc\nFAILED to start\n"
    assert part.failures() == ["b", "c", "FAILED to start"]


def test_long_output_keeps_both_ends(check) -> None:
    output = b"begin" + b"x" * check.LOG + b"end"
    short = check.shortened(output)
    assert len(short) < check.LOG + 100
    assert short.startswith(b"begin")
    assert short.endswith(b"end")
    assert b"[8 bytes left out]" in short
    assert check.shortened(b"short") == b"short"


def row(shape: str, direction: str, floor: float, time: float, **baselines: Any) -> dict[str, Any]:
    """`baselines`: how many times as fast as them, or why they failed."""
    op = {"33792x2560": "layer_norm", "160x4224x64": "three_region_attention"}.get(shape, "local_attention_2d")
    results = {
        name.replace("_", " "): {"failed": x} if isinstance(x, str) else {"ratio": x, "extra_bytes": 1050}
        for name, x in baselines.items()
    }
    case = {"op": op, "shape": shape, "dtype": "bf16", "direction": direction, "extra_bytes": 55, "output_bytes": 50}
    case["ceilings"] = {"copy": 4e12, "matmul": 7e14}
    return case | {"floors_s": {"memory": floor, "matmul": 9.0}, "median_s": time, "baselines": results}


MEASURED = [
    row("33792x2560", "forward", 1.9, 2.0),
    row("33792x2560", "forward+backward", 5.0, 6.0),  # the backward took 4.0, a copy of its bytes takes 3.1
    row("160x4224x64", "forward", 1.0, 2.0, causal_SDPA=2.5, flash_causal_SDPA=2.1, cuDNN_causal_SDPA=1.9),
    row("160x4224x64", "forward+backward", 1.0, 2.0, causal_SDPA=2.5, flash_causal_SDPA=2.1, cuDNN_causal_SDPA="no"),
    row("320x64x64x64", "forward", 1.0, 1.4, global_vanilla=55.0, FlexAttention="RuntimeError: no"),
    row("320x64x64x64", "forward+backward", 1.0, 1.4) | {"failed": "no time left"},
]


def test_every_target_is_stated() -> None:
    lines = targets.lines(MEASURED)
    assert len(lines) == len(targets.TARGETS)
    for line in (
        "met    layer_norm 33792x2560 forward: 0.95 of copy speed, wanted 0.90",
        "MISSED layer_norm 33792x2560 backward: 0.78 of copy speed, wanted 0.85",
        "?      sandwich_layer_norm 33792x2560 forward: not measured (no such row)",
        "MISSED three_region_attention 160x4224x64 forward: 1.90 times as fast as cuDNN causal SDPA, wanted 2.00",
        "met    three_region_attention 160x4224x64 forward+backward: 2.10 times as fast as flash causal SDPA, "
        "wanted 1.40",
        "met    local_attention_2d 320x64x64x64 forward: 0.71 of copy speed, wanted 0.67",
        "?      local_attention_2d 320x64x64x64 backward: not measured (no time left)",
        "?      local_attention_2d 320x64x64x64 forward: not measured (RuntimeError: no)",
        "met    local_attention_2d 320x64x64x64 forward: 55.00 times as fast as global vanilla, wanted 40.00",
        "met    local_attention_2d 320x64x64x64 forward: 0.005 of the extra memory of global vanilla, "
        "wanted at most 0.010",
    ):
        assert line in lines


def test_every_target_is_a_case(monkeypatch) -> None:
    """And its baselines are contestants there."""
    names = {(case.op, case.shape, case.backward) for case in cases.GPU_CASES if case.dtype == "bf16"}
    assert len(names) == sum(case.dtype == "bf16" for case in cases.GPU_CASES)
    directions = {"forward": [False], "forward+backward": [True], "backward": [False, True]}
    for target in targets.TARGETS:
        assert all((target.op, target.shape, back) in names for back in directions[target.direction]), target
    monkeypatch.setattr(problems, "on_gpu", lambda: True)
    small = [
        problems.three_region(torch.bfloat16, True, heads=1, seqlen=256, dim=8, pivots=20, text=5),
        problems.local_2d(torch.bfloat16, False, heads=1, grid=(4, 4), dim=8, kernel=(3, 3)),
    ]
    contestants = {name for problem in small for name in problem.baselines | problem.others}
    assert {name for target in targets.TARGETS for name in target.against} <= contestants


@pytest.mark.parametrize(("carried", "loads"), [(False, False), (True, True), (True, False)])
def test_all_stages_run_to_their_end(check, monkeypatch, capsys, tmp_path, carried: bool, loads: bool) -> None:
    """Whatever failed; the summary and the targets come last."""
    started: list[list[str]] = []

    def pretend(part: Any, stop: float) -> Any:
        started.append(part.command)
        part.outcome = "passed" if part.name != "load" or loads else "exit status 1"
        if part.name == "benchmarks":
            results = Path(part.command[part.command.index("--out") + 1])
            results.mkdir(parents=True, exist_ok=True)
            (results / "a-gpu.json").write_text(json.dumps(MEASURED))
        if part.name == "sweep":
            part.output = "a row\n# tables\n(9, 0): {\n"
        if part.name in ("smoke", "tests"):
            part.outcome = "exit status 1"
            part.output = "\n".join(f"FAILED tests/test_x.py::test_{n} - no" for n in range(100))
        return part

    monkeypatch.setattr(check, "missing", lambda: None)
    monkeypatch.setattr(check, "run", pretend)
    arguments = ["--out", str(tmp_path), "--commit", "abc", *["--carried"] * carried]
    monkeypatch.setattr(sys, "argv", ["gpu_check", "first", "tests", "sweep", "rows", *arguments])
    monkeypatch.setenv("COGVIEW_OPS_COMMIT", "")
    assert check.main() == 1
    printed = capsys.readouterr().out
    for stage in ("first", "tests", "sweep", "rows"):
        kept = json.loads((tmp_path / f"{stage}.json").read_text())
        names = [part["part"] for part in kept["parts"]]
        ready = ["load"] if carried and loads else ["build"]
        rest = {
            "first": ["info", "smoke", "benchmarks"],
            "tests": ["tests", "stability", "large", "float64"],
            "sweep": ["sweep"],
            "rows": ["benchmarks"],
        }
        assert names == ready + rest[stage]
        assert kept["summary"][-len(targets.TARGETS) :] == targets.lines(MEASURED)
        assert ("(9, 0): {" in kept["summary"]) == (stage == "sweep")
        assert max(map(len, kept["summary"])) <= 120
        assert len(kept["summary"]) < 40
        assert "\n".join(kept["summary"]) in printed
        assert ("         tests/test_x.py::test_0" in kept["summary"]) == (stage in ("first", "tests"))
        assert f"===== {rest[stage][-1]}: passed" in (tmp_path / f"{stage}.log").read_text()
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 9  # and two of the stability experiment, one of the sweep
    assert max(len(path.parts) for path in files) <= 2
    paths = {word for command in started for word in command if word.startswith("tests/")}
    assert paths == {"tests/test_gpu.py", "tests/operators"}
    assert all((ROOT / path).exists() for path in paths)


def test_a_stage_that_breaks_still_has_a_summary(check, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(check.Check, "extension", lambda self: self.together(script(check, "print('so far')")))
    monkeypatch.setattr(check.Check, "pytest", lambda *_: 1 / 0)
    lines = check.Check("first", tmp_path, rehearse=True, carried=False, begin=time.monotonic()).run()
    assert lines[1].startswith("ok     x: passed")
    at = next(i for i, line in enumerate(lines) if line.startswith("FAILED the script: broke"))
    assert lines[at + 3].endswith("ZeroDivisionError: division by zero")
    assert lines == json.loads((tmp_path / "first.json").read_text())["summary"]
    assert "so far" in (tmp_path / "first.log").read_text()


def test_benchmarks_of_a_gpu_are_rehearsed(tmp_path, monkeypatch, capsys) -> None:
    """Rows are kept as they come, with what did not work; what was measured is not lost to a lack of time."""

    def broken(dtype: torch.dtype, back: bool) -> Any:
        raise RuntimeError("it breaks")

    todo = [cases.Case("pb_relax_softmax", "16x4224x4224", "bf16", False, broken), *gpu.rehearsal()]
    monkeypatch.setattr(gpu, "rehearsal", lambda: todo)

    def rehearse(*arguments: str) -> list[dict[str, Any]]:
        argv = ["benchmarks.gpu", "--rehearse", "--targets", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        assert gpu.main() == 1
        assert len(capsys.readouterr().out.splitlines()) == 4
        (path,) = tmp_path.glob("*.json")
        return json.loads(path.read_text())

    rows = rehearse("--seconds", "0.01")
    assert [row["failed"] for row in rows if "failed" in row] == ["RuntimeError: it breaks"]
    attention = next(row for row in rows if row["op"] == "three_region_attention")
    assert set(attention["baselines"]) == (set(targets.DENSE) if torch.cuda.is_available() else {"causal SDPA"})
    assert [row.get("median_s") for row in rehearse("--budget", "0")] == [row.get("median_s") for row in rows]
    begun: list[list[str]] = []
    with monkeypatch.context() as patches:
        patches.setattr(torch.cuda, "empty_cache", lambda: torch.ones(2) @ torch.ones(3))  # a RuntimeError
        patches.setattr(gpu.os, "execv", lambda path, argv: begun.append(argv))
        rehearse("--seconds", "0.01")
    assert [argv[argv.index("--begin") + 1] for argv in begun] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("main", [gpu.main, everywhere.main], ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "layer"], "'sandwich_layer_norm'"),
        (["--dtype", "typo"], "'bf16'"),
        (
            ["--op", "layer_norm", "--dtype", "fp16"],
            "no case of layer_norm in fp16, but of cogview2_attention in bf16, ",
        ),
    ],
)
def test_what_names_no_case_is_told_which_there_are(main, arguments, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert said in capsys.readouterr().err


def test_a_rehearsal_has_fewer_cases(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--rehearse", "--op", "pb_relax_softmax", "--out", "unused"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no case of pb_relax_softmax in any dtype, but of layer_norm in bf16, " in capsys.readouterr().err
