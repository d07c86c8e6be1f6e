"""Which pictures of a folder or an archive have which captions: by a table, or files beside them. Decodes nothing."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cogview.data.archive import Archive
from cogview.data.captions import BLANK, INVALID, NO_TEXT, clean, none_in, read_captions, texts_of
from cogview.data.folder import Folder
from cogview.data.images import EXTENSIONS, TooLarge
from cogview.data.report import Report, printable
from cogview.data.samples import OTHER_PICTURES
from cogview.data.shards import MAX_CAPTION_BYTES
from cogview.data.tables import EXTENSIONS_OF_TABLES, MAX_TABLE_BYTES, read_table, table_contents

_PICTURES = {*EXTENSIONS, *OTHER_PICTURES}
NOTHING = ("NaN", "nan", "<NA>", "None", "NULL", "null", "#N/A")  # a cell that is empty, as pandas and others write it
_SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that is no UTF-8
_CALLED = re.compile(r"caption|^metadata\.(jsonl|csv)$", re.IGNORECASE)
TOO_LARGE = "caption too large"
MISSING, OUTSIDE, NO_CAPTION = "missing file", "outside the folder", "picture without caption"


class TableFile(NamedTuple):
    path: Path
    """Of a file, or "some.zip:captions.json"."""
    data: bytes
    archive: Path | None = None
    """That it is in."""
    member: str = ""


@dataclass
class Source:
    number: int
    name: str
    """Of the picture, in its folder or archive, with slashes."""
    captions: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, text: str) -> None:
        """A second caption of a name becomes "name.2", a third "name.3"; the same text again is left out."""
        name = "name.caption" if name == "name" else name  # "name" is that of the picture
        same = [k for k in self.captions if k == name or k.startswith(f"{name}.")]
        if text not in [self.captions[k] for k in same]:
            self.captions[f"{name}.{len(same) + 1}" if same else name] = text


def beside_pictures(folder: Folder, languages: Sequence[str], report: Report) -> list[Source]:
    """The pictures at any depth, in the order of their names, with captions from the .txt and .json named like them."""
    names, sources = folder.names, list[Source]()
    there = {(stem, extension.lower()): stem + extension for stem, extension in map(os.path.splitext, names)}
    for name in filter(_is_picture, names):
        stems = [os.path.splitext(name)[0], name]  # a.txt, or a.jpg.txt
        try:
            folder.place(name)
            beside = (next((there[s, e] for s in stems if (s, e) in there), None) for e in (".json", ".txt"))
            as_json, as_text = (None if other is None else _small(folder, other) for other in beside)
        except OSError as error:
            report.add(_kind(error), printable(name), str(error))
            continue
        captions = read_captions(as_json, as_text, languages)
        source = Source(len(sources), name)
        for language, text in captions.found.items():
            source.add(re.sub(r"\.(json|[0-9]+)$", "", language), text)
        for kind, detail in captions.problems:
            report.add(kind, printable(name), detail)
        if source.captions:
            sources.append(source)
        else:
            some = as_json is not None or as_text is not None
            report.add(
                NO_CAPTION, printable(name), none_in(captions, languages) if some else "no .txt or .json beside it"
            )
    return sources


def called(files: Folder | Archive, caption: str, report: Report) -> list[Source]:
    """All pictures at any depth, of a folder in the order of their names, of an archive in its own, with one
    caption."""
    sources = list[Source]()
    for name in filter(_is_picture, files.names):
        try:
            sources.append(Source(len(sources), files.place(name), {"caption": caption}))
        except OSError as error:
            report.add(_kind(error), printable(name), str(error))
    return sources


def from_table(
    files: Folder | Archive,
    table: TableFile,
    image_column: str | None,
    caption_columns: Sequence[str],
    report: Report,
) -> list[Source]:
    """The pictures that a table names, with the captions of all their rows: of a folder in the order of their first
    rows, of an archive in its own."""
    found, named, names = dict[str, Source](), set[str](), _Names(files)
    rows = read_table(table.path, table.data, report, image_column, names.has)
    image, columns = rows.image_column(image_column), rows.caption_columns(caption_columns)
    for line, row in rows.rows:
        where, name = f"{rows.name}:{line}", row.get(image)
        if not isinstance(name, str) or not name.strip() or name in NOTHING:
            report.add("row without a picture's name", where)
            continue
        named.add(os.path.normpath(name.strip()))
        try:
            key = names.find(name.strip())
        except OSError as error:
            report.add(_kind(error), where, f"{error}; {rows.not_utf8}" if _SURROGATE.search(name) else str(error))
            continue
        source = found.setdefault(key, Source(len(found), key))
        _take(source, row, columns, where, report, rows.not_utf8)
    for source in found.values():
        if not source.captions:
            report.add(NO_CAPTION, printable(source.name), f"in {rows.name}")
    for name in names.all:
        if name not in found and name not in named:
            report.add("picture that the table does not name", printable(name), rows.name)
    ordered = found if isinstance(files, Folder) else filter(found.__contains__, files.names)
    return [found[name] for name in ordered if found[name].captions]


def tables_in(folder: Path, image_column: str | None, caption_columns: Sequence[str]) -> list[Path]:
    """The tables in a folder that have the columns, and rows; not the files beside pictures."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = {part for name in names if _is_picture(name) for part in (name, os.path.splitext(name)[0])}
    found = []
    for name in names:
        if os.path.splitext(name)[1].lower() in EXTENSIONS_OF_TABLES and os.path.splitext(name)[0] not in pictures:
            try:
                data = table_contents(folder / name)
                table = read_table(folder / name, data, Report(), image_column, lambda name: False)
                table.image_column(image_column), table.caption_columns(caption_columns)
            except (ValueError, OSError):
                continue
            found += [folder / name] * bool(table.rows)
    return found


def table_of(captions: Path) -> TableFile:
    """A table: a file, or in an archive what is named behind a colon, "some.zip:captions.json",
    and without that the only table there; those that are called captions or metadata go before others."""
    path, member = captions, ""
    if not captions.is_file() and ":" in str(captions):
        before, _, member = str(captions).rpartition(":")
        path = Path(before)
    if not member and path.suffix.lower() not in (".zip", ".tar", ".tgz", ".gz"):
        return TableFile(path, table_contents(path))
    if not path.is_file():
        raise ValueError(f"captions: expected a file, got {str(captions)!r}")
    with Archive(path, Report(), "captions") as archive:
        name = _table_among(archive.names, member, path)
        try:
            return TableFile(Path(f"{path}:{name}"), archive.contents(name, MAX_TABLE_BYTES)(), path, name)
        except ValueError as error:
            raise ValueError(f"captions: {printable(name)} of {str(path)!r} cannot be read ({error})") from error


def _table_among(names: Sequence[str], member: str, path: Path) -> str:
    pictures = {part for name in names if _is_picture(name) for part in (name, os.path.splitext(name)[0])}
    parts = [(name, *os.path.splitext(name)) for name in names]
    tables = [n for n, stem, kind in parts if kind.lower() in EXTENSIONS_OF_TABLES and stem not in pictures]
    found = [n for n in tables if (n == member if member else _CALLED.search(os.path.basename(n)))]
    found = found or ([] if member else tables)
    if len(found) == 1:
        return found[0]
    there = ", ".join(printable(name, 60) for name in (found or tables)[:10]) or "none"
    wanted = f"the table {printable(member)!r}" if member else "one table"
    raise ValueError(f"captions: expected {wanted} in {str(path)!r}, got {there}; --captions {path}:NAME says which")


class _Names:
    """The pictures of a folder or an archive, found by names that people write down."""

    def __init__(self, files: Folder | Archive):
        self.all, self._files = list(filter(_is_picture, files.names)), files
        self._alike, self._elsewhere = dict[str, list[str]](), dict[str, list[str]]()
        for name in self.all:
            self._elsewhere.setdefault(os.path.basename(_folded(name)), []).append(name)
            for spelling in dict.fromkeys((name, os.path.splitext(name)[0])):
                self._alike.setdefault(_folded(spelling), []).append(name)

    def has(self, name: str) -> bool:
        try:
            return bool(self.find(name))
        except OSError:
            return False

    def find(self, name: str) -> str:
        """The real name: that of the name as it is, else of the only one of other case or without extension."""
        try:
            return self._files.place(name)
        except FileNotFoundError as error:
            alike = self._alike.get(_folded(name), [])
            if len(alike) == 1:
                return self._files.place(alike[0])
            alike = alike or self._alike.get(_folded(os.path.splitext(name)[0]), [])
            alike = alike or self._elsewhere.get(os.path.basename(_folded(name)), [])
            if not alike:
                raise
            there = " and ".join(printable(other, 60) for other in alike[:3])
            raise FileNotFoundError(f"{printable(name)}; there is {there}") from error


def _folded(name: str) -> str:
    name = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
    return os.path.normpath(name)


def _take(
    source: Source, row: Mapping[str, Any], columns: Mapping[str, str], where: str, report: Report, not_utf8: str
) -> None:
    for column, name in columns.items():
        if (value := row.get(column)) in (None, ""):
            continue  # a cell that is empty is a caption that is not there
        for place, one in texts_of(column, value):
            try:
                if one in NOTHING or one != one:
                    report.add(BLANK, where, f"{place}: {one}")
                elif not (text := clean(one)):
                    report.add(BLANK, where, place)
                elif len(text.encode()) > MAX_CAPTION_BYTES // 8:
                    report.add(TOO_LARGE, where, f"{place}: {len(text):,} characters")
                else:
                    source.add(name, text)
            except TypeError as error:
                report.add(NO_TEXT, where, f"{place}: {error}")
            except ValueError as error:
                report.add(INVALID, where, f"{place}: {not_utf8 if not_utf8 and _SURROGATE.search(one) else error}")


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in _PICTURES


def _small(folder: Folder, name: str) -> bytes:
    try:
        return folder.contents(folder.place(name), MAX_CAPTION_BYTES)()
    except TooLarge as error:
        raise OSError(f"{printable(name)}: {error}") from error


def _kind(error: OSError) -> str:
    return {FileNotFoundError: MISSING, PermissionError: OUTSIDE}.get(type(error), "file not readable")
