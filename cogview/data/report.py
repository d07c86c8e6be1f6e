"""What could not be read: one place for it, by kinds."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cogview.data.files import written_beside


class Problem(NamedTuple):
    kind: str
    where: str
    """shard:name, or the name of a file."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}{f' ({self.detail})' if self.detail else ''}"


class Report:
    """How often each kind of problem occurred, and all places. Threads may add to it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._problems: dict[int, list[Problem]] = {}  # by the number of their sample, -1 if they are of none
        self._of_samples: set[tuple[int, str, str]] = set()
        self._lock = threading.Lock()

    def add(self, kind: str, where: str, detail: str = "", *, sample: int | None = None) -> None:
        """sample: its number; the same problem of a sample counts once, however often that is read."""
        detail = printable(detail)
        with self._lock:
            if sample is not None:
                if (sample, kind, detail) in self._of_samples:
                    return
                self._of_samples.add((sample, kind, detail))
            self.counts[kind] += 1
            self._problems.setdefault(-1 if sample is None else sample, []).append(Problem(kind, where, detail))

    @property
    def problems(self) -> list[Problem]:
        """All of them: first those of no sample, then by sample, whichever thread was faster."""
        return [problem for number in sorted(self._problems) for problem in self._problems[number]]

    def of(self, sample: int | None) -> list[Problem]:
        """Those of a sample, or of none."""
        return list(self._problems.get(-1 if sample is None else sample, ()))

    def first(self) -> dict[str, Problem]:
        """The first problem of each kind."""
        found: dict[str, Problem] = {}
        for problem in self.problems:
            found.setdefault(problem.kind, problem)
        return found

    def write(self, path: str | Path) -> None:
        """All problems as JSON lines, {"kind", "where", "detail"}; never half a file."""
        with written_beside(path) as beside, open(beside, "w", encoding="utf-8") as file:
            for problem in self.problems:
                file.write(json.dumps(problem._asdict(), ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        return "; ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items())) or "no problems"


def printable(text: str, length: int = 200) -> str:
    """A name from outside as it can be shown in one line: control characters and what is no Unicode are escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length])
    return shown + ("…" if len(text) > length else "")
