"""`python -m benchmarks.readme`: writes the figures of benchmarks/results into the README's tables.

A table stands below `<!-- results/<file>.json -->`; its rows say which cases it shows.
"""

import re
from pathlib import Path

from . import report

README = Path(__file__).parent.parent / "README.md"


def filled(text: str, folder: Path = report.RESULTS) -> str:
    """The README with the figures of today."""
    return re.sub(
        r"(<!-- results/(\S+\.json) -->\n+)((?:\|.*\n)+)",
        lambda found: found[1] + _table(found[3].splitlines(), report.load(folder / found[2])),
        text,
    )


def _table(lines: list[str], rows: list[dict]) -> str:
    by_case = {report.key(row): row for row in rows}
    out = lines[:2]
    for line in lines[2:]:
        name, dtype, direction = (cell.strip() for cell in line.split("|")[1:4])
        op, shape = name.replace("`", "").split(", ")
        row = by_case.get((op, shape, direction, dtype))
        if row is None or "failed" in row:
            raise SystemExit(f"README: no figure of {op}, {shape}, {dtype}, {direction} among the results")
        cells = [name, dtype, direction, report.seconds(row["median_s"]), ", ".join(_ratios(row["baselines"]))]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def _short(ratio: float) -> str:
    return f"{ratio:.{2 if ratio < 0.95 else 1 if ratio < 9.95 else 0}f}"


def _ratios(baselines: dict[str, dict]) -> list[str]:
    return [
        f"{name} {_short(result['ratio'])}{'' if result['same_result'] else '*'}"
        for name, result in baselines.items()
        if "ratio" in result and not name.startswith("KVCache")  # that is the operator itself
    ]


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
