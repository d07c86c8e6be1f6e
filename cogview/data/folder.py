"""The files of a folder, by their names in it; whatever leads out of it is none."""

import os
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cogview.data.images import MAX_BYTES, TooLarge
from cogview.data.report import Report, printable


class Folder:
    """names: of all files at any depth, sorted, with slashes, hidden ones left out."""

    def __init__(self, path: Path, report: Report, *more: Path):
        """more: where the names of tables are looked for, too. Links to folders are told, not followed."""
        self.root, self._folders = path.resolve(), (path.resolve(), *more)
        self.names = self._listed(report)

    def place(self, name: str) -> str:
        """The real name of a file, by one in the folder or in one of the further ones; OSError if there is none."""
        outside = False
        for folder in self._folders:
            for spelling in spellings(name):
                try:
                    path = (folder / spelling).resolve()
                    inside = path.is_relative_to(self.root)
                    if inside and path.is_file():
                        return path.relative_to(self.root).as_posix()
                    outside |= not inside and folder == self.root
                except (OSError, ValueError, RuntimeError):  # no name at all: too long, NUL, links in a ring
                    continue
        if outside:
            raise PermissionError(f"{printable(name)} is not in the folder, or a link out of it")
        raise FileNotFoundError(f"{printable(name)}")

    def contents(self, name: str, limit: int = MAX_BYTES) -> Callable[[], bytes]:
        """What reads a file, in any thread; TooLarge where it has more bytes."""
        return partial(_read, self.root / name, limit)

    def _listed(self, report: Report) -> list[str]:
        names = []

        def unlisted(error: OSError) -> None:
            name = os.path.relpath(error.filename, self.root)
            report.add("folder not readable", printable(name), error.strerror or str(error))

        for folder, below, files in os.walk(self.root, onerror=unlisted):
            below[:] = [name for name in below if not hidden(name)]
            for name in sorted(below):
                if os.path.islink(os.path.join(folder, name)):
                    where = printable(os.path.relpath(os.path.join(folder, name), self.root))
                    report.add("link to a folder, not followed", where)
            names += [os.path.relpath(os.path.join(folder, name), self.root) for name in files if name[0] != "."]
        return sorted(Path(name).as_posix() for name in names)


def hidden(folder: str) -> bool:
    return folder.startswith(".") or folder == "__MACOSX"


def spellings(name: str) -> list[str]:
    """A name, and the same as other systems write it."""
    others = (name.replace("\\", "/"), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    return list(dict.fromkeys((name, *others)))


def _read(path: Path, limit: int) -> bytes:
    if (size := path.stat().st_size) > limit:
        raise TooLarge(f"expected at most {limit} bytes, got {size}")
    return path.read_bytes()
