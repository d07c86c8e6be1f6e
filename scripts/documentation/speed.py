"""What operators take, from benchmarks/results: tables, and the figures that benchmarks.plots makes of them."""

import textwrap
from functools import cache
from typing import Any

from benchmarks import plots, report
from cogview_ops.bench import words

from .shared import ROOT

FOLDER = "assets/plots"
HEADER = "| shape | dtype | pass | time | times as fast as | of the floor | memory |", "|---|---|---|---:|---|---|---:|"
PASSES = {"forward+backward": "+ backward"}
STAR = "\\*"  # two of them are no emphasis


@cache
def figures() -> list[plots.Made]:
    return plots.make(ROOT / "build/docs" / FOLDER)


def tables(*operators: str) -> str:
    """A tab a machine, of these operators' figures and rows; without any, of all."""
    parts = []
    for path in sorted(report.RESULTS.glob("*.json"), reverse=True):  # GPUs first
        rows = [row for row in report.shown(path) if "failed" not in row]
        there = [op for op in operators or sorted({row["op"] for row in rows}) if any(row["op"] == op for row in rows)]
        texts = [] if operators else [shown(path.stem, None)]
        texts += [one(path.stem, op, [row for row in rows if row["op"] == op], bool(operators)) for op in there]
        if there:
            parts.append(f'=== "{machine(rows[0])}"\n\n' + textwrap.indent("\n\n".join(texts), "    "))
    if not parts:
        raise LookupError(f"no results of {operators}")
    return "\n\n".join(parts)


def one(machine: str, op: str, rows: list[dict[str, Any]], with_figures: bool) -> str:
    return f"{shown(machine, op)}\n\n{table(op, rows)}" if with_figures else table(op, rows)


def shown(machine: str, operator: str | None) -> str:
    """A machine's figures, of an operator or of all, and which commits they mix."""
    found = [made for made in figures() if (made.machine, made.operator) == (machine, operator)]
    if not found:
        return ""
    lines = [
        f"![{made.alt}]({FOLDER}/{machine}/{file.name}#only-{theme}){{ .plot }}"
        for made in found
        for theme, file in (("light", made.light), ("dark", made.dark))
    ]
    commits = sorted({commit for made in found for commit in made.commits})
    return "\n".join([*lines, "", f"Figures of commit {', '.join(f'`{commit}`' for commit in commits)}."])


def others(folder: str) -> str:
    """Of what else is timed, from a folder of the results: a table a machine."""
    parts = []
    for path in sorted((report.RESULTS / folder).glob("*.json")):
        rows = report.shown(path)
        parts.append(f"**{machine(rows[0])}**")
        parts += [table(op, [row for row in rows if row["op"] == op]) for op in sorted({row["op"] for row in rows})]
    if not parts:
        raise LookupError(f"no results in {folder}")
    return "\n\n".join(parts)


def table(op: str, rows: list[dict[str, Any]]) -> str:
    torches, commits = (", ".join(sorted({f"`{row[what]}`" for row in rows})) for what in ("torch", "commit"))
    return "\n".join([f"`{op}`, torch {torches}, commit {commits}", "", *HEADER, *map(line, rows)])


def machine(row: dict[str, Any]) -> str:
    return row["device"].replace(" threads", f" threads ({row['cpu']})")


def line(row: dict[str, Any]) -> str:
    floor = f"{row['floor_s'] / row['median_s']:.0%} ({row['bound']})" if "bound" in row else ""
    which = row["dtype"], PASSES.get(row["direction"], row["direction"]), words.seconds(row["median_s"])
    parts = (
        *which,
        ", ".join(words.ratios(row["baselines"])).replace("*", STAR),
        floor,
        words.size(row.get("extra_bytes")),
    )
    whole = [part if "," in part else part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts]
    return f"| `{row['shape']}` | {' | '.join(whole)} |"
