"""Tables of captions: CSV and TSV with a header, JSON lines, or a JSON list of objects."""

import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogview.data.captions import decoded, read_object
from cogview.data.csv_rows import delimiter_of, rows_of
from cogview.data.report import Report, printable

IMAGE_COLUMNS: tuple[str, ...] = ("file_name", "filename", "image", "path", "file", "image_path", "filepath")
IMAGE_COLUMNS += ("file_path", "image_file", "image_name", "image_filename", "img", "img_path", "img_name", "img_file")
IMAGE_COLUMNS += ("picture", "photo")
TEXT_COLUMNS: tuple[str, ...] = ("caption", "text", "captions", "description", "prompt")  # the first one that is there
TEXT_COLUMNS += ("caption_text", "alt_text", "sentence", "comment")
LANGUAGE_COLUMNS = ("en", "zh")
MAX_TABLE_BYTES = 1 << 30
_JSON, _CSV = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv", ".txt")
EXTENSIONS_OF_TABLES = _CSV + _JSON


@dataclass
class Table:
    path: Path
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # by the number of their line
    not_utf8: str = ""
    """A sentence, if it is not."""

    @property
    def name(self) -> str:
        """As it can be shown."""
        return printable(self.path.name)

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
        there = {re.sub("[ -]", "_", column.lower()): column for column in reversed(self.columns)}
        return [self._once(there[name]) for name in names if name in there]

    def _given(self, option: str, name: str) -> str:
        if name not in self.columns:
            raise ValueError(f"{option}: expected a column of {self.name} ({self._list()}), got {name!r}")
        return self._once(name)

    def _once(self, name: str) -> str:
        if self.columns.count(name) > 1:
            raise ValueError(f"captions: {self.name} has several columns {name!r}; rename all but one")
        return name

    def _lacks(self, what: str, usual: Sequence[str], option: str) -> ValueError:
        return ValueError(
            f"captions: expected a column with {what} in {self.name} ({', '.join(usual)}), "
            f"got columns {self._list()}; {option} names another{self.not_utf8 and '; '}{self.not_utf8}"
        )

    def _list(self) -> str:
        return ", ".join(printable(column, 40) for column in self.columns[:20]) or "none"


def table_contents(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"captions: expected a file, got {str(path)!r}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"captions: expected at most {MAX_TABLE_BYTES} bytes, got {path.stat().st_size}")
    return path.read_bytes()


def read_table(
    path: Path, data: bytes, report: Report, image_column: str | None, is_there: Callable[[str], bool]
) -> Table:
    """The rows of a table of captions. What is no UTF-8 becomes lone surrogates; damaged rows go to `report`.

    path, data: its name and what is in it. image_column: if it is none of the usual. is_there: whether there is a
    picture of a name.
    """
    kind = path.suffix.lower()
    if kind not in _JSON + _CSV:
        raise ValueError(f"captions: expected {', '.join(_CSV + _JSON)}, got {path.name!r}")
    limit = csv.field_size_limit(MAX_TABLE_BYTES)  # of this process
    try:
        text = decoded(data)
        table = Table(path, not_utf8=_not_utf8(path, text))
        if kind in _CSV:
            _of_csv(table, text, report, image_column, is_there)
        else:
            _of_json(table, text, report)
        return table
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"captions: {printable(path.name)} is not readable ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _not_utf8(path: Path, text: str) -> str:
    """Where a text that has surrogates for bytes which are no UTF-8 has the first, and what to do; else ""."""
    name = printable(path.name)
    if "\0" in text[:100]:
        how = f"iconv -f UTF-16LE -t UTF-8 {shlex.quote(name)} > utf8{path.suffix}"
        return f"{name} is not UTF-8 (NUL in line 1, as in UTF-16); {how}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte, before = ord(text[error.start]) - 0xDC00, text[: error.start]
        line = len(io.StringIO(before + ".", newline="").readlines())
        place = len(re.split("[\r\n]", before)[-1].encode()) + 1
        how = f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(name)} > utf8{path.suffix}"
        how += ", or -f WINDOWS-1251, GB18030, SHIFT_JIS"
        return f"{name} is not UTF-8 (line {line}, byte {place}: 0x{byte:02x}); {how}"
    return ""


def _of_csv(table: Table, text: str, report: Report, image_column: str | None, is_there: Callable[[str], bool]) -> None:
    delimiter, text = delimiter_of(text)
    place = 0

    def whole(cells: list[str]) -> bool:
        return len(cells) == len(table.columns) and is_there(cells[place].strip())

    def open_quote(line: int, row: list[str]) -> None:
        detail = f"in the row of {printable(row[place], 60) if place < len(row) else '?'}; the lines behind it are rows"
        report.add("quote not closed", f"{table.name}:{line}", detail)

    for number, row in rows_of(text, delimiter, whole, open_quote):
        if not table.columns:
            table.columns = [name.strip() for name in row]
            place = table.columns.index(table.image_column(image_column))
        elif any(cell.strip() for cell in row[len(table.columns) :]):
            detail = f"expected {len(table.columns)}, got {len(row)}; a text with {delimiter!r} needs quotes"
            report.add("row with too many fields", f"{table.name}:{number}", detail)
        else:
            table.rows.append((number, dict(zip(table.columns, row, strict=False))))


def _of_json(table: Table, text: str, report: Report) -> None:
    path = table.path
    rows: Iterable[tuple[int, Any]]
    whole = _whole_json(path, text) if path.suffix.lower() == ".json" else None
    if whole is None:
        rows = [(number, line) for number, line in enumerate(io.StringIO(text, newline=""), 1) if line.strip()]
    else:
        rows = list(enumerate(whole, 1))
    for number, row in rows:
        try:
            table.rows.append((number, dict(read_object(row) if isinstance(row, str) else row)))
        except (ValueError, TypeError) as error:
            report.add("line not readable", f"{table.name}:{number}", str(error))
    table.columns = list(dict.fromkeys(name for _, row in table.rows for name in row))


def _whole_json(path: Path, text: str) -> list[Any] | None:
    """The rows of a file that is one JSON value: a list, or COCO's images and annotations; None if it is lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"captions: {printable(path.name)} is not JSON ({error})") from error
        return None
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not {"images", "annotations"} <= value.keys():
        return [value]
    try:
        names = {image["id"]: image["file_name"] for image in value["images"]}
        rows = [{"file_name": names.get(one["image_id"]), "caption": one["caption"]} for one in value["annotations"]]
    except (KeyError, TypeError) as error:
        what = "expected images of id and file_name, annotations of image_id and caption"
        raise ValueError(f"captions: {printable(path.name)} is COCO's, but not of captions ({what})") from error
    return rows
