"""What prose about speed would say in figures, as small tables made from benchmarks/results: none goes stale."""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

from benchmarks import report
from cogview_ops.bench import words

from .speed import PASSES, STAR, machine

Row = dict[str, Any]
CLEARLY = 0.95  # of the operator's time; from there on neither is clearly faster


@cache
def results(folder: str = ".") -> list[Row]:
    """What was timed on all machines, GPUs first."""
    paths = sorted((report.RESULTS / folder).glob("*.json"), reverse=True)
    return [row for path in paths for row in report.shown(path) if "failed" not in row]


def floors() -> str:
    """Of each operator on each machine: the lowest and the highest share of all its shapes, dtypes and passes."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in results():
        if "bound" in row:
            found[row["op"]][machine(row)].append(row["floor_s"] / row["median_s"])
    machines = list(dict.fromkeys(map(machine, results())))
    rows = [[f"`{op}`", *(span(there[name], percent) for name in machines)] for op, there in sorted(found.items())]
    return table(["operator", *machines], rows)


def dense() -> str:
    """Three-region attention on a GPU beside the fastest causal attention to all keys."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in results():
        names = [name for name in row.get("baselines", {}) if "causal SDPA" in name]
        if row["op"] == "three_region_attention" and "threads" not in row["device"] and names:
            ratio = min(row["baselines"][name].get("ratio", float("inf")) for name in names)
            found[machine(row), row["shape"]][row["direction"]] = words.ratio(ratio) + STAR
    rows = [[name, f"`{shape}`", *map(there.get, ("forward", "forward+backward"))]
            for (name, shape), there in sorted(found.items(), key=lambda item: tokens(item[0][1]))]  # fmt: skip
    return table(["machine", "shape", "forward", "+ backward"], rows)


def tokens(shape: str) -> tuple[int, int]:
    heads, length, _ = map(int, shape.split("x"))
    return length, heads


def slower() -> str:
    """Every row in which something else is clearly faster."""
    rows = []
    for row in results():
        faster = [
            f"{name} {words.ratio(found['ratio'])}{'' if found['same_result'] else STAR}"
            for name, found in row["baselines"].items()
            if found.get("ratio", CLEARLY) < CLEARLY
        ]
        if faster:
            which = machine(row), f"`{row['op']}`", f"`{row['shape']}`", row["dtype"], passed(row)
            rows.append([*which, ", ".join(faster)])
    return table(["machine", "operator", "shape", "dtype", "pass", "times as fast as"], rows)


def beside(*name: str) -> str:
    """How many times as fast as one baseline, by machine and shape: over dtypes and passes."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in results():
        if "ratio" in (baseline := row["baselines"].get(" ".join(name), {})):
            found[machine(row), row["shape"]].append(baseline["ratio"])
    rows = [[where, f"`{shape}`", span(ratios, "{:.2f}".format)] for (where, shape), ratios in found.items()]
    return table(["machine", "shape", f"times as fast as {' '.join(name)}"], rows)


def memory(op: str, shape: str) -> str:
    """Of a call, results included, and of what it is compared with."""
    there = [row for row in results() if (row["op"], row["shape"]) == (op, shape)]
    names = list(dict.fromkeys(name for row in there for name in row["baselines"]))
    rows = []
    for row in there:
        used = [row.get("extra_bytes"), *(row["baselines"].get(name, {}).get("extra_bytes") for name in names)]
        rows.append([row["dtype"], passed(row), *map(words.size, used)])
    return table(["dtype", "pass", "operator", *names], rows)


def reads() -> str:
    """What share of drawing a token is the reading of weights, and of keys and values."""
    rows = []
    for row in results("generation"):
        once, cache = row["floor_s"] / row["median_s"], row["cache_floor_s"] / row["median_s"]
        rows.append([machine(row), f"`{row['shape']}`", row["dtype"], percent(once), percent(once + cache)])
    return table(["machine", "shape", "dtype", "weights", "and keys and values so far"], rows)


def saved(folder: str) -> str:
    """How much less memory a training step takes than with materialised scores, over all of its shapes and dtypes."""
    steps: dict[str, list[float]] = defaultdict(list)
    wholes: dict[str, list[float]] = defaultdict(list)
    for row in results(folder):
        if row["direction"] == "step":
            scores = row["baselines"]["materialised scores"]
            steps[machine(row)].append(1 - row["extra_bytes"] / scores["extra_bytes"])
            wholes[machine(row)].append(1 - whole(row) / whole(scores))
    rows = [[name, span(steps[name], percent), span(wholes[name], percent)] for name in steps]
    return table(["machine", "less memory for a step", "weights and optimizer counted"], rows)


def whole(one: Row) -> int:
    return one["extra_bytes"] + one["states_bytes"]


def passed(row: Row) -> str:
    return PASSES.get(row["direction"], row["direction"]).replace(" ", "\N{NO-BREAK SPACE}")


def percent(share: float) -> str:
    return f"{share:.0%}"


def span(values: list[float], word: Callable[[float], str]) -> str:
    """The lowest to the highest, or nothing of none."""
    return " to ".join(dict.fromkeys(word(of(values)) for of in (min, max))) if values else ""


def table(head: list[str], rows: list[list[str | None]] | list[list[str]]) -> str:
    if not rows:
        raise LookupError(f"there are no results for a table of {', '.join(head)}")
    return "\n".join(f"| {' | '.join(x or '' for x in row)} |" for row in [head, ["---"] * len(head), *rows])
