"""The record of a run: one JSON object a line in log.jsonl, and TensorBoard events where it is installed."""

import contextlib
import json
import shutil
from pathlib import Path

from cogview.data.files import write_text
from cogview.train.damage import aside

_BEGIN = b'{"step": '  # of every line


class RunLog:
    """Appends to `folder`. On opening, entries after `step` are dropped: a resumed run writes them again. A file with
    damaged lines is kept beside it, and said. What a full disk has no room for is kept and written later; there are no
    more events then."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "log.jsonl"
        entries, damaged = _entries(self.path) if self.path.exists() else ([], [])
        if damaged:
            kept = shutil.copyfile(self.path, aside(self.path))
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            print(f"{self.path}: line {damaged[0]}{more} cannot be read; the file is kept as {kept.name}")
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115, closed in close()
        self._unwritten, self._said = b"", False
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._events = None
            print("TensorBoard is not installed: this run writes log.jsonl only.")
        else:
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        self._unwritten += json.dumps({"step": step, **values}).encode() + b"\n"
        self.flush()
        if self._events is not None:
            try:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)
            except OSError as error:
                print(f"no more TensorBoard events: {error}")
                self._events = None

    def flush(self) -> None:
        """Writes what there was no room for."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._said = False
        except OSError as error:
            if not self._said:
                print(f"cannot write {self.path}: {error}; training goes on, and its lines wait")
            self._said = True

    def close(self) -> None:
        self.flush()
        if lost := self._unwritten.count(b"\n"):
            print(f"{self.path}: the last {lost:,} lines are lost")
        with contextlib.suppress(OSError):  # of a full disk, as has been said
            self._file.close()
            if self._events is not None:
                self._events.close()


class NoLog:
    """Of a process that is not the first."""

    def write(self, step: int, **values: float) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_log(folder: Path, name: str = "log.jsonl") -> list[dict]:
    """All whole entries of a run's log, "step" and numbers; none when there is no log."""
    try:
        return _entries(folder / name)[0]
    except OSError:
        return []


def _entries(path: Path) -> tuple[list[dict], list[int]]:
    """Of a log, and the numbers of lines that are no entries, but for one that was cut where a process was killed."""
    entries, damaged = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if (entry := _entry(line)) is not None:
            entries.append(entry)
        elif line.strip() and not (number == len(lines) and line.isascii() and line[:9] == _BEGIN[: len(line)]):
            damaged.append(number)
    return entries, damaged


def _entry(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            return None
        whole = [float(value) for value in entry.values() if type(value) in (int, float)]
    except (ValueError, RecursionError, OverflowError):  # the last: a whole number that no float holds
        return None
    return entry if len(whole) == len(entry) else None
