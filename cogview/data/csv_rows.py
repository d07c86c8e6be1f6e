"""The rows of a CSV as people and programs really write them: with quotes that are left open, or are part of a text."""

import csv
import io
from collections.abc import Callable, Iterator
from itertools import islice


class _Lines(Iterator[str]):
    """Physical lines, of which some can be read again."""

    def __init__(self, text: str):
        self.lines, self.position = io.StringIO(text, newline="").readlines(), 0

    def __next__(self) -> str:
        if self.position == len(self.lines):
            raise StopIteration
        self.position += 1
        return self.lines[self.position - 1]


def delimiter_of(text: str) -> tuple[str, str]:
    """What separates cells, and the text; a first line that only says so ("sep=;", of Excel) is emptied."""
    first = next((line.strip("\r\n") for line in io.StringIO(text, newline="") if line.strip()), "")
    if first.lower().startswith("sep=") and len(first) == 5:
        return first[4], text.replace(first, "", 1)
    counted = {d: len(next(csv.reader([first], delimiter=d), [])) for d in ",;\t|"}
    return max(counted, key=lambda d: counted[d]), text


def rows_of(
    text: str, delimiter: str, whole: Callable[[list[str]], bool], open_quote: Callable[[int, list[str]], None]
) -> Iterator[tuple[int, list[str]]]:
    """(number of the line where it begins, cells) of every row that is not empty.

    whole: whether the cells of a line are clearly those of a row of this table. A quote that such lines follow, or the
    end of the text, was never closed: open_quote is told its row, and the lines behind it are rows. Quotes in a text
    that are not doubled are part of it.
    """
    lines, width = _Lines(text), 0
    strict, loose = (csv.reader(lines, delimiter=delimiter, strict=strictly) for strictly in (True, False))
    while lines.position < len(lines.lines):
        start, sound = lines.position, True
        try:
            row = next(strict)
        except csv.Error:
            lines.position, sound = start, False
            row = next(loose)
        span = lines.lines[start : lines.position]
        if len(span) > 1 or not sound:
            among = sum(1 for _ in islice(filter(whole, (_cells(line, delimiter) for line in span[1:])), 2))
            at_end = not sound and lines.position == len(lines.lines) and _sound("".join(span) + '"', delimiter)
            if among == 2 or (among and not sound) or at_end:
                open_quote(start + 1, row)
                lines.position = start + 1
                continue
        if not sound and len(span) == 1:
            as_written = next(csv.reader(span, delimiter=delimiter, quoting=csv.QUOTE_NONE))
            row = [_unquoted(cell) for cell in as_written] if len(as_written) == width else row
        if any(cell.strip() for cell in row):
            width = width or len(row)
            yield start + 1, row


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _unquoted(cell: str) -> str:
    """A cell between quotes and blanks without them; others as they are."""
    return _cells(cell.strip(), "\1")[0] if cell.strip() and _sound(cell.strip(), "\1") else cell


def _sound(text: str, delimiter: str) -> bool:
    try:
        return bool(list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)))
    except csv.Error:
        return False
