"""Curves of the study of training."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cogview.pictures import curves

Line = tuple[list[float], list[float]]
"""Places and values."""


def draw(out: Path, found: dict[str, list[dict[str, Any]]], facts: dict[str, Any]) -> None:
    """precision.png, shrink.png, attention.png, batch.png, optimizer.png."""

    pair = ("shrunk", "not shrunk")

    def loss(name: str, of: str = "loss", times: float = 1.0) -> Line:
        """The mean of the seeds; times: what a step counts as."""
        return mean([t["curves"][of] for t in found[name]], times)

    def scales(kind: str) -> dict[str, Line]:
        """The means of the seeds, with and without the shrink."""
        return {name: mean([list(zip(*scale(t), strict=True)) for t in found[f"{kind}{name}"]]) for name in pair}

    precisions = ("float32", "bfloat16", "float16")
    panels = [
        ("training loss, mean of the seeds", {name: loss(name) for name in precisions}),
        ("difference from float32, %", {name: apart(loss(name), loss("float32")) for name in precisions[1:]}),
        ("exponent of float16's loss scale", {f"seed {t['seed']}": scale(t) for t in found["float16"]}),
    ]
    curves(panels, out / "precision.png")

    groups = {"words": "token table", "read": "of it reading", "positions": "positions", "other": "layers"}
    largest = {
        f"{label}, {name}": _log10(mean([found[name][0]["largest"][group]]))
        for group, label in groups.items()
        for name in pair
        if name == "not shrunk" or group in ("read", "positions")
    }
    panels = [
        ("exponent of the loss scale, tiny", scales("")),
        ("the same, embeddings begin at 0.02", scales("small, ")),
        ("the same, 64 layers", scales("deep, ")),
        ("log10 of the largest gradient, tiny, seed 0", largest),
    ]
    curves(panels, out / "shrink.png")

    kinds = ("dense", "three_region")
    panels = [
        (f"training loss of {name}, mean of the seeds", {kind: loss(kind, f"{of}_loss") for kind in kinds})
        for of, name in (("image", "images"), ("text", "text"))
    ]
    both = [[mean([t["curves"]["loss"]]) for t in found[kind]] for kind in kinds]
    differences = {f"seed {n}": apart(b, a) for n, (a, b) in enumerate(zip(*both, strict=True))}
    curves([*panels, ("three_region's difference from dense, %", differences)], out / "attention.png")

    batches = facts["batches"]
    ways = {"linear": ("x1", "bfloat16", "x4"), "square root": ("x1", "x2, square root", "x4, square root")}
    panels = [
        (
            f"training loss, {how} rate",
            {f"batch of {batches[name]}": loss(name, times=batches[name]) for name in names},
        )
        for how, names in ways.items()
    ]
    curves(panels, out / "batch.png", across="samples")

    seconds = facts["step_seconds"]
    named = {"AdamW": "bfloat16", "Muon": "muon", "AdamW, as long": "adamw, longer"}
    by_step = {label: loss(name) for label, name in named.items()}
    by_time = {label: loss(name, times=seconds.get(name, seconds["bfloat16"])) for label, name in named.items()}
    panels = [("training loss by step", by_step), ("training loss by seconds of training", by_time)]
    curves(panels, out / "optimizer.png", across="steps, seconds on the right")


def mean(seeds: Sequence[Sequence[Sequence[float]]], times: float = 1.0) -> Line:
    """Of curves of points [x, y] at the same places."""
    points = list(zip(*seeds, strict=True))
    return [times * point[0][0] for point in points], [statistics.fmean(y for _, y in point) for point in points]


def apart(line: Line, base: Line) -> Line:
    """The difference of two lines at the same places, in percent of the second."""
    return line[0], [100 * (a - b) / b for a, b in zip(line[1], base[1], strict=True)]


def _log10(line: Line) -> Line:
    return line[0], [math.log10(max(y, 1e-12)) for y in line[1]]


def scale(training: dict[str, Any]) -> Line:
    """The exponent of a float16 training's loss scale in every step."""
    return [float(step) for step in range(1, len(training["scale"]) + 1)], training["scale"]
