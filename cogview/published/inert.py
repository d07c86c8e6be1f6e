"""A pickle's unpickler that runs nothing.

A pickle calls what it names. Here the names of tensors, their storages and OrderedDict stand for classes of this file
that only take notes, and every other name for `Inert`, which takes everything and does nothing: no code from outside
is looked up, imported or called. torch.load(weights_only=True) would be as safe, but refuses the random states and
trainer settings that released checkpoints have beside their weights.
"""

import pickle
from typing import Any

import torch

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


class Storage(Inert):
    """`count` elements from `offset` of the file on."""

    def __init__(self, dtype: torch.dtype, key: str, count: int):
        self.dtype, self.key, self.count, self.offset = dtype, key, count, -1


class StorageType(Inert):
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


_GREEDY = (pickle.BYTEARRAY8[0], pickle.EMPTY_SET[0], pickle.FROZENSET[0])


class Unpickler(pickle._Unpickler):
    """That in Python, since the one in C takes gigabytes where a few bytes ask for them; without what does so here and
    no file of torch.save has."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code not in _GREEDY}  # noqa: RUF012

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return StorageType(_STORAGES[name])
        return _KNOWN.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:
        kind, storage_type, key, _, count, *view = pid
        known = kind == "storage" and type(key) is str and type(count) is int and count >= 0
        if not known or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        if type(storage_type) is not StorageType:
            return Inert()
        return self.storages.setdefault(key, Storage(storage_type.dtype, key, count))
