"""Checkpoints of a run: safetensors files, with format, version and what they hold as JSON in their metadata.

Reading one never runs code from it. They are written beside and renamed, so none is ever half-written.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogview.data.files import save_tensors
from cogview.train import legacy

FORMAT, VERSION = "cogview-run", "2"


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a JSON-able header. OSError in one sentence when it cannot."""
    save_tensors(path, tensors, {"format": FORMAT, "version": VERSION, "header": json.dumps(header)})


def read(path: Path, *, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors whose name starts with `prefix`, and the header.

    ValueError in one sentence when it is no checkpoint, is damaged or comes from another version; those of version 1
    are read as if they were of this one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118, no mapping
            tensors = {name: file.get_tensor(name) for name in names}
        found = metadata.get("format"), metadata.get("version")
        if found in legacy.READERS:
            return legacy.READERS[found](tensors, metadata)
        if found != (FORMAT, VERSION):
            wanted = f"format {FORMAT} version {VERSION}"
            raise ValueError(f"{path}: expected {wanted}, got format {found[0]} version {found[1]}")
        return tensors, dict(json.loads(metadata["header"]))
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint {path}") from error
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error


def read_header(path: Path) -> dict[str, Any]:
    """The header of a checkpoint alone."""
    return read(path, prefix="-")[1]


def check_shapes(path: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """ValueError unless the tensors `model.<name>` are exactly those wanted, by name and shape."""
    ours = {f"model.{name}": list(value.shape) for name, value in wanted.items()}
    theirs = {name: list(t.shape) for name, t in tensors.items() if name.startswith("model.")}
    for name in sorted(ours.keys() | theirs.keys()):
        if (expected := ours.get(name, "absent")) != (got := theirs.get(name, "absent")):
            raise ValueError(f"{path} does not fit the model: {name}: expected {expected}, got {got}")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def latest(folder: Path) -> Path | None:
    """The checkpoint of a run folder with the most steps, or None."""
    return max(folder.glob("step-*.safetensors"), default=None)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of a run folder."""
    for path in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        path.unlink()
