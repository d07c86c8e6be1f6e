"""What a run's folder holds: models, each a folder of checkpoints, and which of those are taken."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.config import require
from cogview.train import checkpoint

TAKEN = ("tokens", "vqvae", "pixels", "pictures", "scenes", "shards", "tensorboard", "text.model", "vqvae.safetensors")
"""By other parts of a run."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, and why it was taken."""

    path: Path
    why: str

    @property
    def step(self) -> int:
        return checkpoint.step_of(self.path)

    def __str__(self) -> str:
        """As in "runs/mine, gpt, step 1,800 (best held-out loss 2.945)"."""
        model = self.path.parent
        return f"{model.parent}, {model.name}, step {self.step:,} ({self.why})"


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
    names = ("step-*.safetensors*", ".step-*.tmp", "log.jsonl*", "config.json")
    return folder.is_dir() and any(True for name in names for _ in folder.glob(name))


def models_in(path: Path) -> list[Path]:
    """The model folders that a path means: itself, or those of a run; ValueError without any."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder of a run or of a model")
    inner = sorted(p for p in path.iterdir() if p.name.casefold() not in TAKEN and is_model(p))
    found = [path] if is_model(path) and path.resolve().name.casefold() not in TAKEN else inner
    if not found:
        raise ValueError(f"{path} holds no model: expected one in {path / 'gpt'}, as `cogview train` makes it")
    return found


def model_of(path: Path) -> Path:
    """The one model folder that a path means: itself, the only one of a run, or its gpt."""
    found = models_in(path)
    if len(found) > 1 and path / "gpt" not in found:
        raise ValueError(f"{path} holds several models: name one of {', '.join(map(str, found))}")
    return path / "gpt" if path / "gpt" in found else found[0]


def models(run: Path) -> list[str]:
    """The names of a run's models, the one trained last first."""
    times = {folder.name: _trained(folder) for folder in run.glob("*/") if folder.name.casefold() not in TAKEN}
    return sorted((name for name, time in times.items() if time), key=lambda name: (-times[name], name))


def last_run(folder: Path = Path("runs")) -> Path:
    """The run in a folder with the newest checkpoint of any model; ValueError where there is none."""
    times = {run: max((_trained(run / name) for name in models(run)), default=0) for run in folder.glob("*/")}
    found = [run for run in times if times[run]]
    if not found:
        raise ValueError(f"run: expected a folder with a trained model; {folder} has none either")
    return min(found, key=lambda run: (-times[run], run))


def _trained(folder: Path) -> int:
    """When the newest checkpoint was written, 0 without any."""
    return max((path.stat().st_mtime_ns for path in checkpoint.paths(folder)), default=0)


def sources(
    run: Path, name: str | None = None, step: int | None = None, *, recipes: Collection[str] | None = None
) -> Iterator[Source]:
    """The checkpoints to be tried for a model (default: the one trained last, of one of these recipes if they are
    named): the best by held-out loss, and if it turns out damaged the others, newest first; of a step that one alone.
    ValueError where there is none."""
    known = models(run)
    if not known:
        raise ValueError(f"{run} holds no trained model: expected gpt/step-*.safetensors in it")
    if name is None:
        found = known[0] if recipes is None else last_of(run, recipes)
        require(found is not None, "name", f"a model of recipe {' or '.join(recipes or ())} in {run}", ", ".join(known))
        name = found or ""
    require(name in known, "name", f"a model of {run}: {', '.join(known)}", name)
    folder = run / name
    there = {checkpoint.step_of(path): path for path in reversed(checkpoint.paths(folder))}
    if step is not None:
        steps = ", ".join(f"{n:,}" for n in sorted(there))
        require(step in there, "step", f"one that {folder} has a checkpoint of: {steps}", step)
        return iter([Source(there[step], "as asked for")])
    return _best_first(folder, list(there.values()))


def last_of(run: Path, recipes: Collection[str]) -> str | None:
    """The model of one of these recipes that was trained last, one that cannot be read among them, or None."""
    return next((name for name in models(run) if _recipe(run / name) in (None, *recipes)), None)


def _recipe(folder: Path) -> str | None:
    """Of a model; None where no checkpoint can be read."""
    return next((header.get("recipe") for _, header in checkpoint.readable(folder)), None)


def _best_first(folder: Path, newest_first: list[Path]) -> Iterator[Source]:
    run: dict[str, Any] = next((header.get("run", {}) for _, header in checkpoint.readable(folder)), {})
    damaged = ""
    for path in dict.fromkeys([checkpoint.best(folder) or newest_first[0], *newest_first]):
        if run.get("best_loss") is not None and checkpoint.step_of(path) == run.get("best_step"):
            why = f"best held-out loss {run['best_loss']:.3f}"
        else:
            why = "newest" if path == newest_first[0] else "newest that is whole"
        yield Source(path, why + damaged)
        damaged += f"; step {checkpoint.step_of(path):,} is damaged"
