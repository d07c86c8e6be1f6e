"""config.json beside the checkpoints: all that a run was made with, by name, for people."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from cogview.data.files import write_json
from cogview.train.damage import aside
from cogview_ops import __version__

NAME = "config.json"


def plain(value: Any) -> Any:
    """As JSON has it: no tuples, and "inf" in words."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: Path, step: int, settings: dict[str, Any]) -> None:
    """Writes what holds from `step` on, where it is not what is there already. "before" has what was different up to
    which step."""
    settings = settings | {
        "versions": {"cogview": __version__, "torch": torch.__version__},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    settings, old = plain(settings), read(folder)
    if not old and (folder / NAME).exists():
        kept = (folder / NAME).rename(aside(folder / NAME))
        print(f"{folder / NAME} cannot be read; it is kept as {kept.name}")
    before = old.pop("before", [])
    if old == settings:
        return
    if old:
        changed = _changed("", old, settings)
        before = [*before, {"until_step": step, **changed}]
        told = {name: value for name, value in changed.items() if "." in name and value != "absent"}  # that is older
        said = [f"{name.removeprefix('training.')} was {value}" for name, value in told.items()]
        said = [words for words in said if not words.startswith("versions.")]
        if said:
            print(f"other settings than before: {', '.join(said)}")
    write_json(folder / NAME, settings | ({"before": before} if before else {}))


def read(folder: Path) -> dict[str, Any]:
    """Of a run; empty where there is none or it is damaged."""
    try:
        found = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("before", []), list) else {}


def _changed(name: str, old: Any, new: Any) -> dict[str, Any]:
    """The old values of what differs, by names as in training.steps."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {name: old}
    parts = [
        _changed(f"{name}.{key}".removeprefix("."), old.get(key, "absent"), new.get(key, "absent"))
        for key in {**old, **new}
    ]
    return {key: value for part in parts for key, value in part.items()}
