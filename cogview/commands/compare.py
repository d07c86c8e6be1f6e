"""`cogview compare`: models beside each other, in a table and curves."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from cogview.commands.console import console
from cogview.models import recipe_of
from cogview.recipes.recipe import Recipe
from cogview.runs import models_in
from cogview.train import checkpoint, record
from cogview.train.log import read_log
from cogview.train.state import State

HELD_OUT = "validation_"  # before the names of held-out losses in a log

Line = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Model:
    """One that has been trained: its recipe, where its newest checkpoint stands, its log and what config.json says."""

    folder: Path
    recipe: Recipe
    state: State
    log: list[dict[str, float]]
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Model":
        """ValueError in one sentence where there is nothing that can be read."""
        newest = next(checkpoint.readable(folder), None)
        if newest is None:
            damaged = checkpoint.latest(folder)
            raise ValueError(f"{folder}: " + ("no checkpoint can be read" if damaged else "nothing is saved there yet"))
        try:
            state = State(**newest[1]["run"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{newest[0]} is not a readable checkpoint: {error}") from error
        return cls(folder, recipe_of(*newest), state, read_log(folder), record.read(folder))

    def line(self, name: str) -> Line:
        """Steps and values of what the log has by this name."""
        found = [(float(entry["step"]), entry[name]) for entry in self.log if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    def losses(self) -> list[str]:
        """Names of its losses, "loss" first; those held out have the same."""
        found = (name.removeprefix(HELD_OUT) for entry in self.log for name in entry)
        return list(dict.fromkeys(name for name in found if name.split("_")[-1] == "loss"))

    def held_out(self) -> dict[str, str]:
        """Its figures at the step that its checkpoint calls the best, which `generate` takes, or without one at the
        last step that has some, by their names in the log; and that step."""
        best, entries = self.state.best_step, [entry for entry in self.log if any(map(_is_held_out, entry))]
        entries = [entry for entry in entries if best in (None, entry["step"])]
        figures: dict[str, float] = {"step": best} if best is not None else {}
        if best is not None and self.state.best_loss is not None:  # also where the log is gone
            figures[f"{HELD_OUT}loss"] = self.state.best_loss
        figures |= entries[-1] if entries else {}
        return {name: f"{value:.3f}" if _is_held_out(name) else f"{value:,}" for name, value in figures.items()}

    def row(self, kinds: list[str]) -> list[str]:
        config, held_out, training = self.recipe.config, self.held_out(), self.config.get("training")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self.recipe.model().parameters())
        speeds = self.line("tokens_per_second")[1]
        return [
            self.recipe.name,
            str(getattr(config, "attention", self.recipe.name)),
            f"{parameters:,}",
            f"{self.state.step:,}",
            str(training.get("batch_size", "?")) if isinstance(training, dict) else "?",
            f"{self.state.elapsed:,.0f}",
            f"{statistics.median(speeds):,.0f}" if speeds else "?",
            *(held_out.get(HELD_OUT + kind, "–") for kind in kinds),
            held_out.get("step", "–"),
        ]


@dataclass(frozen=True)
class Compare:
    """Put trained models beside each other: a table of what they are and came to, and a picture of their losses."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")]
    """Run folders, of which all models are taken, or folders of models."""
    out: Path = Path("compare.png")
    """The picture: losses in training and held out, a panel for each kind. Its suffix says the format: png, jpg, webp,
    bmp, gif or tif."""

    def run(self) -> None:
        from cogview.pictures import check_place, curves, picture_path

        out, models = picture_path(self.out), []
        folders: dict[Path, Path] = {}  # as they are named, by what they are
        for folder in (folder for path in self.runs for folder in _models_in(path)):
            folders.setdefault(folder.resolve(), folder)
        for folder in folders.values():
            try:
                models.append(Model.load(folder))
            except (ValueError, OSError) as error:
                console.print(f"left out: {error}")
        if not models:
            raise ValueError("runs: expected at least one model that can be read, got none")
        check_place(out)
        kinds = list(dict.fromkeys(name for model in models for name in model.losses()))
        titles = ["recipe", "attention", "parameters", "steps", "batch", "seconds", "tokens/s"]
        titles += [f"held-out {kind.replace('_', ' ')}" for kind in kinds] + ["of step"]
        named = dict(zip(_names([model.folder.resolve() for model in models]), models, strict=True))
        table = Table("")
        for name in map(_encodable, named):
            table.add_column(name, justify="right", overflow="fold")
        for row in zip(titles, *(model.row(kinds) for model in models), strict=True):
            table.add_row(*map(_encodable, row))
        wide = 30 + sum(20 + cell_len(_encodable(name)) for name in named)  # where it is no terminal's
        Console(width=None if console.is_terminal else wide, markup=False, emoji=False, highlight=False).print(table)
        panels = [(kind.replace("_", " "), _lines(named, kind)) for kind in kinds]
        if panels:
            console.print(f"curves in {curves(panels, out)}")
        else:
            console.print("no curves: their logs have no losses")


def _models_in(path: Path) -> list[Path]:
    try:
        return models_in(path)
    except ValueError as error:
        console.print(f"left out: {error}")
        return []


def _is_held_out(name: str) -> bool:
    return name.startswith(HELD_OUT)


def _encodable(text: str) -> str:
    """As it can be printed, so that a table knows how wide it is."""
    if not console.encoding.startswith("utf"):
        text = text.replace("–", "-")
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def _names(folders: list[Path]) -> list[str]:
    """The last parts of their whole paths, two or as many as it takes to tell them apart."""
    longest = max(2, *(len(folder.parts) for folder in folders))
    names = (["/".join(folder.parts[-n:]) for folder in folders] for n in range(2, longest + 1))
    return next(found for found in names if len(set(found)) == len(found))


def _lines(named: dict[str, Model], kind: str) -> dict[str, Line]:
    """Of each model's training and held-out losses, as far as it has them."""
    lines: dict[str, Line] = {}
    for name, model in named.items():
        lines |= {name: model.line(kind), f"{name}, held out": model.line(HELD_OUT + kind)}
    return {name: line for name, line in lines.items() if line[0]}
