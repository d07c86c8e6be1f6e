"""The benchmarks' cases compute what they claim, at small sizes, and their results are kept and printed."""

import dataclasses
import json
from functools import partial

import pytest
import torch

from benchmarks import cases, report
from benchmarks.cases import Case
from benchmarks.test_bench import contestants, measure

SMALL = {
    "three_region_attention": partial(cases.three_region, heads=2, seqlen=900, dim=16, pivots=100, text=20),
    "three_region_attention_decode": partial(
        cases.three_region_decode, heads=2, seqlen=900, dim=16, pivots=100, text=20
    ),
    "local_attention_2d": partial(cases.local_2d, heads=2, side=12, dim=16, kernel=5),
    "pb_relax_softmax": partial(cases.softmax, heads=2, seqlen=33, causal=True),
    "layer_norm": partial(cases.layer_norm, rows=7, dim=24),
    "sandwich_layer_norm": partial(cases.sandwich, rows=7, dim=24),
}


def test_every_operator_with_a_case_is_tried_small() -> None:
    assert {case.op for case in cases.CASES} == set(SMALL)


@pytest.mark.parametrize("op", SMALL)
def test_ours_and_every_baseline_agree_with_float64(op: str) -> None:
    backward = not op.endswith("_decode")
    problem = SMALL[op](torch.float32, backward)
    eager = {name: f for name, f in problem.baselines.items() if name != "torch.compile"}  # compiling takes seconds
    calls, failed = contestants(dataclasses.replace(problem, baselines=eager), backward)
    assert failed == {}
    assert set(calls) == {"ours", *eager, *problem.others}
    assert problem.bytes > 0


def test_three_region_counts_the_pairs_of_its_mask() -> None:
    problem = SMALL["three_region_attention"](torch.float32, False)
    dense = 900 * 901 // 2
    assert 0.5 * dense < problem.flops / (4 * 2 * 16) < dense


def small_row(benchmark, ours=None) -> dict:
    def build(dtype: torch.dtype, backward: bool) -> cases.Problem:
        problem = cases.softmax(dtype, backward, heads=1, seqlen=16)
        keep = {"eager formula": problem.baselines["eager formula"], "broken": lambda x: x[..., :1] / 0}
        return dataclasses.replace(problem, baselines=keep, ours=ours or problem.ours)

    return measure(Case("pb_relax_softmax", "1x16x16", "fp32", False, build), benchmark, seconds=0.0)


def test_a_row_is_timed_kept_and_printed(benchmark, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.machine.copy_bandwidth", lambda: 1e10)
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
    assert "| pb_relax_softmax | 1x16x16 | fp32 | forward | 500 ms |" in table
    assert "broken not timed (result 0 is off by" in table


def test_a_wrong_result_is_not_timed(benchmark) -> None:
    def wrong(x: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        return torch.softmax(x, -1) if impl == "reference" else x

    row = small_row(benchmark, wrong)
    assert "off by" in row["failed"]
    assert "median_s" not in row
    assert "not timed" in report.line(row)
    benchmark.pedantic(int)  # the fixture wants to be used


def test_no_results_says_what_to_do(tmp_path) -> None:
    assert "python -m benchmarks" in report.tables(tmp_path)
