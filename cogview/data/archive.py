"""The files of a zip or a tar, gzip-compressed or not, as it was downloaded: read in its order, never unpacked to disk.

An archive may be damaged, or be made to do harm: members that are links, encrypted, damaged or named to lie elsewhere
are told and left out, none is read beyond a limit, and an archive that grows out of all proportion is refused.
"""

import gzip
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from cogview.config import require
from cogview.data.folder import hidden, spellings
from cogview.data.images import EXTENSIONS, MAX_BYTES, TooLarge
from cogview.data.report import Report, printable
from cogview.data.tar_members import Problem, compressed, members

TIMES, ALWAYS = 100, 1 << 30  # as large as an archive its members may be together, and bytes that they always may
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, gzip.BadGzipFile)
_CHUNK = 1 << 20


class Damaged(ValueError):
    """A member of which not all can be read."""


class Archive:
    """names: of all regular files, in their order in the archive, hidden ones left out."""

    def __init__(self, path: Path, report: Report, option: str, *more: str):
        """ValueError, of the option that named it, for what is no archive. more: folders in it where the names of
        tables are looked for, too."""
        self._path, self._option = path, option
        self._most = max(ALWAYS, TIMES * path.stat().st_size)
        self._found: dict[str, Any] = {}  # a member of a zip, or offset and size in a tar
        with open(path, "rb") as file:
            start = file.read(2)
        kinds: dict[bytes, Callable[[Path], Any]] = {b"PK": self._whole_zip, b"\x1f\x8b": gzip.open}
        self._file = kinds.get(start, _plain)(path)
        try:
            total = self._of_zip(report) if start == b"PK" else self._of_tar(report)
            require(total <= self._most, option, f"an archive of at most {self._most:,} bytes unpacked", f"{total:,}")
        except BaseException:
            self.close()
            raise
        self.names = list(self._found)
        pictures = [os.path.dirname(n) for n in self.names if os.path.splitext(n)[1][1:].lower() in EXTENSIONS]
        below = list(filter(None, pictures))
        self._folders = ("", *more, os.path.commonpath(below) if below else "")

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def place(self, name: str) -> str:
        """The member of this name at the top, in one of the further folders, or in the one that holds all pictures but
        those at the top; OSError if there is none."""
        for folder in self._folders:
            for spelling in spellings(name):
                if (found := os.path.normpath(os.path.join(folder, spelling))) in self._found:
                    return found
        if _escapes(name):
            raise PermissionError(f"{printable(name)} is not in the archive")
        raise FileNotFoundError(f"{printable(name)}")

    def contents(self, name: str, limit: int = MAX_BYTES) -> Callable[[], bytes]:
        """Reads a member, fastest in the order of `names`, and returns what gives its bytes in any thread, or says why
        there are none: TooLarge, Damaged or OSError."""
        try:
            data = self._read(self._found[name], limit)
        except (ValueError, OSError) as error:
            failed = error  # which outlives this

            def fail() -> bytes:
                raise failed

            return fail
        return lambda: data

    def _read(self, member: Any, limit: int) -> bytes:
        size = member.file_size if isinstance(member, zipfile.ZipInfo) else member[1]
        if size > limit:
            raise TooLarge(f"expected at most {limit} bytes, got {size}")
        try:
            if isinstance(member, zipfile.ZipInfo):
                with self._file.open(member) as file:
                    return file.read(limit + 1)  # beyond its end, so that its checksum is looked at
            self._file.seek(member[0])
            return self._file.read(size)
        except _DAMAGE as error:
            raise Damaged(str(error) or "it ends too soon") from error

    def _whole_zip(self, path: Path) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(path)
        except (*_DAMAGE, UnicodeDecodeError, IndexError, OverflowError, struct.error) as error:  # of its directory
            raise ValueError(f"{self._option}: {str(path)!r} is no whole zip ({error})") from error

    def _of_zip(self, report: Report) -> int:
        for member in sorted(self._file.infolist(), key=lambda member: member.header_offset):
            kind = stat.S_IFMT(member.external_attr >> 16)
            if not member.filename:
                report.add("member without a name", printable(self._path.name))
                continue
            if member.is_dir():
                continue
            if kind not in (0, stat.S_IFREG):
                what = "symbolic link" if kind == stat.S_IFLNK else "device"
                report.add("not a regular file", printable(member.filename), what)
            elif member.flag_bits & 1:
                report.add("encrypted member", printable(member.filename))
            else:
                self._add(member.filename, member, report)
        return sum(member.file_size for member in self._found.values())

    def _of_tar(self, report: Report) -> int:
        packed = isinstance(self._file, gzip.GzipFile)
        end = self._end(report) if packed else self._path.stat().st_size
        if end > self._most:
            return end
        problems: list[Problem] = []
        for name, offset, size in members(self._file, end, problems):
            self._add(name, (offset, size), report)
        if not self._found:
            how = problems[0][0] if problems else "nothing in it"
            if packed:
                how = f"compressed with gzip, of which {end:,} bytes could be read"
            else:
                how = compressed(self._file) or how
            wanted = "expected a zip, a tar or a tar.gz with files"
            raise ValueError(f"{self._option}: {wanted}, got {str(self._path)!r} ({how})")
        for problem in problems:
            report.add(*problem)
        return end

    def _end(self, report: Report) -> int:
        """Bytes of what was compressed, as far as it can be read; where it is too much, a little more than that."""
        end = 0
        try:
            while end <= self._most and (part := self._file.read1(_CHUNK)):
                end += len(part)
        except _DAMAGE as error:
            report.add("compressed file damaged", printable(self._path.name), str(error))
        return end

    def _add(self, name: str, member: Any, report: Report) -> None:
        plain = os.path.normpath(name)
        if _escapes(name):
            report.add("member named to lie elsewhere", printable(name))
        elif plain in self._found:
            report.add("member of a name that was there", printable(name))
        elif not any(map(hidden, plain.split("/"))):
            self._found[plain] = member


def _plain(path: Path) -> BinaryIO:
    return open(path, "rb")


def _escapes(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", name) is not None
