"""How far long work is: a bar on a terminal; elsewhere, in a file or a pipe, a line soon and then every 30 seconds."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import rich
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FIRST, EVERY = 1.0, 30.0  # seconds

T = TypeVar("T")


class Update(Protocol):
    def __call__(self, done: float, note: str | None = None) -> None:
        """How much of `total` is done, and words to stand beside it; None: those from before."""


@contextmanager
def progress(title: str, total: float = 1.0, *, shown: bool = True) -> Iterator[Update]:
    """Shows how far some work is, from its beginning on, also while nothing is heard of it."""
    console = rich.get_console()
    if not shown:
        yield lambda done, note=None: None
    elif console.is_terminal or console.is_jupyter:
        title_column, note_column = (
            TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[note]")
        )
        columns = title_column, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), note_column
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, note="")
            begun = False

            def update(done: float, note: str | None = None) -> None:
                nonlocal begun
                if not begun:
                    bar.reset(task, completed=done)  # type: ignore[arg-type]  # done before: it says nothing of speed
                    begun = True
                changes: dict[str, Any] = {} if note is None else {"note": note}
                bar.update(task, completed=done, **changes)

            yield update
    else:
        lines = _Lines(console, title, total)
        thread = threading.Thread(target=lines.keep_printing, daemon=True)
        thread.start()
        try:
            yield lines.update
        finally:
            lines.ended.set()
            thread.join()
            if time.monotonic() - lines.begun >= FIRST:
                lines.print()


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, with progress. total: how many they are, where they cannot tell."""
    count = len(items) if isinstance(items, Sized) else total
    with progress(title, max(count or 0, 1)) as update:
        for number, item in enumerate(items, 1):
            yield item
            update(number)


class _Lines:
    def __init__(self, console: Console, title: str, total: float):
        self.console, self.title, self.total = console, title, total
        self.done, self.note, self.begun = 0.0, "", time.monotonic()
        self.first: float | None = None  # what was done when it began
        self.ended, self.printed = threading.Event(), ""

    def update(self, done: float, note: str | None = None) -> None:
        self.first = done if self.first is None else self.first
        self.done, self.note = done, self.note if note is None else note

    def keep_printing(self) -> None:
        wait = FIRST
        while not self.ended.wait(wait):
            self.print()
            wait = EVERY

    def print(self) -> None:
        share, spent = min(1.0, self.done / self.total), time.monotonic() - self.begun
        parts = [f"{share:.0%}", f"{_clock(spent)} gone"]
        gained = self.done - (self.first or 0.0)
        if gained > 0 and share < 1 and not self.ended.is_set():
            parts.append(f"{_clock(spent * (self.total - self.done) / gained)} left")
        line = f"{self.title}: {', '.join(parts)}{self.note and ', '}{self.note}"
        if line != self.printed:  # the end may come right behind a line
            self.console.print(line, markup=False, soft_wrap=True)
            self.printed = line


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Sum:
    """Adds up how far several pieces of work are, each of which tells it of its own."""

    def __init__(self, update: Callable[[int], None]):
        self.update, self.parts = update, list[int]()

    def part(self) -> Callable[[int], None]:
        number = len(self.parts)
        self.parts.append(0)

        def told(count: int) -> None:
            self.parts[number] = count
            self.update(sum(self.parts))

        return told
