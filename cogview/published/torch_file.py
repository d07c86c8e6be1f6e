"""Files of torch.save, of both its formats, read without running anything that they name.

Tensors are parts of the mapped file: read from the disk where they are used, never all held.
"""

import io
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.data.files import written_beside
from cogview.data.report import printable
from cogview.published.inert import Storage, Stored, Unpickler

MAX_PICKLE_BYTES = 4 << 20  # of 48 layers they have some hundred thousand
_LEGACY = 0x1950A86A20F9469CFC6C, 1001  # magic number and version of the format before zip files


def save(content: dict[str, Any], path: Path) -> None:
    """As torch.save, never half of it; OSError in one sentence when it cannot."""
    try:
        with written_beside(path) as beside, beside.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # a full disk comes as either
        raise OSError(f"cannot write {path}: {error}") from error


def all_finite(x: Tensor) -> bool:
    """Of at least one value; in a tenth of isfinite's time."""
    return all(bool(end.isfinite()) for end in torch.aminmax(x))


class TorchFile:
    """`content` is what was saved, with `Stored` in place of tensors; `tensor(stored)` is one of them.

    ValueError in one sentence where the file is not whole or of another kind, OSError where it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        self.bytes = path.stat().st_size
        try:
            with path.open("rb") as file:
                zipped = file.read(4) == b"PK\3\4"
                file.seek(0)
                self.content = self._unzipped(file) if zipped else self._legacy(file)
        except OSError:
            raise
        except Exception as error:  # a pickle can fail in every way
            said = printable(str(error), 200) or type(error).__name__
            raise ValueError(f"{path} is no whole file of torch.save: {said}") from error

    def _unzipped(self, file: Any) -> Any:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
        found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("expected one data.pkl in it, which other zip files have not")
        folder = found[0].removesuffix("data.pkl")

        def place(name: str) -> tuple[int, int]:
            """Where a member's bytes begin, and how many they are."""
            info = members[name]
            file.seek(info.header_offset)
            header = file.read(30)
            name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
            begin = info.header_offset + 30 + name_bytes + extra_bytes
            if header[:4] != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is packed, or not where the archive says")
            if begin + info.file_size > self.bytes:
                raise ValueError(f"{name} ends behind the end of the file")
            return begin, info.file_size

        def content(name: str) -> bytes:
            begin, count = place(name)
            if count > MAX_PICKLE_BYTES:
                raise ValueError(f"{name} has {count:,} bytes, at most {MAX_PICKLE_BYTES:,} are read")
            file.seek(begin)
            return file.read(count)

        if f"{folder}byteorder" in members and content(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        unpickler = Unpickler(io.BytesIO(content(found[0])))
        root = unpickler.load()
        for key, storage in unpickler.storages.items():
            if (name := f"{folder}data/{key}") not in members:
                raise ValueError(f"{name} is missing")
            storage.offset, count = place(name)
            if count < storage.count * storage.dtype.itemsize:
                raise ValueError(f"{name} has {count:,} bytes, fewer than its tensors")
        return root

    def _legacy(self, file: Any) -> Any:
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        if tuple(Unpickler(head).load() for _ in range(2)) != _LEGACY:
            raise ValueError("it does not begin as one")
        if not Unpickler(head).load()["little_endian"]:
            raise ValueError("its numbers are not little-endian")
        unpickler = Unpickler(head)
        root, order = unpickler.load(), Unpickler(head).load()
        file.seek(head.tell())
        if sorted(order) != sorted(unpickler.storages):
            raise ValueError("its list of tensors is another one than its tensors")
        for storage in map(unpickler.storages.__getitem__, order):
            (count,) = struct.unpack("<q", file.read(8))
            storage.offset = file.tell()
            end = file.seek(storage.count * storage.dtype.itemsize, io.SEEK_CUR)
            if count != storage.count or end > self.bytes:
                raise ValueError("its tensors are not where they should be")
        return root

    @cached_property
    def _mapped(self) -> Tensor:
        return torch.from_file(str(self.path), shared=False, size=self.bytes, dtype=torch.uint8)

    def tensor(self, stored: Stored, name: str) -> Tensor:
        """The tensor that `name` has in errors; a view of the file where it lies on whole elements there."""
        if len(stored.described) < 4 or not isinstance(stored.described[0], Storage):
            raise ValueError(f"{self.path}: {name} is not described as a tensor")
        storage, offset, size, stride = stored.described[:4]
        lists = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not lists or not all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *size, *stride)):
            raise ValueError(f"{self.path}: {name} has no proper shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if count > storage.count or (count and last >= storage.count):
            raise ValueError(f"{self.path}: {name} is larger than what is stored of it")
        begin = storage.offset
        flat = self._mapped[begin : begin + storage.count * storage.dtype.itemsize]
        if begin % storage.dtype.itemsize:
            flat = flat.clone()
        flat = flat.view(storage.dtype)
        return flat.as_strided(size, stride, flat.storage_offset() + offset)

    def weights(self, stored: Stored, name: str) -> Tensor:
        """A tensor of finite floating-point values."""
        found = self.tensor(stored, name)
        if not found.is_floating_point() or not found.numel() or not all_finite(found):
            raise ValueError(f"{self.path}: {name}: expected finite floating-point values, got others")
        return found

    def all_of(self, wanted: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> dict[str, Tensor]:
        """Weights by name: `stored`, whose names and shapes are to be those of `wanted`."""
        found = {}
        for name in sorted(wanted.keys() | stored.keys()):
            expected = list(wanted[name].shape) if name in wanted else "absent"
            got = stored[name].shape if name in stored else "absent"
            if expected != got:
                raise ValueError(f"{self.path}: {name}: expected {expected}, got {got}")
            found[name] = self.weights(stored[name], name)
        return found

    def named(self, tensors: Any, what: str) -> dict[str, Stored]:
        """Tensors by name, of what is said to be so; ValueError calls it `what`."""
        if not isinstance(tensors, dict):
            raise ValueError(f"{self.path}: {what}: expected tensors by name, got none")
        for name, value in tensors.items():
            if type(name) is not str or not re.fullmatch(r"[\w.]{1,200}", name) or not isinstance(value, Stored):
                raise ValueError(f"{self.path}: {what}: expected tensors by name, got {printable(repr(name), 100)}")
        return tensors
