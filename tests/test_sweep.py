"""What is tried on a GPU and what becomes of it: choices of strips, the sweep over them, rows with two kernels."""

import ctypes
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import kept_build
import pytest
import torch
from torch import Tensor

from benchmarks import cases, gpu, implementations, report, strips, sweep
from benchmarks.cases import Case
from benchmarks.strips import Choice
from cogview_ops.bench import problems

TESTS = Path(__file__).parent

# --- the text of a choice --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans() -> ctypes.CDLL:
    """csrc/cuda/local_choices.h and local_plan.h."""
    flags = ["-std=c++17", "-fPIC", "-O1", "-Wall", "-Werror"]
    here = kept_build.Object(TESTS / "cuda_choices.cpp", flags)
    return ctypes.CDLL(str(kept_build.build(TESTS.parent / "build" / "choices", "choices", [here])))


def read(plans: ctypes.CDLL, text: str | None) -> list[Choice] | None:
    numbers = (ctypes.c_int * 9)()
    plans.choices.restype = ctypes.c_bool
    if not plans.choices(None if text is None else text.encode(), numbers):
        return None
    return [Choice(*numbers[i : i + 3]) for i in (0, 3, 6)]


def planned(plans: ctypes.CDLL, *how: Any, choice: Sequence[int] = (0, 0, 0), capability: int = 90) -> Any:
    """`how`: pass, head_dim, window, raster-causal."""
    numbers = (ctypes.c_int * 3)()
    plans.plan.restype = ctypes.c_bool
    which, *rest = how
    if not plans.plan(capability, strips.PASSES.index(which), *rest, (ctypes.c_int * 3)(*choice), numbers):
        return None
    return Choice(*numbers)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        (None, [(), (), ()]),
        ("", [(), (), ()]),
        ("forward=3,8,1;grad_query=3;grad_key=2,7", [(3, 8, 1), (3,), (2, 7)]),
        ("grad_key=2,7;forward=0,8", [(0, 8), (), (2, 7)]),
        ("forward=99", [(99,), (), ()]),
    ],
)
def test_choices_are_read(plans, text, choices) -> None:
    assert read(plans, text) == [Choice(*x) for x in choices]


NONSENSE = """forward|forward=|forward=3,|forward=,3|forward=3,8,1,2|forward=-1|forward=100|forward=3.5|forward=3;|
;forward=3|forward=3;forward=3|forward=3,grad_key=2|forward =3| forward=3|forward=3 |grad_query=3,8,1|grad_key=2,7,1|
grad=3|forward=3;;grad_key=2|forward=0x3|forward=4294967299"""


@pytest.mark.parametrize("text", NONSENSE.replace("\n", "").split("|"))
def test_nonsense_is_refused(plans, text: str) -> None:
    assert read(plans, text) is None


def test_choices_are_spelled_as_they_are_read(plans) -> None:
    for some in ({}, {"forward": Choice(3, 8, 1)}, {"grad_query": Choice(3), "grad_key": Choice(2, 7)}):
        expected = [some.get(name, Choice()) for name in strips.PASSES]
        assert read(plans, strips.spelled(some)) == expected
    assert strips.parse(str(Choice(3, 8, 1))) == Choice(3, 8, 1)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"backward": Choice()}, "pass: expected forward or grad_query or grad_key, got 'backward'"),
        ({"grad_key": Choice(2, 7, 1)}, "grad_key: expected no rows of units, got 2,7,1"),
        ({"forward": Choice(100)}, "forward: expected numbers from 0 to 99, got 100,0,0"),
        ({"forward": Choice(-1)}, "forward: expected numbers from 0 to 99, got -1,0,0"),
    ],
)
def test_what_cannot_be_spelled_is_refused(choices, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        strips.spelled(choices)


@pytest.mark.parametrize("text", ["", "3,8", "3,8,1,1", "3,8,x", "3, 8, 1", "-3,8,1", "３,8,1", "300,8,1"])
def test_only_three_numbers_are_a_choice(text: str) -> None:
    with pytest.raises(ValueError, match="choice: expected three numbers"):
        strips.parse(text)


def test_trying_ends(monkeypatch) -> None:
    monkeypatch.setenv(strips.VARIABLE, "forward=1")
    with strips.trying({"grad_key": Choice(2)}), strips.trying({}):
        assert os.environ[strips.VARIABLE] == ""
    assert os.environ[strips.VARIABLE] == "forward=1"


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_is_what_was_chosen_or_none(plans) -> None:
    taken = 0
    for name, dim, kernel, causal in product(strips.PASSES, (64, 128), (5, 9, 13), (False, True)):
        usual = planned(plans, name, dim, kernel, causal)
        assert planned(plans, name, dim, kernel, causal, choice=usual) == usual
        for choice in strips.candidates(name):
            got = planned(plans, name, dim, kernel, causal, choice=choice)
            taken += got is not None
            assert got is None or all(x in (0, y) for x, y in zip(choice, got, strict=True))
    assert taken > 300
    assert planned(plans, "forward", 64, 9, False, choice=(3, 7, 3)) == (3, 7, 3)
    assert planned(plans, "forward", 64, 9, True, choice=(2, 0, 2)).unit_rows == 2
    for choice in ((4, 0, 0), (3, 9, 0), (3, 4, 0), (3, 8, 2), (0, 17, 0)):
        assert planned(plans, "forward", 64, 9, False, choice=choice) is None, choice
    assert planned(plans, "grad_query", 64, 9, False, choice=(3, 0, 3)) is None


def test_rows_of_units_are_one_at_a_time_by_default(plans) -> None:
    for name, capability, causal in product(strips.PASSES, (80, 90), (False, True)):
        assert planned(plans, name, 64, 9, causal, capability=capability).unit_rows == 1


def test_the_table_is_read_as_the_plan_reads_it(plans) -> None:
    """And what it has is taken where it fits."""
    row = strips.tuned((9, 0), 64)
    assert row["grad_key"].groups == 2
    assert strips.as_row((9, 0), 64, row) in strips.PLAN.read_text()
    assert strips.tuned((1, 0), 64) == dict.fromkeys(strips.PASSES, Choice())
    for name, choice in row.items():
        got = planned(plans, name, 64, 9, False)
        assert all(x in (0, y) for x, y in zip(choice[:2], got, strict=False))


# --- the sweep --------------------------------------------------------------------------------------------------------


class FakeClock(gpu.Clock):
    """Calls last as long as the choice says that they were captured with."""

    def __init__(self, times: Callable[[str, str], float]) -> None:
        super().__init__(False)
        self.times = times
        self.timed = 0

    @cached_property
    def ceilings(self) -> dict[str, float]:
        return {"copy": 3e12, "matmul": 7e14}

    def captured(self, call: Any, extra_bytes: int | None) -> tuple[Any, None]:
        _, backward, ours = call.args
        text, passes = os.environ.get(strips.VARIABLE, ""), 3 if backward else 1
        return lambda: passes * self.times(text, ours.keywords["impl"]), None

    def in_turn(self, calls: dict[str, Any], seconds: float) -> dict[str, list[float]]:
        self.timed += 1
        return {name: [call()] * 5 for name, call in calls.items()}


def seconds(text: str, impl: str) -> float:
    usual = 600e-6 if impl == "triton" else 300e-6
    faster = {"forward=3,8,1": 0.9, "forward=3,8,3": 0.5, "grad_query=2,5": 0.995, "grad_key=1,3": 0.8}
    return usual * faster.get(text, 1.0 if not text or ",0" in text else 1.1)


def attention(query: Tensor, key: Tensor, value: Tensor, impl: str = "auto") -> Tensor:
    """Stands for an operator: refuses what the real one would refuse, and is wrong where a choice makes it so."""
    text = os.environ.get(strips.VARIABLE, "") if impl == "cuda" else ""
    if "=4" in text or (text.count(",") and int(text.split(",")[1]) > 8):
        raise RuntimeError(f"COGVIEW_OPS_STRIPS: {text} does not fit this call on this device")
    out = query * key + value
    return out * 2 if text == "forward=3,8,3" else out


def problem(dtype: torch.dtype, back: bool, dim: int = 64) -> problems.Problem:
    inputs = tuple(torch.randn(1, 2, 3, dim, dtype=dtype) for _ in range(3))
    return problems.Problem(inputs, attention, {}, {}, bytes=670_000_000, sample=lambda x: x[:, :1])


@pytest.fixture
def todo(monkeypatch) -> list[sweep.Job]:
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # takes seconds, and nothing here is compiled
    monkeypatch.setattr(sweep, "SHAPES", {"local_attention_2d": {sweep.MAIN: problem}})
    return sweep.jobs(["local_attention_2d"], [64])


FACTS = {"device": "a GPU", "torch": "2", "commit": "abc", "rehearsal": False}


def swept(folder: Path, clock: FakeClock, stop: float = 60.0, failed: bool = False, **facts: Any) -> sweep.Sweep:
    kept = sweep.Kept(folder / "a-gpu.json", FACTS | facts, failed)
    impls = {"cuda": "cuda", "triton": "triton"}
    return sweep.Sweep(clock, kept, 0.1, monotonic() + stop, impls, partial(pytest.fail, "restarted"))


def test_both_kernels_first_then_candidates() -> None:
    found = sweep.jobs(list(sweep.SHAPES), [64, 128])
    assert [job.tuned for job in found[:8]] == [""] * 8
    assert {job.case.op for job in found[:8]} == set(sweep.SHAPES)
    assert [job.tuned for job in found[8:14]] == [*strips.PASSES] * 2
    assert len({job.key for job in found}) == len(found)
    shapes = {(job.case.op, job.case.shape) for job in found if job.head_dim == 64}
    assert {("local_attention_2d", "320x64x64x64"), ("three_region_attention", "160x4224x64")} <= shapes
    assert shapes & {(case.op, case.shape) for case in cases.GPU_CASES}


def test_rows_to_paste(todo, tmp_path, capsys) -> None:
    """The fastest right choice that is worth it; refused ones are no failures, wrong ones are."""
    one = swept(tmp_path, FakeClock(seconds))
    assert sweep.go(one, todo, (9, 0)) == 1  # a wrong choice
    said = capsys.readouterr().out
    assert "\n(9, 0): {\n" in said
    assert '\n    ("local_attention_2d", 64): (2.00, 2.00),\n},\n' in said
    row = strips.tuned((9, 0), 64) | {"forward": Choice(3, 8, 1), "grad_key": Choice(1, 3)}
    assert f"\n{strips.as_row((9, 0), 64, row)}\n" in said
    assert said.count("# failed: ") == 1
    assert "# failed: local_attention_2d 320x64x64x64 forward forward 3,8,3: it is off by" in said
    assert "floor 223.3 us" in said
    kept = json.loads((tmp_path / "a-gpu.json").read_text())
    assert kept["commit"] == "abc"
    assert not any(row["of"].startswith("4") for row in kept["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["a-gpu.json"]


def test_it_goes_on_where_it_was_stopped(todo, tmp_path, capsys) -> None:
    first = FakeClock(seconds)
    assert sweep.go(swept(tmp_path, first, stop=-1), todo, (9, 0)) == 1
    assert first.timed == 0
    assert "5 parts are left, run it again: local_attention_2d 320x64x64x64 forward, " in capsys.readouterr().out

    def interrupted(text: str, impl: str) -> float:
        if clock.timed == 6:  # both kernels in both directions, three sets of candidates
            raise KeyboardInterrupt
        return seconds(text, impl)

    clock = FakeClock(interrupted)
    assert sweep.go(swept(tmp_path, clock), todo, (9, 0)) == 130
    said = capsys.readouterr().out
    assert '("local_attention_2d", 64): (2.00, 2.00),' in said
    assert "parts are left, run it again: local_attention_2d 320x64x64x64 forward, " in said
    assert strips.as_row((9, 0), 64, {**strips.tuned((9, 0), 64), "forward": Choice(3, 8, 1)}) in said
    whole = FakeClock(seconds)
    sweep.go(swept(tmp_path / "new", whole), todo, (9, 0))
    rest = FakeClock(seconds)
    sweep.go(swept(tmp_path, rest, failed=True), todo, (9, 0))
    assert rest.timed == whole.timed - 5
    again = FakeClock(seconds)
    sweep.go(swept(tmp_path, again, failed=True), todo, (9, 0))
    assert again.timed == 0
    other = swept(tmp_path, again, commit="other sources")
    assert other.kept.rows == {}


def test_what_failed_is_tried_again_unless_it_was_this_run(todo, tmp_path) -> None:
    one = swept(tmp_path, FakeClock(seconds))
    one.failed(todo[0], "cuda", "no")
    assert swept(tmp_path, one.clock).kept.get(todo[0], "cuda") == {}
    assert swept(tmp_path, one.clock, failed=True).kept.get(todo[0], "cuda")["failed"] == "no"


def test_a_missing_kernel_is_named(todo, tmp_path, capsys, monkeypatch) -> None:
    def missing(query: Tensor, key: Tensor, value: Tensor, impl: str = "auto") -> Tensor:
        if impl == "cuda":
            raise RuntimeError("x cannot run on a cuda tensor: there is no CUDA kernel of this operator")
        return attention(query, key, value)

    def build(dtype: torch.dtype, back: bool, dim: int = 64) -> problems.Problem:
        return replace(problem(dtype, back, dim), ours=missing)

    monkeypatch.setattr(sweep, "SHAPES", {"local_attention_2d": {sweep.MAIN: build}})
    todo = sweep.jobs(["local_attention_2d"], [64])
    assert sweep.go(swept(tmp_path, FakeClock(seconds)), todo, (9, 0)) == 1
    said = capsys.readouterr().out
    assert "forward: CUDA C++ cannot run: RuntimeError: x cannot run on a cuda tensor" in said
    assert "# no row of local_attention_2d, 64" in said
    assert "left out: RuntimeError" in said


def test_what_is_left_to_triton_is_no_failure(todo, tmp_path, capsys, monkeypatch) -> None:
    def limited(query: Tensor, key: Tensor, value: Tensor, impl: str = "auto") -> Tensor:
        if impl == "cuda":
            raise RuntimeError("x cannot run on a cuda tensor: cuda: kernel_size: expected at most 9 rows")
        return attention(query, key, value)

    def build(dtype: torch.dtype, back: bool, dim: int = 64) -> problems.Problem:
        return replace(problem(dtype, back, dim), ours=limited)

    shapes = {sweep.MAIN: problem, "large-{}": build}
    monkeypatch.setattr(sweep, "SHAPES", {"local_attention_2d": shapes})
    todo = sweep.jobs(["local_attention_2d"], [64])
    usual = FakeClock(lambda text, impl: 600e-6 if impl == "triton" else 300e-6)
    monkeypatch.setattr(strips, "candidates", lambda name: [Choice(2, 3)])
    assert sweep.go(swept(tmp_path, usual), todo, (9, 0)) == 0
    said = capsys.readouterr().out
    assert "large-64 forward: CUDA C++ cannot run: RuntimeError: x cannot run on a cuda tensor" in said
    assert '\n    ("local_attention_2d", 64): (2.00, 2.00),\n},\n' in said


def test_a_backward_is_what_is_not_the_forward(todo, tmp_path) -> None:
    """Whichever was measured first; one that took less than its forward says nothing."""
    kept = swept(tmp_path, FakeClock(seconds)).kept
    forward, backward = todo[0], todo[1]
    for name, times in (("cuda", (3.0, 5.0)), ("triton", (4.0, 10.0))):
        kept.put(backward, name, {"median_s": times[1], "floor_s": 1.0})
        assert sweep.backward_alone(kept, backward, name) == 0
        kept.put(forward, name, {"median_s": times[0], "floor_s": 1.0})
    assert [sweep.backward_alone(kept, backward, name) for name in ("cuda", "triton")] == [2, 6]
    kept.put(forward, "triton", {"median_s": 11.0})
    assert "not measured" in "".join(sweep.ratios(kept, [forward, backward]))


@pytest.mark.parametrize(("time", "loud"), [(340e-6, False), (360e-6, True)])
def test_far_too_slow_is_loud(todo, tmp_path, capsys, time: float, loud: bool) -> None:
    clock = FakeClock(lambda text, impl: time)
    clock.gpu = True  # of which something is expected
    one = swept(tmp_path, clock)
    one.kept.put(todo[0], "cuda", one.timed(todo[0], problem(torch.bfloat16, False), [time] * 5))
    said = one.alarm(todo[0])
    assert (said is not None) == loud
    if said:
        assert "STOP AND FIND OUT WHY" in said
        assert "took 360.0 us, floor 223.3 us, expected 245.0 us to 300.0 us, above 350.0 us" in said
    one.copy = 2e12  # another device
    one.kept.put(todo[0], "cuda", one.timed(todo[0], problem(torch.bfloat16, False), [time] * 5))
    assert one.alarm(todo[0]) is None


def test_a_call_that_never_ends_is_left_behind(todo, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sweep.PATIENCE, "cuda", 0.05)
    one = swept(tmp_path, FakeClock(seconds))
    begun: list[bool] = []
    one.restart = lambda: begun.append(True)
    wait = monotonic() + 5

    def hang() -> None:
        while not begun and monotonic() < wait:
            pass

    one.attempt(todo[2], "3,8,1", hang)
    assert begun
    assert one.kept.get(todo[2], "3,8,1")["failed"] == "it did not end"


# --- rows with two kernels --------------------------------------------------------------------------------------------


def test_the_implementation_is_what_was_chosen() -> None:
    small = problems.local_2d(torch.float32, False, heads=1, grid=(4, 4), dim=8, kernel=(3, 3), alone=True)
    assert implementations.of(small) == ("cpp", None)
    small = replace(small, ours=partial(small.ours, impl="reference"))
    assert implementations.of(small) == ("reference", None)


def test_a_row_has_the_other_kernel_apart(monkeypatch) -> None:
    """It is no baseline, and as good a result is asked of it as of ours."""
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(implementations, "of", lambda problem: ("triton", "cuda"))
    case = Case("local_attention_2d", "1x2", "bf16", False, problem)
    row: dict[str, Any] = {"op": "x", "shape": "1", "dtype": "bf16", "direction": "forward"}
    clock = gpu.Clock(False)
    gpu.measure(row, case, {"copy": 1e12, "matmul": 1e12}, clock, 0.0, None, "")
    assert row["implementation"] == "triton"
    assert set(row["implementations"]) == {"triton", "cuda"}
    assert row["implementations"]["triton"]["median_s"] == row["median_s"]
    assert row["implementations"]["cuda"]["rounds"] > 0
    assert row["baselines"] == {}
    assert f"{report.seconds(row['median_s'])} (Triton; CUDA C++ " in report.line(row)
    monkeypatch.setenv(strips.VARIABLE, "forward=3,8,3")  # wrong
    gpu.measure(row, case, {"copy": 1e12, "matmul": 1e12}, clock, 0.0, None, "")
    assert "off by" in row["implementations"]["cuda"]["failed"]
    assert "CUDA C++ not timed: result 0 is off by" in report.line(row)
    gpu.measure(row, case, {"copy": 1e12, "matmul": 1e12}, clock, 0.0, None, "the GPU was lost")
    assert row["implementations"]["cuda"] == {"failed": "the GPU was lost"}
    assert "failed" not in row
