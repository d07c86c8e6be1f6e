"""`python -m benchmarks.report [folder of results]`: the results of every machine as Markdown tables; with `--plots` as
figures, light and dark (plots.py)."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from cogview_ops.bench.machine import slug
from cogview_ops.bench.measure import key
from cogview_ops.bench.words import others, ratio, seconds, size, star

from . import outliers

RESULTS = Path(__file__).parent / "results"
PLOTS = Path(__file__).parent.parent / "build" / "plots"
NAMES = {"cuda": "CUDA C++", "triton": "Triton", "mixed": "CUDA C++ with Triton's backward"}  # on a GPU
HEADER = (
    "| operator | shape | dtype | pass | time | per token | spread | of the floor | extra memory | times as fast as |",
    "|---|---|---|---|---:|---:|---:|---:|---:|---|",
)


def save(row: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Put a row into its device's file, in place of an older one of the same case."""
    path = folder / f"{slug(row['device'])}.json"
    kept = [old for old in load(path) if key(old) != key(row)] if path.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(sorted([*kept, row], key=key), indent=1) + "\n")
    os.replace(beside, path)
    return path


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def shown(path: Path) -> list[dict[str, Any]]:
    """What tables and figures show: results that are out of line as ones that were not timed."""
    return outliers.without(load(path))


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [row["op"], row["shape"], row["dtype"], row["direction"]]
    if "failed" in row:
        return f"| {' | '.join(cells)} | not timed | | | | | {row['failed']} |"
    cells += [
        seconds(row["median_s"]) + kernels(row),
        seconds(row["median_s"] / row["tokens"]) if row.get("tokens") else "",
        f"± {row['iqr_s'] / row['median_s'] / 2:.0%}",
        f"{row['floor_s'] / row['median_s']:.0%} ({row['bound']})" if "bound" in row else "",
        size(row.get("extra_bytes")),
        ", ".join(contestants(row["baselines"])),
    ]
    return f"| {' | '.join(cells)} |"


def kernels(row: dict[str, Any]) -> str:
    """Which of two kernels that time is of, and that of the other."""
    mine, theirs = row.get("implementation", ""), dict(row.get("implementations", {}))
    theirs.pop(mine, None)
    if not theirs:
        return ""
    (name, other), *_ = theirs.items()
    time = f"not timed: {other['failed']}" if "failed" in other else seconds(other["median_s"])
    return f" ({NAMES.get(mine, mine)}; {NAMES[name]} {time})"


def contestants(baselines: dict[str, dict[str, Any]]) -> list[str]:
    """Ratio and memory of each, and why some have none."""
    parts = []
    for name, result in others(baselines).items():
        memory = f" ({size(result['extra_bytes'])})" if result.get("extra_bytes") is not None else ""
        parts.append(f"{name} {ratio(result['ratio'])}{star(result)}{memory}")
    return parts + [
        f"{name} not timed ({result['failed']})" for name, result in baselines.items() if "failed" in result
    ]


def tables(folder: Path = RESULTS) -> str:
    parts = []
    for path in sorted(folder.glob("*.json")):
        rows = shown(path)
        versions = sorted({f"torch {r['torch']}, {r['compiler']}, {r['cpu']}, commit {r['commit']}" for r in rows})
        parts += [f"{rows[0]['device']}; {'; '.join(versions)}", "", *HEADER, *map(line, rows), ""]
    if not parts:
        return f"No results in {folder}: run `python -m benchmarks` first."
    return "\n".join(
        [
            *parts,
            "Median of interleaved rounds in one process. Floor: the bytes, matrix products or exponentials that are",
            "unavoidable, whichever takes longest at the copy bandwidth, the matmul rate and the rate of torch.exp",
            "measured on the same machine. Memory: growth of the process at its peak, results included; for the",
            "baselines in brackets. A star marks a baseline that computes something else: dense attention, a norm or",
            "softmax without PB-relax, or a formula whose gradients of weights torch sums in bfloat16. Where a GPU has",
            "two kernels of ours, CUDA C++ and Triton, the time is that of the one that runs by default; in brackets,",
            "that of the other, timed in turn with it.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="below results (default: itself)")
    parser.add_argument(
        "--plots", nargs="?", type=Path, const=PLOTS, metavar="FOLDER", help="figures instead of tables"
    )
    options = parser.parse_args()
    folder = RESULTS / options.folder
    if options.plots is None:
        print(tables(folder))
        return
    try:
        from . import plots
    except ImportError as error:
        parser.error(f"--plots needs matplotlib, which cannot be imported ({error}): pip install matplotlib")
    made = plots.make(options.plots, folder)
    print(*(f"{figure.light} and {figure.dark.name}: {figure.alt}" for figure in made), sep="\n")


if __name__ == "__main__":
    main()
