"""Which pictures of a folder have which captions: by a table, or by files beside them. Decodes nothing."""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogview.data.captions import BLANK, INVALID, NO_TEXT, clean, none_in, read_captions, texts_of
from cogview.data.images import EXTENSIONS
from cogview.data.report import Report, printable
from cogview.data.samples import OTHER_PICTURES
from cogview.data.shards import MAX_CAPTION_BYTES
from cogview.data.tables import EXTENSIONS_OF_TABLES, read_table

_PICTURES = {*EXTENSIONS, *OTHER_PICTURES}
NOTHING = ("NaN", "nan", "<NA>", "None", "NULL", "null", "#N/A")  # a cell that is empty, as pandas and others write it
_SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that is no UTF-8
TOO_LARGE = "caption too large"
MISSING, OUTSIDE, NO_CAPTION = "missing file", "outside the folder", "picture without caption"


@dataclass
class Source:
    number: int
    name: str
    """Of the picture, relative to the folder, with slashes."""
    path: Path
    captions: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, text: str) -> None:
        """A second caption of a name becomes "name.2", a third "name.3"; the same text again is left out."""
        name = "name.caption" if name == "name" else name  # "name" is that of the picture
        same = [k for k in self.captions if k == name or k.startswith(f"{name}.")]
        if text not in [self.captions[k] for k in same]:
            self.captions[f"{name}.{len(same) + 1}" if same else name] = text


def beside_pictures(folder: Path, languages: Sequence[str], report: Report) -> list[Source]:
    """The pictures at any depth, in the order of their names, with captions from the .txt and .json named like them."""
    root, sources = folder.resolve(), list[Source]()
    names = _files(root, report)
    there = {(stem, extension.lower()): stem + extension for stem, extension in map(os.path.splitext, names)}
    for name in filter(_is_picture, names):
        stems = [os.path.splitext(name)[0], name]  # a.txt, or a.jpg.txt
        try:
            path = _place(name, root)
            as_json, as_text = (
                _contents(next((there[s, e] for s in stems if (s, e) in there), None), root) for e in (".json", ".txt")
            )
        except OSError as error:
            report.add(_kind(error), printable(name), str(error))
            continue
        captions = read_captions(as_json, as_text, languages)
        source = Source(len(sources), name, path)
        for language, text in captions.found.items():
            source.add(re.sub(r"\.(json|[0-9]+)$", "", language), text)
        for kind, detail in captions.problems:
            report.add(kind, printable(name), detail)
        if source.captions:
            sources.append(source)
        else:
            beside = as_json is not None or as_text is not None
            report.add(
                NO_CAPTION, printable(name), none_in(captions, languages) if beside else "no .txt or .json beside it"
            )
    return sources


def from_table(
    folder: Path, table: Path, image_column: str | None, caption_columns: Sequence[str], report: Report
) -> list[Source]:
    """The pictures that a table names, in the order of their first rows, with the captions of all their rows."""
    root, found, named = folder.resolve(), dict[str, Source](), set[str]()
    names = _Names(root, list(filter(_is_picture, _files(root, report))), table.resolve().parent)
    rows = read_table(table, report, image_column, names.has)
    image, columns = rows.image_column(image_column), rows.caption_columns(caption_columns)
    for line, row in rows.rows:
        where, name = f"{table.name}:{line}", row.get(image)
        if not isinstance(name, str) or not name.strip() or name in NOTHING:
            report.add("row without a picture's name", where)
            continue
        named.add(os.path.normpath(name.strip()))
        try:
            path = names.find(name.strip())
        except OSError as error:
            report.add(_kind(error), where, f"{error}; {rows.not_utf8}" if _SURROGATE.search(name) else str(error))
            continue
        key = path.relative_to(root).as_posix()
        source = found.setdefault(key, Source(len(found), key, path))
        _take(source, row, columns, where, report, rows.not_utf8)
    for source in found.values():
        if not source.captions:
            report.add(NO_CAPTION, printable(source.name), f"in {table.name}")
    for name in names.all:
        if name not in found and name not in named:
            report.add("picture that the table does not name", printable(name), table.name)
    return [source for source in found.values() if source.captions]


def tables_in(folder: Path, image_column: str | None, caption_columns: Sequence[str]) -> list[Path]:
    """The tables in a folder that have the columns, and rows; not the files beside pictures."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = {part for name in names if _is_picture(name) for part in (name, os.path.splitext(name)[0])}
    found = []
    for name in names:
        if os.path.splitext(name)[1].lower() in EXTENSIONS_OF_TABLES and os.path.splitext(name)[0] not in pictures:
            try:
                table = read_table(folder / name, Report(), image_column, lambda name: False)
                table.image_column(image_column), table.caption_columns(caption_columns)
            except (ValueError, OSError):
                continue
            found += [folder / name] * bool(table.rows)
    return found


class _Names:
    """The pictures of a folder, found by names that people write down."""

    def __init__(self, root: Path, names: list[str], *more: Path):
        self.all, self._folders = names, (root, *more)
        self._alike, self._elsewhere = dict[str, list[str]](), dict[str, list[str]]()
        for name in names:
            self._elsewhere.setdefault(os.path.basename(_folded(name)), []).append(name)
            for spelling in dict.fromkeys((name, os.path.splitext(name)[0])):
                self._alike.setdefault(_folded(spelling), []).append(name)

    def has(self, name: str) -> bool:
        try:
            return bool(self.find(name))
        except OSError:
            return False

    def find(self, name: str) -> Path:
        """The real path: of the name as it is, else of the only one of other case or without extension."""
        try:
            return _place(name, *self._folders)
        except FileNotFoundError as error:
            alike = self._alike.get(_folded(name), [])
            if len(alike) == 1:
                return _place(alike[0], self._folders[0])
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


def _files(root: Path, report: Report) -> list[str]:
    """Names of all files below a folder, sorted, hidden ones left out; links to folders are told, not followed."""
    names = []

    def unlisted(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        report.add("folder not readable", printable(name), error.strerror or str(error))

    for folder, below, files in os.walk(root, onerror=unlisted):
        below[:] = [name for name in below if not name.startswith(".") and name != "__MACOSX"]
        for name in sorted(below):
            if os.path.islink(os.path.join(folder, name)):
                report.add(
                    "link to a folder, not followed", printable(os.path.relpath(os.path.join(folder, name), root))
                )
        names += [os.path.relpath(os.path.join(folder, name), root) for name in files if not name.startswith(".")]
    return sorted(Path(name).as_posix() for name in names)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in _PICTURES


def _place(name: str, root: Path, *more: Path) -> Path:
    """The real path of a file in a folder, by a name in it or in one of `more`; OSError if there is none."""
    outside = False
    for folder in (root, *more):
        for spelling in dict.fromkeys(
            (name, name.replace("\\", "/"), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        ):
            try:
                path = (folder / spelling).resolve()
                inside = path.is_relative_to(root)
                if inside and path.is_file():
                    return path
                outside |= not inside and folder == root
            except (OSError, ValueError, RuntimeError):  # no name at all: too long, NUL, links in a ring
                continue
    if outside:
        raise PermissionError(f"{printable(name)} is not in the folder, or a link out of it")
    raise FileNotFoundError(f"{printable(name)}")


def _kind(error: OSError) -> str:
    return {FileNotFoundError: MISSING, PermissionError: OUTSIDE}.get(type(error), "file not readable")


def _contents(name: str | None, root: Path) -> bytes | None:
    if name is None:
        return None
    path = _place(name, root)
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise OSError(f"{printable(name)}: expected at most {MAX_CAPTION_BYTES} bytes, got {path.stat().st_size}")
    return path.read_bytes()
