"""`python -m benchmarks.sweep`: CUDA C++ against Triton on the GPU at hand, and how CUDA C++ cuts local attention best.

What CUDA C++ computes is checked first: a sample against float64, all of it against Triton. Then both are timed in turn
as in benchmarks.gpu, and each pass of local attention as strips.py has it, by the time of the whole call that it is
part of. FOLDER/<device>.json has every result as it comes; who runs this again goes on where it was stopped. At the end
it prints rows for cogview_ops/_measured.py and csrc/cuda/local_plan.h. Exit status: 1 if something failed, is left or
far slower than expected.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_ops.bench import machine, problems
from cogview_ops.bench.clock import Call, Clock
from cogview_ops.bench.correctness import TOLERANCE, contestants, results
from cogview_ops.bench.problems import Problem

from . import report, strips
from .cases import Case
from .strips import Choice

Row = dict[str, Any]
MAIN, FIRST = "320x64x64x{}", 64  # the shape, of head_dim 64, of which times are expected; it is tuned for
SHAPES: dict[str, dict[str, Callable[..., Problem]]] = {
    "local_attention_2d": {
        MAIN: partial(problems.local_2d, heads=320, alone=True),
        "16x128x128x{}-13x13": partial(problems.local_2d, grid=(128, 128), kernel=(13, 13), alone=True),
        "320x64x64x{}-causal": partial(problems.local_2d, heads=320, causal=True, alone=True),
    },
    "three_region_attention": {"160x4224x{}": partial(problems.three_region, heads=160)},
}
SMALL: dict[str, dict[str, Any]] = {  # of a rehearsal
    "local_attention_2d": {"heads": 2, "grid": (16, 16), "kernel": (9, 9)},
    "three_region_attention": {"heads": 2, "seqlen": 256, "pivots": 64, "text": 32},
}
# of MAIN on an H100, in seconds: the forward, between these; the backward; what calls for a halt
FORWARD, BACKWARD, TOO_LONG = (245e-6, 300e-6), 779e-6, 350e-6
COPY = 2.7e12  # bytes per second that a device's copies must move for them to be expected there
USUAL = "usual"  # cut as it is without a choice
AT_ONCE = 12  # candidates in turn: each is a graph that keeps its results
WORTH = 0.99  # of the usual time: less is noise
PATIENCE = {"triton": 240, "cuda": 60}  # seconds until a call is taken never to end; Triton compiles


class Job(NamedTuple):
    """A case: both kernels in turn or, of a pass of CUDA C++, all candidates."""

    case: Case
    head_dim: int
    tuned: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.case.op, self.case.shape, self.case.direction, self.tuned

    def __str__(self) -> str:
        return f"{self.case.op} {self.case.shape} {self.tuned or self.case.direction}"

    @property
    def expected(self) -> tuple[float, float] | None:
        if (self.case.op, self.case.shape) != ("local_attention_2d", MAIN.format(FIRST)):
            return None
        back = BACKWARD * self.case.backward
        return FORWARD[0] + back, FORWARD[1] + back


def jobs(ops: list[str], head_dims: list[int], small: bool = False) -> list[Job]:
    """What decides most first: both kernels at all main shapes, their candidates, then the same of other shapes."""
    main: list[Job] = []
    others: list[Job] = []
    for dim in head_dims:
        for op in ops:
            for i, (shape, build) in enumerate([*SHAPES[op].items()][: 1 if small else None]):
                build = partial(build, dim=dim, **(SMALL[op] if small else {}))
                both = [Case(op, shape.format(dim), "bf16", back, build) for back in (False, True)]
                (others if i else main).extend(Job(case, dim) for case in both)
                if op == "local_attention_2d":
                    of = zip([both[0], both[1], both[1]], strips.PASSES, strict=True)
                    (others if i else main).extend(Job(case, dim, name) for case, name in of)
    return [job for group in (main, others) for job in sorted(group, key=lambda job: bool(job.tuned))]


@dataclass
class Kept:
    """Results of one device and commit, by job and implementation or choice; on disk as they come. Those that are there
    count where all facts are the same, and with `failed` also what failed: else it is tried again."""

    path: Path
    facts: Row
    failed: bool = False
    rows: dict[tuple[str, ...], Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        if all(kept.get(name) == value for name, value in self.facts.items()):
            self.rows = {(*row["job"], row["of"]): row for row in kept.get("rows", [])}
        self.rows = {key: row for key, row in self.rows.items() if self.failed or "failed" not in row}

    def put(self, job: Job, of: str, row: Row) -> Row:
        row = self.rows[*job.key, of] = {"job": list(job.key), "of": of} | row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps({**self.facts, "rows": list(self.rows.values())}, indent=1) + "\n")
        os.replace(beside, self.path)
        return row

    def get(self, job: Job, of: str) -> Row:
        return self.rows.get((*job.key, of), {})

    def choices(self, job: Job) -> dict[Choice, Row]:
        """Of a pass, those that were timed, the fastest first."""
        found = [row for key, row in self.rows.items() if key[:-1] == job.key and key[-1] != USUAL and "ratio" in row]
        return {strips.parse(row["of"]): row for row in sorted(found, key=lambda row: row["ratio"])}


class Refused(Exception):
    """What ran is not to be timed, or why it did not run."""


def say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def distance(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Of all results the largest, as a part of the 2-norm."""
    return max(_off(x.detach().float(), y.detach().float()) for x, y in zip(got, expected, strict=True))


def _off(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@dataclass
class Sweep:
    clock: Clock
    kept: Kept
    seconds: float
    stop: float  # on the monotonic clock
    impls: dict[str, str]  # what "cuda" and "triton" are: something else in a rehearsal
    restart: Callable[[], None]  # goes on in a new process

    def __post_init__(self) -> None:
        self.copy = self.clock.ceilings["copy"]

    def run(self, job: Job) -> None:
        """As far as time allows."""
        problem = replace(job.case.problem(self.clock.flush.device.type), baselines={}, others={})
        (self.tune if job.tuned else self.compare)(job, problem)

    def done(self, job: Job) -> bool:
        if job.tuned:
            usual = self.kept.get(job, USUAL)
            return "failed" in usual or usual.get("all", False)
        return all(self.kept.get(job, name) for name in self.impls)

    def attempt(self, job: Job, of: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's result. Where it fails that is kept, and the result None; what loses the GPU, or never ends, is
        left behind in this process."""

        def never_ends() -> None:
            self.failed(job, of, "it did not end")
            self.restart()

        watch = threading.Timer(PATIENCE.get(of, PATIENCE["cuda"]), never_ends)
        watch.daemon = True
        watch.start()
        try:
            result = call(*arguments)
            if self.clock.gpu:
                torch.cuda.synchronize()
            return result
        except Exception as error:
            kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
            self.failed(job, of, f"{kind}{str(error).partition(chr(10))[0][:200]}")
        finally:
            watch.cancel()
        try:
            if self.clock.gpu:
                torch.cuda.synchronize()
        except RuntimeError:  # no later call of this process works
            self.restart()
        return None

    def failed(self, job: Job, of: str, why: str) -> None:
        self.kept.put(job, of, {"failed": why})
        say(f"{job} {of}: {why}")

    def timed(self, job: Job, problem: Problem, values: list[float]) -> Row:
        low, _, high = quantiles(values, n=4)
        row: Row = {"median_s": median(values), "iqr_s": high - low, "rounds": len(values)}
        row["floor_s"] = problem.bytes / self.copy
        if job.expected and self.copy >= COPY and self.clock.gpu:
            row["expected_s"] = job.expected
        return row

    def compare(self, job: Job, problem: Problem) -> None:
        def checked(impl: str) -> Call:
            calls, failed = contestants(replace(problem, ours=partial(problem.ours, impl=impl)), job.case.backward)
            if failed:
                raise Refused(failed["ours"])
            return calls["ours"]

        calls: dict[str, Call] = {}
        for name, impl in self.impls.items():
            if "failed" not in self.kept.get(job, name) and (call := self.attempt(job, name, checked, impl)):
                calls[name] = call
        if len(calls) == 2:
            off = self.attempt(job, "cuda", lambda: distance(calls["cuda"](), calls["triton"]()))
            if off is not None and not off <= 2 * TOLERANCE[problem.inputs[0].dtype]:
                self.failed(job, "cuda", f"it differs from Triton by {off:.1e} of the norm, outside of the sample")
                off = None
            if off is None:
                del calls["cuda"]

        def turns() -> tuple[dict[str, list[float]], dict[str, str | None]]:
            ready = {name: self.clock.captured(call, self.clock.extra_bytes(call)) for name, call in calls.items()}
            times = self.clock.in_turn({name: call for name, (call, _) in ready.items()}, self.seconds)
            return times, {name: why for name, (_, why) in ready.items()}

        times, why = (calls and self.attempt(job, next(iter(calls)), turns)) or ({}, {})
        for name, values in times.items():
            row = self.timed(job, problem, values) | {"not_captured": why[name]}
            self.kept.put(job, name, row)
            text = predicted(row, backward_alone(self.kept, job, name))
            say(f"{job}, {report.NAMES[name]}: {us(row['median_s'])}, {text}")
        if "cuda" in times and (alarm := self.alarm(job)):
            say(alarm)

    def alarm(self, job: Job) -> str | None:
        """Where the kernel is far from what it should be, no table is to be made of it."""
        row = self.kept.get(job, "cuda")
        if job.tuned or job.case.backward or not row.get("expected_s") or row["median_s"] <= TOO_LONG:
            return None
        time = f"{job} took {us(row['median_s'])}, {predicted(row)}"
        return f"{'!' * 120}\n!!! STOP AND FIND OUT WHY: {time}, above {us(TOO_LONG)}\n{'!' * 120}"

    def tune(self, job: Job, problem: Problem) -> None:
        whole = self.kept.get(job._replace(tuned=""), "cuda")
        if "median_s" not in whole:
            self.failed(job, USUAL, f"left out: {whole.get('failed', 'it was not compared')}")
            return
        call = as_call(problem, self.impls["cuda"], job.case.backward)
        usual = self.attempt(job, USUAL, self.ready, job, Choice(), call)
        known = self.kept.rows
        offered = strips.candidates(job.tuned)[: AT_ONCE if self.kept.facts["rehearsal"] else None]
        todo = [x for x in offered if (*job.key, str(x)) not in known]
        while todo and usual and monotonic() < self.stop:
            calls = {USUAL: usual}
            while todo and len(calls) < AT_ONCE:
                choice = todo.pop(0)
                if ready := self.attempt(job, str(choice), self.ready, job, choice, call):
                    calls[str(choice)] = ready
            if len(calls) == 1:
                continue
            if not (times := self.attempt(job, USUAL, self.clock.in_turn, calls, self.seconds)):
                return
            for name, values in sorted(times.items(), key=lambda item: median(item[1])):
                row = self.timed(job, problem, values) | {"ratio": median(values) / median(times[USUAL])}
                self.kept.put(job, name, row)
                say(f"{job}={name}: {us(row['median_s'])}, {row['ratio']:.3f} of the usual, {predicted(row)}")
        if usual and not todo:
            self.kept.put(job, USUAL, self.kept.get(job, USUAL) | {"all": True})

    def ready(self, job: Job, choice: Choice, call: Call) -> Call | None:
        """The call cut so, to be repeated; None if it does not fit."""
        with strips.trying({job.tuned: choice}):
            try:
                got = call()
            except RuntimeError as error:
                if strips.REFUSED in str(error):
                    return None
                raise
            again, why = self.clock.captured(call, None)
            if why and self.clock.gpu:  # it would be cut as it is when it runs
                raise RuntimeError(f"not captured: {why}")
        with strips.trying({}):
            off = distance(got, call())
        if not off <= TOLERANCE[got[0].dtype]:
            raise Refused(f"it is off by {off:.1e} of the norm from what it usually is")
        return again


def as_call(problem: Problem, impl: str, backward: bool) -> Call:
    return partial(results, problem.inputs, backward, partial(problem.ours, impl=impl))


def predicted(row: Row, back: float = 0.0) -> str:
    text, expected = f"floor {us(row['floor_s'])}", row.get("expected_s")
    if expected:
        text += f", expected {us(expected[0])} to {us(expected[1])}"
    if back:
        text += f"; the backward alone {us(back)}" + (f", expected {us(BACKWARD)}" if expected else "")
    return text


def left_to_triton(row: Row) -> bool:
    """Whether CUDA C++ says of a call what it expects instead."""
    return "cannot run on" in row.get("failed", "") and ": expected " in row["failed"]


def backward_alone(kept: Kept, job: Job, name: str) -> float:
    """Seconds without the forward; 0: not known, or none to tell of."""
    whole = kept.get(job, name).get("median_s", 0.0)
    forward = kept.get(job._replace(case=replace(job.case, backward=False)), name).get("median_s", 0.0)
    return whole - forward if job.case.backward and whole and forward else 0.0


def ratios(kept: Kept, todo: list[Job]) -> list[str]:
    """Rows of _measured.RATIOS: of all shapes of an operator and head_dim, the least. None where CUDA C++ failed."""
    lines = []
    for op, dim in dict.fromkeys((job.case.op, job.head_dim) for job in todo):
        least: dict[str, float] = {}
        broken = False
        for job in todo:
            if job.tuned or (job.case.op, job.head_dim) != (op, dim):
                continue
            cuda, triton = (kept.get(job, name) for name in ("cuda", "triton"))
            back = [backward_alone(kept, job, name) for name in ("cuda", "triton")]
            times = back if job.case.backward else [row.get("median_s", 0.0) for row in (cuda, triton)]
            if min(times) > 0:
                ratio = times[1] / times[0]
                text = f"CUDA C++ {us(cuda['median_s'])}, Triton {us(triton['median_s'])} ({ratio:.2f})"
                lines.append(f"    # {job}: {text}, {predicted(cuda, back[0])}")
                least[job.case.direction] = min(ratio, least.get(job.case.direction, ratio))
            else:
                broken |= "failed" in cuda and not left_to_triton(cuda)
                failed = {"CUDA C++": cuda.get("failed"), "Triton": triton.get("failed")}
                why = "; ".join(f"{name} cannot run: {text}" for name, text in failed.items() if text)
                lines.append(f"    # {job}: {why or 'not measured'}")
        values = ", ".join(f"{least[name]:.2f}" for name in ("forward", "forward+backward") if name in least)
        whole = len(least) == 2 and not broken
        lines.append(f'    ("{op}", {dim}): ({values}),' if whole else f"    # no row of {op}, {dim}")
    return lines


def best(kept: Kept, todo: list[Job], capability: tuple[int, int]) -> list[str]:
    """Rows of kTuned: a pass that no choice makes faster, at the shape it is tuned for, stays."""
    rows: dict[int, dict[str, Choice]] = {}
    lines = []
    for job in todo:
        if not job.tuned or not (found := kept.choices(job)):
            continue
        main = job.case.shape == MAIN.format(job.head_dim)
        lines.append(
            f"    // {job}: {len(found)} choices; usual {us(kept.get(job, USUAL)['median_s'])}, the best of all:"
        )
        for choice, row in list(found.items())[: 3 if main else 1]:
            lines.append(f"    //   {choice}: {us(row['median_s'])}, {row['ratio']:.3f} of the usual, {predicted(row)}")
        if main:
            choices = rows.setdefault(job.head_dim, strips.tuned(capability, job.head_dim))
            first, row = next(iter(found.items()))
            if row["ratio"] < WORTH:
                choices[job.tuned] = first
    return lines + [strips.as_row(capability, dim, choices) for dim, choices in rows.items()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="(default: all)")
    parser.add_argument("--head-dim", nargs="+", type=int, choices=[32, 64, 96, 128], default=[64, 128])
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing in turn (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which nothing begins")
    parser.add_argument("--out", type=Path, help=f"folder (default: {report.RESULTS.name}/sweep)")
    parser.add_argument("--rehearse", action="store_true", help="small cases; without a GPU, of C++ and the formula")
    parser.add_argument("--restarted", action="store_true", help="leave out what failed; what is run after a fault")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not options.rehearse:
        print("benchmarks.sweep: no GPU that torch can use")
        return 2
    if options.rehearse and options.out is None:
        parser.error("--rehearse: give another folder than that of the results, --out")
    stop, clock, out = monotonic() + options.budget, Clock(gpu), options.out or report.RESULTS / "sweep"

    def restart() -> None:
        left = ["--restarted", "--budget", f"{max(stop - monotonic(), 0):.0f}"]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.sweep", *sys.argv[1:], *left])

    facts = clock.facts() | {"rehearsal": options.rehearse}
    kept = Kept(out / f"{machine.slug(facts['device'])}.json", facts, options.restarted)
    todo = jobs(options.op, options.head_dim, options.rehearse)
    impls = {"cuda": "cuda", "triton": "triton"} if gpu else {"cuda": "cpp", "triton": "reference"}
    sweep = Sweep(clock, kept, options.seconds, stop, impls, restart)
    return go(sweep, todo, torch.cuda.get_device_capability() if gpu else (0, 0))


def go(sweep: Sweep, todo: list[Job], capability: tuple[int, int]) -> int:
    kept, status = sweep.kept, 0
    if sweep.impls["cuda"] != "cuda":
        say(f"# instead of CUDA C++ and Triton: {' and '.join(sweep.impls.values())}")
    say(f"# {len(kept.rows)} results are here already, {sum(map(sweep.done, todo))} of {len(todo)} parts are done")
    try:
        for job in todo:
            if not sweep.done(job) and monotonic() < sweep.stop:
                sweep.run(job)
                if sweep.clock.gpu:
                    torch.cuda.empty_cache()
    except KeyboardInterrupt:
        status = 130
    left = [str(job) for job in todo if not sweep.done(job)]
    rows = [row for row in kept.rows.values() if "failed" in row and not left_to_triton(row)]
    alarms = [alarm for job in todo if (alarm := sweep.alarm(job))]
    say("# tables")  # scripts/gpu_check.py repeats what follows
    say(f"# {kept.facts['device']}, torch {kept.facts['torch']}, commit {kept.facts['commit']}")
    if kept.facts["rehearsal"]:
        say("# a rehearsal, whose rows say nothing")
    say("# cogview_ops/_measured.py, RATIOS", f"{capability}: {{", *ratios(kept, todo), "},")
    say("// csrc/cuda/local_plan.h, kTuned", *best(kept, todo, capability))
    say(*[f"# failed: {' '.join(row['job'])} {row['of']}: {row['failed']}" for row in rows])
    if left:
        say(f"# {len(left)} parts are left, run it again: {', '.join(left)}")
    say(*alarms)
    return status or int(bool(left or rows or alarms))


if __name__ == "__main__":
    sys.exit(main())
