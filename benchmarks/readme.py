"""`python -m benchmarks.readme`: writes the figures of benchmarks/results into the README's tables.

A table stands below `<!-- results/<file>.json @<commit> -->`; its rows say which cases it shows, all of that commit:
rows of another are refused, to be measured again or taken out. Without `@<commit>` they are of any one. A ratio to a
baseline whose time is out of line (outliers.py) is left out, and printed, as is how many ratios nothing can judge.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from cogview_ops.bench import words

from . import outliers, report

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(<!-- results/(\S+\.json)(?: @(\w+))? -->\n+)((?:\|.*\n)+)")
Row = dict[str, Any]


def filled(text: str, folder: Path = report.RESULTS) -> str:
    """The text with the figures of today. SystemExit says which rows are missing or of another commit."""
    return TABLE.sub(lambda found: found[1] + _table(found[4].splitlines(), folder / found[2], found[3]), text)


def left_out(text: str, folder: Path = report.RESULTS) -> list[str]:
    """Which ratios its tables do not show, and why."""
    lines = []
    for _, file, _, table in TABLE.findall(text):
        wrong = outliers.found(report.load(folder / file))
        cases = {_case(line) for line in table.splitlines()[2:]}
        lines += [f"{file}: {', '.join(key)}, {name}: {why}" for (key, name), why in wrong.items() if key in cases]
    return lines


def not_judged(text: str, folder: Path = report.RESULTS) -> tuple[int, int]:
    """How many ratios of its tables are of times that outliers.py can say nothing of, and how many ratios there are."""
    unknown = whole = 0
    for _, file, _, table in TABLE.findall(text):
        known = outliers.judged(report.load(folder / file))
        by_case = {report.key(row): row for row in report.shown(folder / file)}
        for case in map(_case, table.splitlines()[2:]):
            names = [x for x, result in words.others(by_case[case]["baselines"]).items() if "ratio" in result]
            unknown += sum((case, name) not in known for name in names)
            whole += len(names)
    return unknown, whole


def _case(line: str) -> tuple[str, ...]:
    """The key of a table's line among the rows."""
    name, dtype, direction = (cell.strip() for cell in line.split("|")[1:4])
    op, shape = name.replace("`", "").split(", ")
    return op, shape, direction, dtype


def _table(lines: list[str], path: Path, commit: str | None) -> str:
    by_case = {report.key(row): row for row in report.shown(path)}
    chosen = [(line, by_case.get(_case(line))) for line in lines[2:]]
    if missing := [_case(line) for line, row in chosen if row is None or "failed" in row]:
        raise SystemExit(f"README: no figure of {'; '.join(', '.join(case) for case in missing)} in {path.name}")
    rows = [row for _, row in chosen if row is not None]
    _check_commit(rows, path.name, commit)
    out = lines[:2]
    for line, row in zip(lines[2:], rows, strict=True):
        name, dtype, direction = (cell.strip() for cell in line.split("|")[1:4])
        cells = [name, dtype, direction, report.seconds(row["median_s"]), ", ".join(words.ratios(row["baselines"]))]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def _check_commit(rows: list[Row], file: str, commit: str | None) -> None:
    commits = Counter(row["commit"] for row in rows)
    if commit is None:
        (commit, _), *_ = commits.most_common(1)
    # short names of a commit are of several lengths; what was measured with changes on top of it is none
    fits = re.compile(f"{commit}[0-9a-f]*")
    others = [row for row in rows if row["commit"] != commit and not fits.fullmatch(str(row["commit"]))]
    if others:
        said = "; ".join(f"{', '.join(report.key(row))} (of {row['commit']})" for row in others)
        raise SystemExit(
            f"README: the table of {file} is of commit {commit}, but these rows are not: {said}. Measure them again at "
            "it, or all at a newer one (python -m benchmarks, on a GPU benchmarks.gpu, with --op and --dtype), or take "
            "them out of the table"
        )


def main() -> None:
    text = README.read_text()
    README.write_text(filled(text))
    for line in left_out(text):
        print(f"left out of {README.name}: {line}")
    unknown, whole = not_judged(text)
    print(f"not judged: {unknown} of the {whole} ratios in {README.name}")


if __name__ == "__main__":
    main()
