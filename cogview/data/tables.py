"""Tables of captions: CSV and TSV with a header, JSON lines, or a JSON list of objects."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogview.data.captions import decoded, read_object
from cogview.data.report import Report, printable

IMAGE_COLUMNS = ("file_name", "filename", "image", "path", "file", "image_path", "filepath", "file_path", "image_file")
TEXT_COLUMNS = ("caption", "text", "captions", "description", "prompt")  # the first one that is there
LANGUAGE_COLUMNS = ("en", "zh")
MAX_TABLE_BYTES = 1 << 30
_JSON, _CSV = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv", ".txt")


@dataclass
class Table:
    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # by the number of their line

    def image_column(self, name: str | None) -> str:
        """The column that names the pictures: this one, or one of the usual names."""
        if name is not None:
            return self._given("image-column", name)
        if found := self._usual(IMAGE_COLUMNS):
            return found[0]
        raise self._lacks("the pictures' names", IMAGE_COLUMNS, "--image-column")

    def caption_columns(self, names: Sequence[str]) -> dict[str, str]:
        """Columns that hold captions, and the fields to keep them in: these columns, or those of usual names.

        Of the usual names that say no language the first, as "caption", and en and zh. One column that is asked for
        alone and is neither becomes "caption" too; several keep their names.
        """
        if names:
            given = [self._given("caption-columns", name) for name in dict.fromkeys(names)]
            alone = len(given) == 1 and given[0] not in LANGUAGE_COLUMNS
            return {given[0]: "caption"} if alone else {name: name for name in given}
        found = dict.fromkeys(self._usual(TEXT_COLUMNS)[:1], "caption")
        for name in self._usual(LANGUAGE_COLUMNS):
            found[name] = name.lower()
        if not found:
            raise self._lacks("captions", TEXT_COLUMNS + LANGUAGE_COLUMNS, "--caption-columns")
        return found

    def _usual(self, names: Sequence[str]) -> list[str]:
        there = {column.lower(): column for column in reversed(self.columns)}
        return [self._once(there[name]) for name in names if name in there]

    def _given(self, option: str, name: str) -> str:
        if name not in self.columns:
            raise ValueError(f"{option}: expected a column of {self.path.name} ({self._list()}), got {name!r}")
        return self._once(name)

    def _once(self, name: str) -> str:
        if self.columns.count(name) > 1:
            raise ValueError(f"captions: {self.path.name} has several columns {name!r}; rename all but one")
        return name

    def _lacks(self, what: str, usual: Sequence[str], option: str) -> ValueError:
        return ValueError(
            f"captions: expected a column with {what} in {self.path.name} ({', '.join(usual)}), "
            f"got columns {self._list()}; {option} names another"
        )

    def _list(self) -> str:
        return ", ".join(printable(column, 40) for column in self.columns[:20]) or "none"


def read_table(path: Path, report: Report) -> Table:
    """The rows of a table of captions. What is no UTF-8 becomes lone surrogates; damaged rows go to `report`."""
    if not path.is_file():
        raise ValueError(f"captions: expected a file, got {str(path)!r}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"captions: expected at most {MAX_TABLE_BYTES} bytes, got {path.stat().st_size}")
    data, kind = path.read_bytes(), path.suffix.lower()
    if kind not in _JSON + _CSV:
        raise ValueError(f"captions: expected {', '.join(_CSV + _JSON)}, got {path.name!r}")
    try:
        return (_of_csv if kind in _CSV else _of_json)(path, decoded(data), report)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"captions: {path.name} is not readable ({error})") from error


def _of_csv(path: Path, text: str, report: Report) -> Table:
    first = text.lstrip("\r\n").partition("\n")[0].rstrip("\r")
    if first.lower().startswith("sep=") and len(first) == 5:  # written by Excel
        delimiter, text = first[4], text.lstrip("\r\n").partition("\n")[2]
    else:
        counted = {d: len(next(csv.reader([first], delimiter=d), [])) for d in ",;\t|"}
        delimiter = max(counted, key=lambda d: counted[d])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    lines = ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    table = Table(path, [name.strip() for name in next(lines, (0, []))[1]])
    for number, row in lines:
        if any(cell.strip() for cell in row[len(table.columns) :]):
            detail = f"expected {len(table.columns)}, got {len(row)}; a text with {delimiter!r} needs quotes"
            report.add("row with too many fields", f"{path.name}:{number}", detail)
        else:
            table.rows.append((number, dict(zip(table.columns, row, strict=False))))
    ended = table.rows and table.rows[-1][0] == reader.line_num and list(table.rows[-1][1].values())
    if ended and "\n" in ended[-1] and not text.rstrip().endswith('"'):
        number, _ = table.rows.pop()  # its last cell has the whole rest of the file
        report.add(
            "quote not closed", f"{path.name}:{number}", f"in the row of {ended[0]}; all lines behind it are lost"
        )
    return table


def _of_json(path: Path, text: str, report: Report) -> Table:
    rows: Iterable[tuple[int, str | dict]]
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"captions: {path.name} is not JSON ({error})") from error
    else:
        rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    table = Table(path, [])
    for number, row in rows:
        try:
            table.rows.append((number, dict(read_object(row) if isinstance(row, str) else row)))
        except (ValueError, TypeError) as error:
            report.add("line not readable", f"{path.name}:{number}", str(error))
    table.columns = list(dict.fromkeys(name for _, row in table.rows for name in row))
    return table
