"""Tables of an operator's times, from benchmarks/results, and the plots that benchmarks.report makes of them."""

import textwrap
from pathlib import Path
from typing import Any

from benchmarks import report

HEADER = "| shape | dtype | pass | time | times as fast as | of the floor | memory |", "|---|---|---|---:|---|---|---:|"
PASSES = {"forward+backward": "+ backward"}
STAR = "\\*"  # two of them are no emphasis


def tables(*operators: str) -> str:
    """A tab a machine, of these operators' rows; without any, of all."""
    parts = []
    for path in sorted(report.RESULTS.glob("*.json"), reverse=True):  # GPUs first
        rows = [row for row in report.load(path) if "failed" not in row]
        there = [op for op in operators or sorted({row["op"] for row in rows}) if any(row["op"] == op for row in rows)]
        if there:
            text = "\n\n".join(table(op, [row for row in rows if row["op"] == op]) for op in there)
            parts.append(f'=== "{machine(rows[0])}"\n\n{textwrap.indent(text, "    ")}')
    if not parts:
        raise LookupError(f"no results of {operators}")
    return "\n\n".join(parts)


def others(folder: str) -> str:
    """Of what else is timed, from a folder of the results: a table a machine."""
    parts = []
    for path in sorted((report.RESULTS / folder).glob("*.json")):
        rows = report.load(path)
        parts.append(f"**{machine(rows[0])}**")
        parts += [table(op, [row for row in rows if row["op"] == op]) for op in sorted({row["op"] for row in rows})]
    if not parts:
        raise LookupError(f"no results in {folder}")
    return "\n\n".join(parts)


def table(op: str, rows: list[dict[str, Any]]) -> str:
    versions = sorted({f"torch {row['torch']}, commit `{row['commit']}`" for row in rows})
    return "\n".join([f"`{op}`: {'; '.join(versions)}", "", *HEADER, *map(line, rows)])


def machine(row: dict[str, Any]) -> str:
    return row["device"].replace(" threads", f" threads ({row['cpu']})")


def line(row: dict[str, Any]) -> str:
    floor = f"{row['floor_s'] / row['median_s']:.0%} ({row['bound']})" if "bound" in row else ""
    which = row["dtype"], PASSES.get(row["direction"], row["direction"]), report.seconds(row["median_s"])
    parts = *which, ", ".join(ratios(row["baselines"])), floor, report.size(row.get("extra_bytes"))
    whole = [part if "," in part else part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts]
    return f"| `{row['shape']}` | {' | '.join(whole)} |"


def ratios(baselines: dict[str, dict[str, Any]]) -> list[str]:
    """How many times as fast as each, with a star where that is something else."""
    return [
        f"{name} {short(found['ratio'])}{'' if found['same_result'] else STAR}"
        for name, found in baselines.items()
        if "ratio" in found
    ]


def short(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 0.95 else 1 if ratio < 9.95 else 0}f}"


def draw(folder: Path) -> None:
    """The plots of every machine."""


def plots(*operators: str) -> str:
    """Those of these operators; without any, of all."""
    return ""
