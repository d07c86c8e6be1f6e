"""The benchmarks' cases compute what they claim, at small sizes, and their results are kept and printed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from cases import three_region

from benchmarks import cases, report
from benchmarks.cases import Case
from benchmarks.test_bench import measure
from cogview_ops import patterns
from cogview_ops._manifest import KERNELS, OPERATORS
from cogview_ops.bench import baselines, dalle_problems, machine, problems, row_problems
from cogview_ops.bench.correctness import contestants

SMALL = {
    "three_region_attention": partial(problems.three_region, heads=2, seqlen=1024, dim=16, pivots=100, text=20),
    "three_region_attention_decode": partial(
        problems.three_region_decode, heads=4, kv_heads=2, lengths=(1000, 900), dim=16, pivots=100, text=20
    ),
    "three_region_attention_varlen": partial(
        problems.three_region_varlen, lengths=(900, 20, 300), heads=4, kv_heads=2, dim=16, pivots=100, text=20
    ),
    "three_region_attention_varlen-equal": partial(
        problems.three_region_varlen, lengths=(300, 300), heads=2, kv_heads=2, dim=16, pivots=100, text=20
    ),
    "local_attention_2d": partial(problems.local_2d, heads=2, grid=(12, 11), dim=16, kernel=(5, 3)),
    "local_attention_2d-causal": partial(problems.local_2d, heads=2, grid=(9, 7), dim=16, kernel=(5, 7), causal=True),
    "local_attention_2d-dilated": partial(
        problems.local_2d, heads=2, grid=(13, 10), dim=16, kernel=(5, 3), dilation=(2, 3)
    ),
    "local_attention_2d-coarse": partial(
        problems.cross_resolution, heads=2, grid=(8, 12), dim=16, kernel=(5, 3), coarse=(4, 6), cross=(3, 1)
    ),
    "local_attention_2d-shift": partial(problems.neighborhood, heads=2, grid=(9, 8), dim=16, kernel=(5, 3)),
    "local_attention_2d-bias": partial(problems.local_2d_bias, heads=2, grid=(9, 8), dim=16, kernel=(5, 3)),
    "local_attention_2d-alone-coarse": partial(
        problems.upsampling, heads=2, grid=(8, 12), dim=16, coarse=(4, 3), cross=(3, 1)
    ),
    "local_attention_2d_decode": partial(
        problems.local_2d_decode, heads=2, grid=(8, 12), dim=16, kernel=(5, 3), text=7, coarse=(4, 6), cross=(3, 5)
    ),
    "dalle_attention": partial(dalle_problems.dalle, kind="convolutional", heads=2, text=9, grid=(13, 12), dim=16),
    "dalle_attention-wrap": partial(dalle_problems.dalle, kind="row", wrap=True, heads=2, text=9, grid=(6, 5), dim=16),
    "dalle_attention-schedule": partial(dalle_problems.dalle_schedule, layers=4, heads=2, text=9, grid=(6, 5), dim=16),
    "cogview2_attention": partial(
        problems.cogview2, heads=2, text=5, grid=(8, 12), dim=16, kernel=(5, 3), coarse=(4, 6), cross=(3, 5)
    ),
    "cogview2_attention-iterative": partial(
        problems.cogview2, heads=2, text=5, grid=(7, 6), dim=16, kernel=(3, 5), coarse=None
    ),
    "linear_decode": partial(row_problems.linear, rows=3, out=20, dim=24),
    "linear_decode-int8": partial(row_problems.linear, rows=3, out=20, dim=24, int8=True),
    "pb_relax_softmax": partial(row_problems.softmax, heads=2, seqlen=33, causal=True),
    "layer_norm": partial(row_problems.layer_norm, rows=7, dim=24),
    "sandwich_layer_norm": partial(row_problems.sandwich, rows=7, dim=24),
    "sandwich_layer_norm-pre": partial(row_problems.add_layer_norm, rows=7, dim=24),
    "rms_norm": partial(row_problems.rms_norm, rows=7, dim=24),
    "sandwich_rms_norm": partial(row_problems.sandwich_rms, rows=7, dim=24),
    "sandwich_rms_norm-pre": partial(row_problems.sandwich_rms, norms="pre", rows=7, dim=24),
    "sandwich_rms_norm-post": partial(row_problems.sandwich_rms, norms="post", rows=7, dim=24),
}


def test_every_operator_has_a_case_and_is_tried_small() -> None:
    assert {case.op for case in cases.CASES} == {op.partition("-")[0] for op in SMALL}
    for timed, there in ((cases.CASES, KERNELS), (cases.GPU_CASES, [x for x in KERNELS if x.triton])):
        assert {operator.name for operator in there} <= {case.op for case in timed} <= set(OPERATORS)
    assert len({str(case) for case in cases.CASES}) == len(cases.CASES)


@pytest.mark.parametrize("op", SMALL)
def test_ours_and_every_baseline_agree_with_float64(op: str) -> None:
    backward = OPERATORS[op.partition("-")[0]].differentiable
    problem = SMALL[op](torch.float32, backward)
    left = ("torch.compile", "FlexAttention", "NATTEN")  # take seconds, or may not be installed
    eager = {name: f for name, f in problem.baselines.items() if name not in left}
    assert not any(isinstance(f, str) for f in eager.values())
    calls, failed = contestants(dataclasses.replace(problem, baselines=eager), backward)
    assert failed == {}
    assert set(calls) == {"ours", *eager, *problem.others}
    assert problem.bytes > 0


def test_facts_need_no_git(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine._commit() is None
    monkeypatch.setenv("COGVIEW_OPS_COMMIT", "abc")
    assert machine._commit() == "abc"


def test_three_region_counts_the_pairs_of_its_mask() -> None:
    problem = SMALL["three_region_attention"](torch.float32, False)
    torch.manual_seed(0)
    window, pivot = patterns.three_region_masks(
        torch.arange(1024)[None], 1024, problem.ours.keywords["pivots"], problems.BLOCK, problems.WINDOW
    )
    assert problem.flops == 4 * 2 * 16 * int((window | pivot).sum())
    assert problem.exps == 2 * int((window | pivot).sum())


@pytest.mark.parametrize("op", ["layer_norm", "sandwich_layer_norm"])
def test_bfloat16_norms_have_an_eager_formula_with_right_gradients(op: str) -> None:
    problem = SMALL[op](torch.bfloat16, True, rows=2000)
    same = {name: f for name, f in problem.baselines.items() if name != "torch.compile"}
    calls, failed = contestants(dataclasses.replace(problem, baselines=same), True)
    assert (set(calls), failed) == ({"ours", "eager formula in float32", "eager formula", "F.layer_norm"}, {})
    assert "eager formula" in problem.others
    assert "eager formula" in SMALL[op](torch.bfloat16, False).baselines


@pytest.mark.parametrize("backward", [False, True])
def test_causal_softmax_reads_the_visible_half(backward: bool) -> None:
    problem = SMALL["pb_relax_softmax"](torch.float32, backward)
    visible = 2 * 33 * 34 // 2
    assert problem.exps == visible
    # out and, backward, the gradient are written whole; scores and, backward, out and its gradient read in part
    assert problem.bytes == 4 * ((2 * 2 * 33**2 + 3 * visible) if backward else (2 * 33**2 + visible))


@pytest.mark.parametrize(("kernel", "dilation"), [((5, 9), (1, 1)), ((3, 3), (3, 2))])
@pytest.mark.parametrize("causal", [False, True])
def test_local_counts_its_pairs_and_large_images_have_a_truth(kernel, dilation, causal: bool) -> None:
    """By shifts, it is the truth where the reference would take too much memory."""
    shape = {"heads": 2, "grid": (7, 6), "dim": 8, "kernel": kernel, "dilation": dilation, "causal": causal}
    problem = problems.local_2d(torch.float32, True, alone=True, **shape)
    i = torch.arange(42)
    how = {"grid": (7, 6), "kernel_size": kernel, "dilation": dilation, "raster_causal": causal}
    mask = patterns.local_2d(i[:, None], i, **how)
    assert problem.exps == 2 * 2 * int(mask.sum())
    assert problem.truth is not None
    inputs = [x.double() for x in problem.inputs]
    torch.testing.assert_close(problem.truth(*inputs), problem.ours(*inputs, impl="reference"), atol=1e-12, rtol=0)
    calls, failed = contestants(problem, True)
    assert (set(calls), failed) == ({"ours"}, {})


def test_the_published_formula_is_the_operator() -> None:
    """It is the truth where the reference would take too much memory: biases, padding and other blocks as well."""
    case = three_region("published", 130, 16, 13, 3, "text", pivot_bias=0.7)
    inputs = case.inputs(torch.float64)
    formula = baselines.published_three_region(case.options["pivots"], 13, 3, 0.7)
    outputs = [case(inputs, "reference")[0], formula(*inputs.values())]
    torch.testing.assert_close(*outputs, atol=1e-13, rtol=0)
    with pytest.raises(ValueError, match="130 tokens are no multiple of the block of 16"):
        baselines.published_three_region(case.options["pivots"], 16, 3)(*inputs.values())


def test_what_is_too_large_is_left_out_visibly() -> None:
    problem = problems.three_region(torch.bfloat16, False, heads=1, seqlen=problems.DENSE + 128, dim=8)
    calls, failed = contestants(problem, False)
    assert set(calls) == {"ours", "published formula", "causal SDPA"}
    assert set(failed) == {"vanilla", "masked SDPA", "FlexAttention"}
    assert all("left out above 8448 tokens" in reason for reason in failed.values())
    problem = problems.local_2d(torch.float32, True, heads=16, grid=(128, 128), dim=64, kernel=(13, 13))
    assert "copies of the keys alone would take 11.3 GB" in str(problem.baselines["F.unfold"])
    assert problem.baselines["masked SDPA"] == problem.others["global vanilla"] == problems.LEFT_OUT


@pytest.fixture
def benchmark(benchmark):
    """Other tests time nothing (pyproject.toml), and xdist's workers would complain of it."""
    benchmark.disabled = False
    return benchmark


def small_row(benchmark, ours=None) -> dict:
    def build(dtype: torch.dtype, backward: bool) -> problems.Problem:
        problem = row_problems.softmax(dtype, backward, heads=1, seqlen=16)
        keep = {"eager formula": problem.baselines["eager formula"], "broken": lambda x: x[..., :1] / 0}
        return dataclasses.replace(problem, baselines=keep, ours=ours or problem.ours)

    return measure(Case("pb_relax_softmax", "1x16x16", "fp32", False, build), benchmark, seconds=0.0)


def test_a_row_is_timed_kept_and_printed(benchmark, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cogview_ops.bench.machine.copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr("cogview_ops.bench.machine.exp_rate", lambda: 1e10)
    row = small_row(benchmark)
    assert row["rounds"] == 3
    assert row["floor_s"] == 2 * 16 * 16 * 4 / 1e10
    assert row["bound"] == "memory"
    assert row["baselines"]["eager formula"]["ratio"] > 0
    assert "off by" in row["baselines"]["broken"]["failed"]
    folder = tmp_path / "results"
    path = report.save(row, folder)
    report.save(row | {"median_s": 0.5}, folder)
    assert [r["median_s"] for r in json.loads(path.read_text())] == [0.5]  # replaced, not appended
    assert [p.name for p in folder.iterdir()] == [path.name]
    table = report.tables(folder)
    assert "| pb_relax_softmax | 1x16x16 | fp32 | forward | 500 ms |  |" in table
    assert "broken not timed (result 0 is off by" in table


def test_a_wrong_result_is_not_timed(benchmark) -> None:
    def wrong(x: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        return torch.softmax(x, -1) if impl == "reference" else x

    row = small_row(benchmark, wrong)
    assert "off by" in row["failed"]
    assert "median_s" not in row
    assert "not timed" in report.line(row)
    benchmark.pedantic(int)  # the fixture wants to be used


def sass(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.sass", *arguments]
    return subprocess.run(command, cwd=cases.__file__.rsplit("/", 2)[0], capture_output=True, text=True)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton, and with it a disassembler, is not here"
)
def test_machine_code_is_read_without_a_gpu(tmp_path) -> None:
    run = sass("layer_norm", "--size", "64", "--dtype", "fp16", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.iterdir()
    rows = {row["kernel"]: row for row in json.loads(path.read_text())}
    assert set(rows) == {"layer_norm.forward", "layer_norm.backward"}
    for name, row in rows.items():
        assert f"{name} " in run.stdout
        assert 16 <= row["registers"] <= 255
        assert (row["local"], row["waits"]) == (0, [])
        assert row["blocks"] * row["warps"] <= 64
        assert row["counts"]["LDG"] > 0
        assert 0 < row["floor"] <= row["least"] < row["most"]


def test_unknown_machine_code_is_an_error() -> None:
    run = sass("three_region.forwards")
    assert run.returncode == 2
    assert "no kernel 'three_region.forwards': three_region.forward, " in run.stderr


def test_no_results_says_what_to_do(tmp_path) -> None:
    assert "python -m benchmarks" in report.tables(tmp_path)
