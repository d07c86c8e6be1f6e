"""Files of torch.save, of both its formats, read without running anything that they name.

A pickle calls what it names. Here the names of tensors, their storages and OrderedDict stand for classes of this file
that only take notes, and every other name for `Inert`, which takes everything and does nothing: no code from outside
is looked up, imported or called. torch.load(weights_only=True) would be as safe, but refuses the random states and
trainer settings that released checkpoints have beside their weights. Tensors are parts of the mapped file: read from
the disk where they are used, never all held.
"""

import io
import math
import pickle
import struct
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.data.files import written_beside

MAX_PICKLE_BYTES = 64 << 20
_LEGACY = 0x1950A86A20F9469CFC6C, 1001  # magic number and version of the format before zip files
_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


class Inert:
    """What a name in a pickle stands for: can be made, called and filled in every way, and keeps nothing. What pickles
    get into their hands is of this kind altogether, so that none can give it attributes either."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __setstate__(*state: Any) -> None:  # called on the class itself as well
        pass

    __setitem__ = append = extend = add = __setstate__


class Mapping(dict):
    """OrderedDict without attributes."""

    def __setstate__(*state: Any) -> None:
        pass


class _Storage(Inert):
    """`count` elements from `offset` of the file on."""

    def __init__(self, dtype: torch.dtype, key: str, count: int):
        self.dtype, self.key, self.count, self.offset = dtype, key, count, -1


class _StorageType(Inert):
    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


class Stored(Inert):
    """A tensor as its pickle describes it: what torch's _rebuild_tensor_v2 would be called with, unchecked."""

    described: tuple[Any, ...] = ()

    def __init__(self, *described: Any, **more: Any):
        self.described = described

    @property
    def shape(self) -> list[int]:
        """[] also where there is no proper one, which `TorchFile.tensor` says."""
        size = self.described[2] if len(self.described) > 2 else ()
        return list(size) if isinstance(size, tuple) and all(type(n) is int for n in size) else []


class _Parameter(Inert):
    def __new__(cls, data: Any = None, *more: Any) -> Any:
        return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Mapping,
    ("torch._utils", "_rebuild_tensor_v2"): Stored,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
}


class _Unpickler(pickle._Unpickler):
    """That in Python, since the one in C takes gigabytes where a few bytes ask for them."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        return _KNOWN.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key, _, count, *view = pid
        known = kind == "storage" and type(key) is str and type(count) is int and count >= 0
        if not known or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        if type(storage_type) is not _StorageType:
            return Inert()
        return self.storages.setdefault(key, _Storage(storage_type.dtype, key, count))


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
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path} is no whole file of torch.save: {said}") from error

    def _unzipped(self, file: Any) -> Any:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
        found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("expected one data.pkl in it, which safetensors, TorchScript and other zip files have not")
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
        unpickler = _Unpickler(io.BytesIO(content(found[0])))
        root = unpickler.load()
        for key, storage in unpickler.storages.items():
            if (name := f"{folder}data/{key}") not in members:
                raise ValueError(f"{name} is missing")
            storage.offset, count = place(name)
            if count < storage.count * storage.dtype.itemsize:
                raise ValueError(f"{name} has {count:,} bytes, fewer than its tensors")
        return root

    def _legacy(self, file: Any) -> Any:
        if tuple(_Unpickler(file).load() for _ in range(2)) != _LEGACY:
            raise ValueError("it does not begin as one")
        if not _Unpickler(file).load()["little_endian"]:
            raise ValueError("its numbers are not little-endian")
        unpickler = _Unpickler(file)
        root, order = unpickler.load(), _Unpickler(file).load()
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
        if len(stored.described) < 4 or not isinstance(stored.described[0], _Storage):
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
