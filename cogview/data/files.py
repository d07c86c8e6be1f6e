"""Writing files so that nobody ever sees half of one."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cogview.config import require


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; moves it to `path` on success, removes it on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process ids are of one machine
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())  # a rename that survives a power cut must not outlive its contents
        os.replace(beside, path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Its entries survive a power cut, where a file system can promise that."""
    with suppress(OSError):  # some cannot, and folders may be written to but not read
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, never half of it; OSError in one sentence when it cannot."""
    path = Path(path)
    try:
        with written_beside(path) as beside:
            save_file({name: t.contiguous() for name, t in tensors.items()}, beside, metadata)
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        raise OSError(f"cannot write checkpoint {path}: {error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8, never half of it."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, never half of it."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_bytes(path: Path, name: str, most: int) -> bytes:
    """Of a file of at most so many; ValueError in a sentence that names the argument."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path} ({error.strerror})") from error
    require(len(data) <= most, name, f"at most {most:,} bytes", f"more in {path}")
    return data


def read_object(path: Path, name: str, most: int) -> dict[str, Any]:
    """The object of a JSON file of at most so many bytes; ValueError in a sentence that names the argument."""
    data = read_bytes(path, name, most)
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON in {path}, got something else ({error})") from error
    require(isinstance(found, dict), name, f"a JSON object in {path}", type(found).__name__)
    return found


def sha256_of(paths: Sequence[Path]) -> str:
    """Of a file's bytes; of several files, or of none, of their names and sums in the order of the names."""
    sums = list[tuple[str, str]]()
    for path in paths:
        with open(path, "rb") as file:
            sums.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return sums[0][1] if len(sums) == 1 else hashlib.sha256(json.dumps(sorted(sums)).encode()).hexdigest()
