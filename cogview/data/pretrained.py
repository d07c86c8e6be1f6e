"""Folders of published models, as transformers' and diffusers' `save_pretrained` writes them: data, none of which is
executed, from files of which none is looked for outside."""

import json
import re
from pathlib import Path
from typing import Any

from cogview.config import require

_MAX_JSON = 64 << 20  # bytes; some have a vocabulary


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The object of a folder's JSON file; ValueError in a sentence that names the argument."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_JSON + 1)
        require(len(data) <= _MAX_JSON, "size", f"at most {_MAX_JSON:,} bytes", f"more in {path.name}")
        return dict(**json.loads(data))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: expected a folder with {path.name}, cannot read {path} ({short(error)})") from error


def check_index(folder: Path, name: str) -> None:
    """ValueError where what says which weights are in which file leads out of the folder."""
    for index in folder.glob("*.safetensors.index.json"):
        names = read_config(index, name).get("weight_map")
        plain = isinstance(names, dict) and all(re.fullmatch(r"[\w-][\w.-]*", str(file)) for file in names.values())
        require(plain, name, "plain names of files", f"others in {index}")


def short(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
