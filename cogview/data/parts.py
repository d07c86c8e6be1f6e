"""The parts of a folder of tokens: written whole or not at all, and checked.

part-<name>.text.npy    int32 [N, T], -1 padded
part-<name>.codes.npy   int32 [N, h w]
part-<name>.small.npy   int32 [N, h/2 w/2], of the same at half the size, where meta.json has its "small_grid"
part-<name>.groups.npy  uint64 [N], a hash of the pair's caption
part-<name>.json        rows, what was left out and could not be read, and CRC-32s of the files; written last
"""

import hashlib
import json
import zlib
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from cogview.data.files import write_json, written_beside

ARRAYS = {"text": np.int32, "codes": np.int32, "small": np.int32, "groups": np.uint64}


def part_name(**made_of: Any) -> str:
    """The name of what is made of this, of everything that decides what is in it."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def group(caption: str) -> int:
    """uint64 of a caption: pairs of the same caption are held out together."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big")


class PartWriter:
    """Writes one part row by row; it exists only when complete. Use as a context manager: `write` rows, `finish`.

    sizes: codes of a row by the name of their array, "codes" and maybe "small"."""

    def __init__(self, folder: Path, name: str, sizes: Mapping[str, int]):
        self.folder, self.name, self.sizes = folder, name, sizes
        self._texts, self._lengths, self._groups, self._stack = array("i"), array("i"), array("Q"), ExitStack()
        self._codes: dict[str, IO[bytes]] = {}

    def __enter__(self) -> "PartWriter":
        for name in self.sizes:
            beside = self._stack.enter_context(written_beside(self._path(f"{name}.npy")))
            self._codes[name] = self._stack.enter_context(open(beside, "wb"))
        self._write_headers()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def __len__(self) -> int:
        return len(self._lengths)

    def write(self, text: Sequence[int], codes: Mapping[str, np.ndarray], group: int) -> None:
        """One row: text ids, and int32 codes, by the names of `sizes`."""
        self._texts.extend(text)
        self._lengths.append(len(text))
        self._groups.append(group)
        for name, file in self._codes.items():
            file.write(codes[name].tobytes())

    def finish(self, skipped: Mapping[str, int], problems: Mapping[str, tuple[int, str]] | None = None) -> None:
        """Completes the files. skipped: how many of each kind were left out. problems: of each kind how many there are,
        and the key of the first sample that has it."""
        for file in self._codes.values():
            file.seek(0)
        self._write_headers()
        self._stack.close()
        padded = np.full((len(self), max(self._lengths, default=0)), -1, np.int32)
        padded[np.arange(padded.shape[1]) < np.array(self._lengths)[:, None]] = np.array(self._texts, np.int32)
        for name, values in (("text", padded), ("groups", np.array(self._groups, np.uint64))):
            with written_beside(self._path(f"{name}.npy")) as beside, open(beside, "wb") as file:
                np.save(file, values)
        counts = {kind: n for kind, n in skipped.items() if n}
        sums = {name: _sum(self._path(f"{name}.npy")) for name in ("text", *self.sizes, "groups")}
        part = {"rows": len(self), "text_length": padded.shape[1], "skipped": counts, "crc32": sums}
        write_json(self._path("json"), {**part, "problems": dict(problems or {})})

    def _path(self, ending: str) -> Path:
        return self.folder / f"part-{self.name}.{ending}"

    def _write_headers(self) -> None:
        """Of .npy files; NumPy pads them so that the number of rows can grow in place."""
        for name, file in self._codes.items():
            header = {"descr": "<i4", "fortran_order": False, "shape": (len(self), self.sizes[name])}
            np.lib.format.write_array_header_1_0(file, header)


def has_part(folder: Path, name: str) -> bool:
    """Whether a part is there, and as it was written."""
    try:
        return damage(folder, name) == ""
    except OSError:
        return False


def damage(folder: Path, name: str) -> str:
    """The file of a part that is not as it was written, or not there; "" if all are. OSError says nothing about it."""
    file = f"part-{name}.json"
    try:
        sums = read_part(folder, name)["crc32"]
        if not {"text", "codes", "groups"} <= sums.keys() <= ARRAYS.keys():
            return file
        for key, wanted in sums.items():
            file = f"part-{name}.{key}.npy"
            if _sum(folder / file) != wanted:
                return file
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return file
    return ""


def read_part(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"part-{name}.json").read_text(encoding="utf-8"))


def _sum(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total
