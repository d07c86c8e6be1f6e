"""What `train --watch` logs of each layer, as a picture."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogview.pictures import curves
from cogview.train.log import read_log
from cogview.train.loop import Watch
from cogview.train.state import State

EVERY = 60.0  # seconds between pictures

_TITLES = {"h": "main branch", "attention": "output of attention", "mlp": "output of MLP", "scores": "attention scores"}


@contextmanager
def watched(folder: Path, wanted: bool = True) -> Iterator[Watch | None]:
    """A picture of a run that trains inside, drawn now and then and at its end, whatever that is; or none."""
    due = time.monotonic() + EVERY

    def told(state: State, samples_a_second: float) -> str:
        nonlocal due
        if time.monotonic() > due:
            draw(folder)
            due = time.monotonic() + EVERY
        return ""

    try:
        yield told if wanted else None
    finally:
        if wanted:
            draw(folder)


def draw(folder: Path) -> Path | None:
    """Writes watch.png: the largest absolute values over the layers, those of a run's newest entry and, dashed, of its
    first one; nothing where no entry has them."""
    entries = [entry for entry in read_log(folder) if any(name.startswith("watch/") for name in entry)]
    if not entries:
        return None
    first, newest = entries[0], entries[-1]
    dashed = f", step {first['step']:,}"
    panels = []
    for place, title in _TITLES.items():
        lines = _lines(newest, place)
        if first is not newest:
            lines |= {kind + dashed: line for kind, line in _lines(first, place).items()}
        panels.append((f"{title}, step {newest['step']:,}: largest |value|", lines))
    return curves(panels, folder / "watch.png", across="layer", scale="log", dashed=dashed)


def _lines(entry: dict, place: str) -> dict[str, tuple[list[float], list[float]]]:
    """Layers and values of each kind of token; where one is not finite or 0 there is a gap."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name, value in entry.items():
        if name.startswith("watch/"):
            _, layer, where, kind = name.split("/")
            if where == place:
                x, y = lines.setdefault(kind, ([], []))
                x.append(int(layer))
                y.append(value if 0 < value < math.inf else math.nan)
    return lines
