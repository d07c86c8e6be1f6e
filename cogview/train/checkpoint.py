"""Checkpoints of a run: safetensors files, with format, version and what they hold as JSON in their metadata. Those
of several processes are folders of such files, see `shards`.

Reading one never runs code from it. They are written beside and renamed, so none is ever half-written. The metadata
also has a CRC-32 of the header and of each tensor, which a file with a part of them could keep: what is read is
checked. Files of versions 1 and 2 have none.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogview.data.files import save_tensors
from cogview.train import legacy
from cogview.train.sums import json_sum, tensor_sum

FORMAT, VERSION = "cogview-run", "4"
ASIDE = ".old.tmp"

_NOTHING = "-"  # begins no tensor's name
UNREADABLE = (SafetensorError, FileNotFoundError, KeyError, TypeError, ValueError, AttributeError)


class Damaged(ValueError):
    """A file that cannot be read, or that is not what was written."""


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a JSON-able header. OSError in one sentence when it cannot."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION, "header": json.dumps(header)}
    sums = {"header": _header_sum(metadata), "tensors": {name: tensor_sum(name, t) for name, t in tensors.items()}}
    save_tensors(path, tensors, metadata | {"checksums": json.dumps(sums)})


def read(path: Path, *, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors whose name starts with `prefix`, and the header.

    Damaged in one sentence where it cannot be read or its checksums are wrong, ValueError when there is none or it is
    of another version; those of versions before are read as if they were of this one.
    """
    if path.is_dir():
        return _read_folder(path, prefix)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint {path}") from error
    except SafetensorError as error:
        raise Damaged(f"{path} is not a readable checkpoint: {error}") from error
    except OSError as error:  # rights or the disk, which say nothing about the file
        raise OSError(f"cannot read checkpoint {path}: {error}") from error
    try:
        found = metadata.get("format"), metadata.get("version")
        if "checksums" in metadata or found == (FORMAT, VERSION):
            _check_sums(path, tensors, metadata, names)
        if found in legacy.READERS:
            return legacy.READERS[found](tensors, metadata)
        _check_version(path, *found)
        return tensors, dict(json.loads(metadata["header"]))
    except (KeyError, TypeError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise Damaged(f"{path} is not a readable checkpoint: {error}") from error


def _read_folder(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `read`; checksums of all its files are checked where some of its tensors are read."""
    from cogview.train import shards  # torch.distributed takes a second to import, and some builds have none

    try:
        found = shards.read_header(path)
        version, header = (found["format"], found["version"]), dict(found["header"])
    except UNREADABLE as error:
        raise Damaged(f"{path} is not a readable checkpoint: {error}") from error
    _check_version(path, *version)
    if prefix == _NOTHING:
        return {}, header
    if wrong := folder_damage(path):
        raise Damaged(wrong)
    return shards.read(path, prefix), header


def folder_damage(path: Path, part: int = 0, parts: int = 1) -> str:
    """In a sentence, what is wrong with a folder's files, "" if nothing; of every `parts`-th from `part` on."""
    from cogview.train import shards

    try:
        wrong = shards.damage(path, part, parts)
        return f"{path} is damaged: {wrong}" if wrong else ""
    except UNREADABLE as error:
        return f"{path} is not a readable checkpoint: {error}"


def check_version(path: Path) -> None:
    """ValueError where a file is of a version before, whose tensors are not as they are now."""
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is of a version before: go on with it in one process first")


def described(header: dict[str, Any]) -> dict[str, Any]:
    """A header with format and version, as a folder has it."""
    return {"format": FORMAT, "version": VERSION, "header": header}


def _check_version(path: Path, form: str | None, version: str | None) -> None:
    if (form, version) != (FORMAT, VERSION):
        wanted = f"format {FORMAT} version {VERSION}"
        raise ValueError(f"{path}: expected {wanted}, got format {form} version {version}")


def read_header(path: Path) -> dict[str, Any]:
    """The header of a checkpoint alone."""
    return read(path, prefix=_NOTHING)[1]


def weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's parameters by their names, where they are averaged their averages, and the header."""
    prefix = "average." if read_header(path).get("averaged") else "model."
    tensors, header = read(path, prefix=prefix)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}, header


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in tensors.items()}


def check_shapes(path: Path, shapes: dict[str, list[int]], wanted: dict[str, Tensor]) -> None:
    """ValueError unless there are tensors `model.<name>` exactly for those wanted, by name and shape."""
    ours = {f"model.{name}": list(value.shape) for name, value in wanted.items()}
    theirs = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
    for name in sorted(ours.keys() | theirs.keys()):
        if (expected := ours.get(name, "absent")) != (got := theirs.get(name, "absent")):
            raise ValueError(f"{path} does not fit the model: {name}: expected {expected}, got {got}")


def check_fits(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same of parameters by their own names."""
    check_shapes(path, shapes({f"model.{name}": value for name, value in found.items()}), wanted)


def path_of(folder: Path, step: int, several: bool = False) -> Path:
    """Of a checkpoint of one process, or of several."""
    return folder / (f"step-{step:08d}" if several else f"step-{step:08d}.safetensors")


def step_of(path: Path) -> int:
    """What `path_of` made it of, -1 for another path."""
    found = re.fullmatch(r"step-(\d{8,})(\.safetensors)?", path.name)
    return int(found[1]) if found else -1


def paths(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=lambda p: (step_of(p), p.name))


def of_step(folder: Path, step: int) -> Path | None:
    """The checkpoint of a step, of one process or of several; None where there is none."""
    return next((path for path in reversed(paths(folder)) if step_of(path) == step), None)


def latest(folder: Path) -> Path | None:
    """The checkpoint of a run folder with the most steps, or None."""
    return next(reversed(paths(folder)), None)


def readable(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints of a folder whose headers are not damaged, and those, newest first."""
    for path in reversed(paths(folder)):
        try:
            yield path, read_header(path)
        except Damaged:
            continue


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss so far, which the newest one's header names; the newest without
    held-out data, or when that one is gone. None when there is no checkpoint."""
    for newest, header in readable(folder):
        step = header.get("run", {}).get("best_step")
        return newest if step is None else of_step(folder, step) or newest
    return latest(folder)  # damaged: who reads it is told


def recover(folder: Path) -> None:
    """Puts back what was aside for a new one of the same step, which a process that was killed did not put there."""
    for path in folder.glob(f".step-*{ASIDE}"):
        there = path.with_name(path.name[1:].removesuffix(ASIDE))
        if not there.exists():
            path.rename(there)


def clean(folder: Path) -> None:
    """Deletes what was not written to its end."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def prune(folder: Path, keep: int, best_step: int | None = None) -> None:
    """Deletes all but the newest `keep` checkpoints of a run folder and that of the best step."""
    for path in paths(folder)[:-keep]:
        if step_of(path) != best_step:
            remove(path)


def remove(path: Path) -> None:
    """Deletes a checkpoint, of which nothing is left that looks like one."""
    if path.is_dir():
        path = path.rename(path.with_name(f".{path.name}.gone.tmp"))
        shutil.rmtree(path)
    else:
        path.unlink()


def _header_sum(metadata: dict[str, str]) -> int:
    return json_sum([metadata[name] for name in ("format", "version", "header")])


def _check_sums(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], names: list[str]) -> None:
    """Damaged where a checksum is not that of the header, the names or one of the tensors."""
    sums = json.loads(metadata["checksums"])
    if sums["header"] != _header_sum(metadata):
        raise Damaged(f"{path} is damaged: the checksum of its header is wrong")
    if other := sorted(sums["tensors"].keys() ^ set(names)):
        raise Damaged(f"{path} is damaged: {other[0]} is there without its checksum, or the other way round")
    for name, value in tensors.items():
        if sums["tensors"][name] != tensor_sum(name, value):
            raise Damaged(f"{path} is damaged: the checksum of {name} is wrong")
