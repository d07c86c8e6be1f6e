"""Curves of the study of DALL-E's choices."""

from pathlib import Path
from typing import Any

from cogview.pictures import curves
from cogview.studies.dalle_verdicts import DEPTHS, attentions
from cogview.studies.training_pictures import Line, apart, mean, scale
from cogview.studies.training_verdicts import Found


def draw(out: Path, found: dict[str, Found], yardstick: str) -> None:
    """choices.png, attention.png, scaling.png; this one tells losses as they differ from a way's."""
    names = {name: {"dalle": "DALL-E's", "separate": "two softmaxes"}.get(name, name) for name in found["choices"]}
    panels = [
        (f"training loss of {kind}, mean of the seeds", _losses(found["choices"], names, f"{kind}_loss"))
        for kind in ("image", "text")
    ]
    curves(panels, out / "choices.png", scale="log")
    panels = []
    for grid, trainings in attentions(found).items():
        lines = _losses(trainings, {name: name for name in trainings}, "image_loss")
        panels.append((f"training loss of images, {grid} x {grid} codes", lines))
    curves(panels, out / "attention.png", scale="log")
    panels = []
    for part, title in DEPTHS.items():
        lines = _losses(found[part], {name: name for name in found[part]}, "loss")
        others = {name: apart(line, lines[yardstick]) for name, line in lines.items() if name != yardstick}
        panels += [
            (f"training loss, % from {yardstick}, {title}", others),
            (f"exponent of float16's scales, {title}, seed 0", _scales(found[part])),
        ]
    curves(panels, out / "scaling.png")


def _losses(found: Found, names: dict[str, str], loss: str) -> dict[str, Line]:
    """Means of the seeds, as far as all of them go."""
    lines = {}
    for name, label in names.items():
        seeds = [training["curves"][loss] for training in found[name]]
        lines[label] = mean([points[: min(map(len, seeds))] for points in seeds])
    return lines


def _scales(found: Found) -> dict[str, Line]:
    """Of the loss, and the least and the largest of the blocks."""
    lines: dict[str, Line] = {}
    for name, runs in found.items():
        run: dict[str, Any] = runs[0]
        if "blocks" in run:
            steps = [float(n) * max(1, run["steps"] // len(run["blocks"])) + 1 for n in range(len(run["blocks"]))]
            lines[f"{name}: least"] = steps, [min(values) for values in run["blocks"]]
            lines[f"{name}: largest"] = steps, [max(values) for values in run["blocks"]]
        elif "scale" in run:
            lines[name] = scale(run)
    return lines
