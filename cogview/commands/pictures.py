"""Pictures that are given to a command as files, and the run whose model takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cogview.commands.console import console
from cogview.commands.presets import option

if TYPE_CHECKING:
    from cogview.system import System

Files = Annotated[
    tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)", metavar="PICTURE ...")
]
RunFolder = Annotated[Path | None, option("FOLDER", "trained last in runs/", name="run")]
Step = Annotated[int | None, option("INT", "the best, or newest")]


def load(run: Path | None, name: str | None, step: int | None, device: str, draws: str, **faster: Any) -> "System":
    """The model of a run that draws captions, or larger pictures; says which it is. faster: see `System.load`."""
    from cogview.runs import last_run
    from cogview.system import System

    system = System.load(last_run() if run is None else run, device, name=name, step=step, draws=draws, **faster)
    console.print(str(system.source))
    return system


def report(paths: Sequence[Path], bad: dict[int, str]) -> int:
    """Names the pictures that are left out; how many they are."""
    for number, reason in bad.items():
        console.print(f"left out: {reason if str(paths[number]) in reason else f'{paths[number]}: {reason}'}")
    return len(bad)
