"""Tables of the reports."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def table(rows: Iterable[Sequence[Any]]) -> str:
    """The first row is the head; the first column stands left, the others right."""
    first, *others = rows
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (first, *others)]
    return "\n".join([lines[0], "|---" + "|---:" * (len(first) - 1) + "|", *lines[1:]])


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """The mean, and with more than one the standard deviation, 0.1234 ± 0.0012."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"
