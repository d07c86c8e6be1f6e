"""Where models are in run folders: RUN/NAME, with their checkpoints and log."""

import re
from pathlib import Path

from cogview.config import require
from cogview.train import checkpoint

# By other parts of a run.
TAKEN = ("tokens", "vqvae", "vqvae.safetensors", "text.model", "pixels", "pictures", "scenes", "shards", "tensorboard")


def folder_of(run: Path, name: str) -> Path:
    """Of a model that is there or is to be trained; ValueError where the name cannot be one."""
    plain = re.fullmatch(r"\w[\w.-]{0,99}", name) is not None and name.casefold() not in TAKEN
    require(plain, "name", f"a plain name, none of {', '.join(TAKEN)}", name)
    folder = run / name
    free = not folder.exists() or is_model(folder) or (folder.is_dir() and not any(folder.iterdir()))
    require(free, "name", "that of a model, or a new one", f"{name}, and {folder} is something else")
    return folder


def is_model(folder: Path) -> bool:
    """Also one whose training has not saved anything yet, or only what is damaged now."""
    names = ("step-*.safetensors*", "log.jsonl*", "config.json")
    return folder.is_dir() and any(True for name in names for _ in folder.glob(name))


def models_in(path: Path) -> list[Path]:
    """The model folders that a path means: itself, or those of a run; ValueError without any."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder")
    inner = sorted(p for p in path.iterdir() if p.name not in TAKEN and is_model(p))
    found = [path] if is_model(path) else inner
    if not found:
        raise ValueError(f"{path} holds no model: expected one in {path / 'gpt'}, as `cogview train` makes it")
    return found


def source(path: Path) -> Path:
    """The one model folder that a path means: itself, the only one of a run, or its gpt."""
    found = models_in(path)
    if len(found) > 1 and path / "gpt" not in found:
        raise ValueError(f"{path} holds several models: name one of {', '.join(map(str, found))}")
    return path / "gpt" if path / "gpt" in found else found[0]


def best_of(folder: Path) -> Path:
    """The checkpoint to start from; ValueError where there is none."""
    found = checkpoint.best(folder)
    if found is None:
        raise ValueError(f"{folder} holds no trained model: expected step-*.safetensors in it")
    return found
