"""How a network of pictures, a tokenizer or what an evaluation sees with, lies in a file: safetensors, and beside the
weights its format, config and hash."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cogview.data.files import save_tensors


def digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a config and the bytes of all tensors."""
    found = hashlib.sha256(json.dumps(config).encode())
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(path: str | Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], **more: str) -> None:
    """Never half of it. kind: the format; more: of the metadata, which the hash is not of."""
    metadata = {"format": kind, "config": json.dumps(config), "sha256": digest(config, tensors)}
    save_tensors(path, tensors, metadata | more)


def metadata_of(path: str | Path) -> dict[str, str]:
    """Of a safetensors file; ValueError in one sentence where it is none."""
    return _open(path)[0]


def kind_of(path: str | Path) -> str | None:
    """The format of a safetensors file; ValueError in one sentence where it is none."""
    return metadata_of(path).get("format")


def read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors that `write` wrote in this format; ValueError in one sentence of anything else."""
    metadata, tensors = _open(path, tensors=True)
    if metadata.get("format") != kind:
        raise ValueError(f"path: expected {kind} in {str(path)!r}, got {metadata.get('format')!r}")
    try:
        config = dict(**json.loads(metadata.get("config", "")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"path: {str(path)!r} has no valid config ({error})") from error
    written = metadata.get("sha256")
    if written is not None and written != digest(config, tensors):  # version 0.1 wrote none
        raise ValueError(f"path: {str(path)!r} is damaged: its checksum is wrong")
    return config, tensors


def _open(path: str | Path, tensors: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise ValueError(f"path: no image tokenizer at {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys() if tensors else ()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {str(path)!r} is not a safetensors file ({error})") from error


def give(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Puts the tensors of a file into a model, which may be on the meta device; ValueError unless all are its own."""
    wanted = model.state_dict()
    for name in dict.fromkeys([*wanted, *sorted(tensors)]):
        expected, got = (tuple(of[name].shape) if name in of else "nothing" for of in (wanted, tensors))
        if expected != got:
            raise ValueError(f"path: {str(path)!r}: {name}: expected {expected}, got {got}")
    model.load_state_dict(tensors, assign=any(value.is_meta for value in wanted.values()))
