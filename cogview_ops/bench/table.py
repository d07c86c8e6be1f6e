"""A row of results as a table for a terminal."""

from typing import Any

from .words import ratio, seconds, size, star

Cells = tuple[str, ...]


def of(row: dict[str, Any], left_out: list[str]) -> str:
    """`left_out`: baselines that nobody asked for."""
    title = f"{row['op']}, {row['shape']}, {row['dtype']}, {row['direction']}"
    where = f"{row['device']}; torch {row['torch']}, cogview_ops {row['cogview_ops']}"
    if "failed" in row:
        return f"{title}\n{where}\n  not timed: {row['failed']}\n"
    timed = {name: result for name, result in row["baselines"].items() if "failed" not in result}
    lines: list[Cells] = [("", "time", "extra memory", "cogview_ops is")]
    spread = f" ± {row['iqr_s'] / row['median_s'] / 2:.0%}"
    lines.append(("cogview_ops", seconds(row["median_s"]) + spread, size(row["extra_bytes"]), ""))
    for name, result in sorted(timed.items(), key=lambda item: item[1]["median_s"]):
        times = f"{ratio(result['ratio'])} times as fast"
        lines.append((name + star(result), seconds(result["median_s"]), size(result["extra_bytes"]), times))
    lines.append(("floor", seconds(row["floor_s"]), "", f"at {row['floor_s'] / row['median_s']:.0%} of it"))
    notes = [f"the floor is {WORK[row['bound']]}"]
    if any(star(result) for result in timed.values()):
        notes.append("* computes something else")
    notes += [f"{name} not timed: {x['failed']}" for name, x in row["baselines"].items() if "failed" in x]
    if left_out:
        notes.append(f"{', '.join(left_out)} not timed: compiling takes long on a CPU; --baselines all")
    return "\n".join([title, where, *aligned(lines), *(f"  {note}" for note in notes), ""])


WORK = {
    "memory": "the bytes, at the speed of a copy",
    "matmul": "the matrix products, at the speed of torch's own",
    "exp": "the exponentials, at the speed of torch.exp",
}


def aligned(lines: list[Cells]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
