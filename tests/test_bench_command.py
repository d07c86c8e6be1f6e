"""`python -m cogview_ops.bench`: small calls of it, and what it says of wrong ones."""

import json
import subprocess
import sys
import types
from functools import partial, wraps
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from cogview_ops._manifest import OPERATORS
from cogview_ops.bench import __main__ as command
from cogview_ops.bench import machine, operators, packages, peers, shapes, table
from cogview_ops.bench.clock import Turns
from cogview_ops.bench.correctness import contestants

TINY = ["--seconds", "0.001", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _ceilings(monkeypatch) -> None:
    """Measuring them takes a gigabyte and seconds."""
    monkeypatch.setattr(machine, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(machine, "exp_rate", lambda: 1e9)
    monkeypatch.setattr(machine, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # imports the compiler, which takes seconds


def run(*arguments: str) -> int:
    return command.main([*arguments, *TINY])


def error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    return capsys.readouterr().err.splitlines()[-1]


def test_without_an_operator_it_lists_them_with_lines_that_work(capsys) -> None:
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    examples = [line.split() for line in lines if line.startswith("    python -m cogview_ops.bench ")]
    assert [words[3] for words in examples] == list(operators.TIMED)
    for words in examples:
        for text in words[5:]:
            assert shapes.parsed(words[3], text)


def test_every_operator_with_kernels_is_there() -> None:
    timed = {operators.operator(name) for name in operators.TIMED}
    assert {name for name, x in OPERATORS.items() if x.made_of == "kernels"} <= timed <= set(OPERATORS)
    assert {case.op for case in cases.CASES} == timed


_COGVIEW2 = "heads=4,text=96,grid=60x60,dim=64,kernel=9x5"
_PACKED, _DALLE = "heads=8,dim=64,pivots=256,text=64", "wrap=false,heads=16,text=256,grid=32x32,dim=64"


@pytest.mark.parametrize(
    ("name", "text", "sizes", "label"),
    [
        ("three_region_attention", "4x1088x32", {"heads": 4, "seqlen": 1088, "dim": 32}, "4x1088x32"),
        ("three_region_attention", "seqlen=1024,text=9", {"seqlen": 1024, "text": 9}, "16x1024x64,text=9"),
        ("local_attention_2d", "4x8x9x16", {"heads": 4, "grid": (8, 9), "dim": 16}, "4x8x9x16"),
        ("local_attention_2d", "grid=8x9,kernel=3x5", {"grid": (8, 9), "kernel": (3, 5)}, "16x8x9x64,kernel=3x5"),
        ("pb_relax_softmax", "16x88x88-causal", {"heads": 16, "seqlen": 88, "causal": True}, "16x88x88,causal=true"),
        ("pb_relax_softmax", "alpha=2.5", {"alpha": 2.5}, "16x1088x1088,alpha=2.5"),
        ("cogview2_attention", "coarse=none", {"coarse": None}, f"{_COGVIEW2},coarse=none,cross=5x5"),
        ("three_region_attention_varlen", "lengths=7x20x3", {"lengths": (7, 20, 3)}, f"lengths=7x20x3,{_PACKED}"),
        ("dalle_attention", "kind=column", {"kind": "column"}, f"kind=column,{_DALLE}"),
        ("layer_norm", "", {}, "8704x2560"),
    ],
)
def test_shapes(name: str, text: str, sizes: dict, label: str) -> None:
    assert shapes.parsed(name, text) == sizes
    assert shapes.label(name, sizes) == label
    every = shapes.sizes(operators.TIMED[name])
    assert every | shapes.parsed(name, label) == every | sizes


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("layer_norm", "8x", "a size is a whole number from 1 on, got ''; expected 8704x2560 (rows x dim), or any of"),
        ("layer_norm", "8x16x4", "too many numbers; expected 8704x2560 (rows x dim)"),
        ("layer_norm", "cols=8", "there is no size 'cols'; expected"),
        ("layer_norm", "rows", "rows has no value"),
        ("layer_norm", "rows=-1", "rows is a whole number from 1 on, got '-1'"),
        ("local_attention_2d", "4x8x16", "too few numbers; expected 16x64x64x64 (heads x rows x columns x dim)"),
        ("local_attention_2d", "grid=8", "grid is 2 numbers with x between them, got '8'"),
        ("pb_relax_softmax", "2x4x5", "seqlen is both 4 and 5"),
        ("pb_relax_softmax", "causal=maybe", "causal is true or false, got 'maybe'"),
        (
            "three_region_attention_varlen",
            "8x64",
            "there is no size '8x64'; expected any of lengths=1024x",
        ),
    ],
)
def test_wrong_shapes_say_what_was_expected(name: str, text: str, said: str, capsys) -> None:
    assert f"--shape '{text}': {said}" in error(capsys, name, "--shape", text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layer"], "OP: expected peers or one of cogview2_attention, "),
        (["layer_norm", "--baselines", "sdpa"], "--baselines: expected all or some of eager formula, torch.compile, "),
        (["linear_decode", "--direction", "forward+backward"], "linear_decode has no derivative"),
        (["local_attention_2d", "--shape", "1x4x4x8,kernel=9x9"], "--shape 1x4x4x8,kernel=9x9: kernel_size: expected"),
        (["local_attention_2d-bias", "--shape", "1x99x99x8"], "expected at most 8448 tokens, of which a mask of all"),
        (
            ["dalle_attention", "--shape", "kind=diagonal"],
            "kind: expected 'row' or 'column' or 'convolutional', got 'diagonal'",
        ),
        (["layer_norm", "--plot", "x.txt"], "--plot: expected a name that ends in .png, .svg or .pdf, got 'x.txt'"),
        (["peers", "--direction", "forward"], "--direction: peers has its own sizes, in both directions, "),
        (["peers", "--shape", "4x8", "--baselines", "all"], "--shape, --baselines: peers has its own sizes, "),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys) -> None:
    assert said in error(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["layer_norm", "--device", "cuda"])
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("arguments", [["rms_norm", "--shape", "256x512"], ["peers"]], ids=lambda x: x[0])
def test_on_a_gpu(arguments: list[str], tmp_path, capsys) -> None:
    kept = tmp_path / "rows.json"
    assert command.main([*arguments, "--device", "cuda", "--seconds", "0.01", "--json", str(kept)]) == 0
    for row in json.loads(kept.read_text()):
        assert row["device"] == torch.cuda.get_device_name()
        assert set(row["floors_s"]) == {"memory", "matmul"}


def test_without_matplotlib_a_plot_is_an_error_before_anything_is_timed(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("cogview_ops.bench.figures", "cogview_ops.bench.plot_style"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setattr(command, "sweep", lambda options: 1 / 0)
    assert "--plot needs matplotlib, which cannot be imported" in error(capsys, "layer_norm", "--plot")


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_seconds_that_are_no_time(seconds: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["layer_norm", "--seconds", seconds])
    assert f"--seconds: expected a number above 0, got {float(seconds)}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize(
    ("place", "said"), [("no/x.png", "No such file or directory"), ("folder.png", "Is a directory")]
)
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_timed(
    option: str, place: str, said: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(command, "sweep", lambda options: 1 / 0)
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / place
    assert error(capsys, "layer_norm", option, str(path)).endswith(f"{option}: cannot write {path}: {said}")
    assert [x.name for x in tmp_path.iterdir()] == ["folder.png"]


def test_one_file_that_is_lost_at_the_end_costs_no_other(tmp_path, monkeypatch, capsys) -> None:
    kept, plot = tmp_path / "rows.json", tmp_path / "plot.svg"

    def full(rows: Any, path: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "keep", full)
    said = error(capsys, "rms_norm", "--shape", "4x16", "--json", str(kept), "--plot", str(plot))
    assert said.endswith(f"--json: cannot write {kept}: No space left on device")
    assert plot.stat().st_size > 0


def test_a_size_that_memory_does_not_hold_costs_no_other(capsys) -> None:
    assert run("layer_norm", "--shape", "99999999x9999999", "4x16", "--baselines", "F.layer_norm") == 1
    said = capsys.readouterr().out
    assert "layer_norm, 99999999x9999999, bf16, forward" in said
    assert "not timed: RuntimeError: " in said
    assert "F.layer_norm*" in said.partition("layer_norm, 4x16")[2]


def test_the_new_start_keeps_pythons_options(monkeypatch) -> None:
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "-W", "error", "-m", "cogview_ops.bench", "peers"])
    monkeypatch.setattr(machine.os, "execve", lambda *given: started.append(given))
    for name in machine.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    machine.keep_freed_pages()
    ((path, words, environment),) = started
    assert (path, words) == (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert environment.items() >= machine.ALLOCATOR.items()


def test_a_sweep_prints_keeps_and_plots_its_rows(tmp_path, capsys) -> None:
    kept, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    sizes = [f"1x{n}x8,pivots=40,text=9" for n in (128, 256)]
    assert run("three_region_attention", "--shape", *sizes, "--json", str(kept), "--plot", str(plot)) == 0
    said = capsys.readouterr().out
    rows = json.loads(kept.read_text())
    assert [row["shape"] for row in rows] == ["1x128x8,pivots=40,text=9", "1x256x8,pivots=40,text=9"]
    for row in rows:
        assert {name for name, x in row["baselines"].items() if "ratio" in x} >= {"vanilla", "masked SDPA"}
        assert row["floor_s"] == max(row["floors_s"].values()) > 0
        assert row["median_s"] > 0
        assert row["tokens"] in (128, 256)
    assert said.count("the floor is the ") == 2
    assert "causal SDPA*" in said
    assert "FlexAttention not timed: compiling takes long on a CPU; --baselines all" in said
    assert "tokens" in plot.read_text()


def test_with_backward_and_chosen_baselines(capsys) -> None:
    sizes = ["--shape", "4x64", "--dtype", "fp32", "--direction", "forward+backward"]
    assert run("sandwich_layer_norm-pre", *sizes, "--baselines", "Eager Formula") == 0
    said = capsys.readouterr().out
    assert "sandwich_layer_norm, 4x64, fp32, forward+backward" in said
    assert "eager formula " in said
    assert "torch.compile" not in said


def test_what_is_wrong_is_not_timed(monkeypatch, capsys) -> None:
    right = operators.TIMED["layer_norm"]

    @wraps(right.build)
    def wrong(*arguments: Any, **sizes: Any) -> Any:
        problem = right.build(*arguments, **sizes)
        object.__setattr__(problem, "ours", lambda x, *_, impl="auto": x if impl == "auto" else -x)
        return problem

    monkeypatch.setitem(operators.TIMED, "layer_norm", right._replace(build=wrong))
    assert run("layer_norm") == 1
    assert "not timed: result 0 is off by 2.0e+00 of its norm" in capsys.readouterr().out


def test_a_slow_baseline_sits_out_the_later_rounds() -> None:
    took = {"slow": 10.0, "quick": 0.1, "ours": 20.0}
    now = ""

    def call(name: str) -> None:
        nonlocal now
        now = name

    def seconds(called: Any) -> float:
        called()
        return took[now]

    turns = Turns({name: partial(call, name) for name in took}, seconds, share=5, short=0)
    for _ in range(3):
        turns.round()
    assert turns.times == {"slow": [10.0], "quick": [0.1] * 3, "ours": [20.0] * 3}


def test_a_slow_baseline_is_left_out_with_its_time() -> None:
    problem = peers.softmax(torch.float32, False, heads=1, seqlen=9)
    object.__setattr__(problem, "baselines", {"slow": lambda scores: scores.softmax(-1)})
    calls, failed = contestants(problem, False, patience=-1)
    assert (set(calls), failed) == ({"ours"}, {"slow": "left out, a call takes 0 s"})


def test_the_commit_of_somebody_elses_checkout_is_not_ours(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("COGVIEW_OPS_COMMIT", raising=False)
    site = tmp_path / "their" / "venv"
    (site / "cogview_ops" / "bench").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path / "their")], check=True)
    subprocess.run(
        ["git", *["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]],
        cwd=tmp_path / "their",
        check=True,
    )
    monkeypatch.setattr(machine, "__file__", str(site / "cogview_ops" / "bench" / "machine.py"))
    assert machine._commit() is None


SMALL_PEERS = {
    peers.neighborhood: {"heads": 2, "grid": (9, 8), "dim": 8, "kernel": (3, 3)},
    peers.layer_norm: {"rows": 5, "dim": 16},
    peers.rms_norm: {"rows": 5, "dim": 16},
    peers.add_rms_norm: {"rows": 5, "dim": 16},
    peers.softmax: {"heads": 2, "seqlen": 12},
    peers.causal_softmax: {"heads": 4, "seqlen": 16},
}


def fake(monkeypatch, name: str, **functions: Any) -> None:
    """A module of that name, and the packages that it is in."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__spec__ = ModuleSpec(path, None, origin="a test")
            monkeypatch.setitem(sys.modules, path, module)
    for key, function in functions.items():
        monkeypatch.setattr(sys.modules[name], key, function, raising=False)


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def fake_packages(monkeypatch) -> None:
    """quack and apex, as their documentation has the functions: quack's norm comes first, then the sum."""

    def rmsnorm(x, weight, residual=None, eps=1e-6, prenorm=False):
        if residual is None:
            return rms(x, weight, eps)
        assert prenorm
        return rms(x + residual, weight, eps), x + residual

    def layernorm_fwd(x, weight, bias, eps):
        assert weight.dtype == bias.dtype == torch.float32
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def causal(scores, scale):
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return (scores * scale).masked_fill(hidden, float("-inf")).softmax(-1)

    fake(monkeypatch, "quack.rmsnorm", rmsnorm=rmsnorm, layernorm_fwd=layernorm_fwd)
    fake(monkeypatch, "quack.softmax", softmax=lambda x: x.softmax(-1))
    fake(
        monkeypatch,
        "apex.normalization.fused_layer_norm",
        fused_layer_norm_affine=lambda x, weight, bias, shape, eps: F.layer_norm(x, shape, weight, bias, eps),
        fused_rms_norm_affine=lambda x, weight, shape, eps: rms(x, weight, eps),
    )
    fused = types.SimpleNamespace(apply=causal)
    fake(monkeypatch, "apex.transformer.functional.fused_softmax", ScaledUpperTriangMaskedSoftmax=fused)


@pytest.mark.parametrize("build", SMALL_PEERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_peers_have_equal_definitions(build: Any, back: bool, monkeypatch) -> None:
    """Ours against float64, and the calls of quack and apex against what their functions are documented to compute."""
    fake_packages(monkeypatch)
    problem = build(torch.float32 if build is not peers.causal_softmax else torch.float16, back, **SMALL_PEERS[build])
    there = {name for name in problem.baselines if name in ("quack", "apex")}
    calls, failed = contestants(problem.only(sorted(there)), back, slack=1.0)
    assert failed == ({"quack": "has no derivative"} if back and build is peers.layer_norm else {})
    assert set(calls) == {"ours", *there} - set(failed)


@pytest.mark.skipif(not packages.installed("natten"), reason="NATTEN is not installed")
def test_natten_has_our_definition() -> None:
    problem = peers.neighborhood(torch.float32, False, **SMALL_PEERS[peers.neighborhood]).only(["NATTEN"])
    calls, failed = contestants(problem, False, slack=1.0)
    assert (set(calls), failed) == ({"NATTEN", "ours"}, {})


def test_peers_here_are_timed_and_others_named(monkeypatch, capsys) -> None:
    fake_packages(monkeypatch)
    monkeypatch.setattr(
        peers, "PEERS", {"quack": peers.PEERS["quack"]._replace(gpu=False), "Liger": peers.PEERS["Liger"]}
    )
    small = partial(peers.softmax, heads=1, seqlen=9)
    wrong = partial(peers.rms_norm, rows=4, dim=8)
    monkeypatch.setattr(sys.modules["quack.rmsnorm"], "rmsnorm", lambda x, weight, eps: rms(x, weight + 1, eps))
    chosen = [("softmax", small), ("rms_norm", wrong)]

    def only(build: Any) -> Any:
        return lambda dtype, back: build(dtype, back).only(["quack", "Liger"])

    todo = tuple(peers.Comparison(name, "small", only(build)) for name, build in chosen)
    rows = peers.rows("fp32", "cpu", 0.001, todo)
    said = capsys.readouterr().out
    assert [row["op"] for row in rows] == ["softmax", "softmax", "rms_norm", "rms_norm"]
    assert all("ratio" in row["baselines"]["quack"] for row in rows[:2])
    assert all("off by" in row["baselines"]["quack"]["failed"] for row in rows[2:])
    assert "quack not timed: result 0 is off by" in said
    assert "torch-harmonics: not compared, it has no planar form" in said
    assert "Liger not timed: " in said


def test_reasons_why_a_peer_is_absent(monkeypatch) -> None:
    nowhere = peers.Peer("no_such_package", "no-such-package", False)
    assert peers.reason_absent(nowhere, True) == "not installed (there is no no_such_package)"
    fake(monkeypatch, "only_gpu")
    assert peers.reason_absent(peers.Peer("only_gpu", "x", True), False) == "runs on GPUs alone"
    assert peers.reason_absent(peers.Peer("only_gpu", "x", True), True) is None
    fake(monkeypatch, "half")
    said = peers.reason_absent(peers.Peer("half.part", "x", False), False)
    assert said is not None
    assert said.startswith("cannot be imported: ModuleNotFoundError")


def test_a_folder_is_no_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "only_a_folder").mkdir()
    (tmp_path / "a_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.installed("a_package")
    assert not packages.installed("only_a_folder")
    assert not packages.installed("no_such_package")
    said = peers.reason_absent(peers.Peer("only_a_folder.part", "x", False), True)
    assert said == "not installed (there is no only_a_folder.part)"


def test_a_comparison_that_memory_does_not_hold_costs_no_other(monkeypatch, capsys) -> None:
    fake_packages(monkeypatch)
    monkeypatch.setattr(peers, "PEERS", {"quack": peers.PEERS["quack"]._replace(gpu=False)})

    def build(rows: int) -> Any:
        return lambda dtype, back: peers.rms_norm(dtype, back, rows=rows, dim=99999).only(["quack"])

    todo = (peers.Comparison("rms_norm", "large", build(10**9)), peers.Comparison("rms_norm", "small", build(2)))
    rows = peers.rows("fp32", "cpu", 0.001, todo)
    assert [row["shape"] for row in rows if "failed" in row] == ["large"] * 2
    assert [row["shape"] for row in rows if "median_s" in row] == ["small"] * 2
    assert "rms_norm, large, fp32, forward\n" in capsys.readouterr().out


def test_nobody_to_compare_with_is_said(monkeypatch, capsys) -> None:
    monkeypatch.setattr(peers, "PEERS", {"apex": peers.Peer("no_such_package", "x", True)})
    todo = (peers.Comparison("pb_relax_softmax", "small", partial(peers.causal_softmax, heads=1, seqlen=8)),)
    assert peers.rows("bf16", "cpu", 0.001, todo) == []
    assert "nobody to compare with (apex not installed (there is no no_such_package))" in capsys.readouterr().out


def test_a_table_has_what_was_not_timed() -> None:
    row = {
        "op": "x",
        "shape": "1",
        "dtype": "bf16",
        "direction": "forward",
        "device": "d",
        "torch": "2",
        "cogview_ops": "1",
    }
    assert "not timed: why" in table.of(row | {"failed": "why"}, [])
