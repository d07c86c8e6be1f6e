"""Checkpoints of a run: safetensors files, with format, version, config and state as JSON in their metadata.

Reading one never runs code from it. They are written beside and renamed, so none is ever half-written.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogview.config import GPTConfig
from cogview.data.files import save_tensors
from cogview.model import GPT

_FORMAT, _VERSION = "cogview-gpt", "1"


def save(path: Path, tensors: dict[str, Tensor], config: GPTConfig, state: dict) -> None:
    """Writes tensors, the model's config and a JSON-able state. OSError in one sentence when it cannot."""
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": json.dumps(dataclasses.asdict(config)),
        "state": json.dumps(state),
    }
    save_tensors(path, tensors, metadata)


def read(path: Path, *, prefix: str = "") -> tuple[dict[str, Tensor], GPTConfig, dict]:
    """Tensors whose name starts with `prefix`, the model's config, and the state.

    ValueError in one sentence when it is no checkpoint, is damaged or comes from another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format"), metadata.get("version")
            if found != (_FORMAT, _VERSION):
                wanted = f"format {_FORMAT} version {_VERSION}"
                raise ValueError(f"{path} must be of {wanted}, got format {found[0]} version {found[1]}")
            config = GPTConfig(**json.loads(metadata["config"]))
            state = dict(json.loads(metadata["state"]))
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118, no mapping
            return {name: file.get_tensor(name) for name in names}, config, state
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint {path}") from error
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error


def read_state(path: Path) -> dict:
    """The state of a checkpoint alone."""
    return read(path, prefix="-")[2]


def check_shapes(path: Path, tensors: dict[str, Tensor], model: GPT) -> None:
    """ValueError unless the tensors `model.<name>` are exactly the parameters of the model."""
    wanted = {f"model.{name}": list(p.shape) for name, p in model.named_parameters()}
    found = {name: list(t.shape) for name, t in tensors.items() if name.startswith("model.")}
    for name in sorted(wanted.keys() | found.keys()):
        ours, theirs = wanted.get(name, "absent"), found.get(name, "absent")
        if ours != theirs:
            raise ValueError(f"{path} does not fit the model: {name} must be {ours}, got {theirs}")


def load_model(path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a checkpoint, in evaluation mode."""
    tensors, config, _ = read(path, prefix="model.")
    if config.num_layers > len(tensors):
        raise ValueError(f"{path} must have {config.num_layers} layers, got {len(tensors)} tensors")
    with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
        model = GPT(config)
    check_shapes(path, tensors, model)
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()}, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def latest(folder: Path) -> Path | None:
    """The checkpoint of a run folder with the most steps, or None."""
    return max(folder.glob("step-*.safetensors"), default=None)


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of a run folder."""
    for path in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        path.unlink()
