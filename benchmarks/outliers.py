"""Baselines' times that are out of line, which flatter us: their ratios are shown nowhere.

A baseline is timed in a case by several dtypes and directions. How many times as long one of these takes as another is
much the same in all its cases on a machine: forward and backward 2.4 times the forward, say. So each other one, a
sibling, foretells its time: the sibling's, times the median of that factor over the baseline's other cases. A time is
out of line if it is LIMIT times what every sibling foretells; two siblings at least, each with three other cases behind
its factor, or nothing is said: of two that disagree nobody knows which one is wrong.

A time may be that long for a reason of its own. Then it is right and not shown, which is the lesser evil.
"""

from statistics import median
from typing import Any

from . import report

# Of the 381 times with such siblings in the results of November 2026 three lie above it, the next at 1.70.
LIMIT = 1.75
SIBLINGS, CASES = 2, 3
Row = dict[str, Any]
Run = tuple[str, str]  # dtype, direction
Case = tuple[str, str]  # operator, shape


def foretold(rows: list[Row]) -> dict[tuple[tuple[str, ...], str], tuple[float, list[float]]]:
    """By row and baseline, its time and what its siblings foretell."""
    times: dict[str, dict[Case, dict[Run, float]]] = {}
    for row in rows:
        for name, result in row.get("baselines", {}).items():
            if "median_s" in result:
                runs = times.setdefault(name, {}).setdefault((row["op"], row["shape"]), {})
                runs[row["dtype"], row["direction"]] = result["median_s"]
    return {
        ((op, shape, run[1], run[0]), name): (time, list(_predictions(cases, (op, shape), run)))
        for name, cases in times.items()
        for (op, shape), runs in cases.items()
        for run, time in runs.items()
    }


def _predictions(cases: dict[Case, dict[Run, float]], case: Case, run: Run) -> Any:
    for sibling, seconds in cases[case].items():
        factors = [x[run] / x[sibling] for key, x in cases.items() if key != case and run in x and sibling in x]
        if sibling != run and len(factors) >= CASES:
            yield seconds * median(factors)


def found(rows: list[Row]) -> dict[tuple[tuple[str, ...], str], str]:
    """By row and baseline, why its time is out of line."""
    reasons = {}
    for key, (time, told) in foretold(rows).items():
        if len(told) >= SIBLINGS and time > LIMIT * max(told):
            span = f"{report.seconds(min(told))} to {report.seconds(max(told))}"
            reasons[key] = f"out of line: {report.seconds(time)}, where its other dtypes and directions foretell {span}"
    return reasons


def without(rows: list[Row]) -> list[Row]:
    """The rows with such results as ones that were not timed."""
    wrong = found(rows)
    return [
        row
        | {
            "baselines": {
                name: {"failed": wrong[report.key(row), name]} if (report.key(row), name) in wrong else result
                for name, result in row.get("baselines", {}).items()
            }
        }
        for row in rows
    ]
