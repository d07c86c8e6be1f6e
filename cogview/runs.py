"""What a run's folder holds: models, each a folder of checkpoints, and which of those are taken."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.config import require
from cogview.train import checkpoint

_IMAGE = "vqvae"  # the training of the image tokenizer stands beside the models


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


def models(run: Path) -> list[str]:
    """The names of a run's models, the one trained last first."""
    times = {folder.name: _trained(folder) for folder in run.glob("*/") if folder.name != _IMAGE}
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


def sources(run: Path, name: str | None = None, step: int | None = None) -> Iterator[Source]:
    """The checkpoints to be tried for a model (default: the one trained last): the best by held-out loss, and if it
    turns out damaged the others, newest first; of a step that one alone. ValueError where there is none."""
    known = models(run)
    if not known:
        raise ValueError(f"{run} holds no trained model: expected gpt/step-*.safetensors in it")
    name = known[0] if name is None else name
    require(name in known, "name", f"a model of {run}: {', '.join(known)}", name)
    folder = run / name
    there = {checkpoint.step_of(path): path for path in reversed(checkpoint.paths(folder))}
    if step is not None:
        steps = ", ".join(f"{n:,}" for n in sorted(there))
        require(step in there, "step", f"one that {folder} has a checkpoint of: {steps}", step)
        return iter([Source(there[step], "as asked for")])
    return _best_first(folder, list(there.values()))


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
