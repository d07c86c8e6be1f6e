"""The members of a tar that may be damaged: their headers, one after the other, and nothing else of the file."""

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from cogview.data.report import printable

BLOCK = tarfile.BLOCKSIZE
_MAX_NAME = 1 << 16
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_AHEAD = (*_PAX, tarfile.GNUTYPE_LONGNAME)  # headers that say something of the member behind them
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_SILENT = (tarfile.XGLTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_LONGLINK)
_LINKS = {tarfile.SYMTYPE: "symbolic link", tarfile.LNKTYPE: "hard link", tarfile.GNUTYPE_SPARSE: "sparse file"}
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\3\4": ("zip", "unzip"),
    b"7z\xbc\xaf": ("7z", "unpack"),
}

Problem = tuple[str, str, str]  # kind, name, detail


def compressed(file: BinaryIO) -> str | None:
    """What a file is that was compressed, and what to do: "compressed with gzip: gunzip it"."""
    file.seek(0)
    start = file.read(8)
    found = next((how for magic, how in _PACKED.items() if start.startswith(magic)), None)
    return found and f"compressed with {found[0]}: {found[1]} it"


def members(file: BinaryIO, end: int, problems: list[Problem]) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file that lies whole in the tar of `end` bytes.

    Goes on behind damaged blocks, and behind the end of a tar where another one was appended (cat a.tar b.tar); what is
    damaged, cut off or no regular file is added to `problems`.
    """
    position, said, damaged, ended = 0, dict[str, str](), False, False
    while position + BLOCK <= end:
        file.seek(position)
        block = file.read(BLOCK)
        position += BLOCK
        if (damaged or ended) and block[257:262] != b"ustar":
            continue  # look for the next header
        if ended := block == bytes(BLOCK):
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not damaged:
                problems.append(("damaged header", f"byte {position - BLOCK}", ""))
            damaged = True
            continue
        damaged = False
        name, size = said.get("path", header.name), header.size
        if header.type in _FILES and re.fullmatch(r"[0-9]{1,18}", said.get("size", "")):
            size = int(said["size"])  # of 8 GiB and more
        more = header.type == tarfile.GNUTYPE_SPARSE and block[482]
        while more:  # blocks with further pieces of a sparse file
            block = file.read(BLOCK)
            position += BLOCK
            more = len(block) == BLOCK and block[504]
        offset, position = position, position + -(-size // BLOCK) * BLOCK
        if size < 0 or offset + size > end:
            problems.append(("truncated member", printable(name), f"{size} bytes"))
            position = offset
            damaged = True
            said = {}
        elif header.type in _AHEAD:
            if size > _MAX_NAME:
                problems.append(("oversized name", f"byte {offset}", f"{size} bytes"))
            elif header.type in _PAX:
                said |= _records(file.read(size))
            else:
                said["path"] = file.read(size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type in _SILENT:
            if header.type == tarfile.DIRTYPE:
                said = {}
        else:
            if header.type not in _FILES or "GNU.sparse" in said:
                detail = _LINKS.get(header.type, "sparse file" if "GNU.sparse" in said else "device")
                problems.append(("not a regular file", printable(said.get("GNU.sparse", name)), detail))
            else:
                yield name, offset, size
            said = {}
    if not ended:
        problems.append(("truncated tar", f"byte {end}", "no end mark"))


def _records(contents: bytes) -> dict[str, str]:
    """`path` and `size` of a PAX header ("17 path=...\\n"), and the name of a sparse file as `GNU.sparse`."""
    found: dict[str, str] = {}
    while contents:
        length, _, _ = contents.partition(b" ")
        if not re.fullmatch(rb"[0-9]{1,9}", length) or not len(length) < int(length) <= len(contents):
            break
        record, contents = contents[: int(length)], contents[int(length) :]
        keyword, _, value = record[len(length) + 1 :].rstrip(b"\n").partition(b"=")
        if keyword in (b"path", b"size"):
            found[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        elif keyword.startswith(b"GNU.sparse."):
            found.setdefault("GNU.sparse", "sparse file")
            if keyword == b"GNU.sparse.name":
                found["GNU.sparse"] = value.decode("utf-8", "surrogateescape")
    return found
