"""What the study of super-resolution found: figures, a page, and pictures of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.data.files import write_json, written_beside
from cogview.demo.measure import score
from cogview.demo.scenes import PLACES, SIZE, TILE, Scene, tiles
from cogview.pictures import contact_sheet, curves
from cogview.studies.seams import KINDS, borders, jumps

SHOWN = 18  # scenes on the sheet
OURS, AGAINST = ("greedy", "temperature 0.5", "as published"), ("bicubic", "codes repeated")


def write(
    out: Path,
    scenes: Sequence[Scene],
    captions: Sequence[str],
    small: Tensor,
    true: Tensor,
    pictures: dict[str, Tensor],
    facts: dict[str, Any],
) -> str:
    """Writes report.md, figures.json and the pictures into `out`; returns what they come to, in a line.

    small: uint8 [N, 3, H, W], decoded; true and each of pictures: uint8 [N, 3, 2 H, 2 W].
    """
    inside, kinds = tile_masks(scenes, true.shape[-1] // SIZE), borders(true.shape[-1] // 32, 8)
    figures = {
        name: {
            "psnr": psnr(some, true),
            "psnr_tiles": psnr(some, true, inside),
            "sharpness": sharpness(some, inside) / sharpness(true, inside),
            "all": score(some, scenes)["all"],
            "jumps": jumps(some, true, kinds),
        }
        for name, some in pictures.items()
    }
    best = max(OURS, key=lambda name: figures[name]["psnr"])
    wins = {name: better(pictures[best], pictures[name], true) for name in AGAINST}
    for name in AGAINST:
        difference = per_picture(pictures[best], true) - per_picture(pictures[name], true)
        figures[name]["ours_above"] = {
            "wins": wins[name],
            "mean": float(difference.mean()),
            "half_of_95_percent": 1.96 * float(difference.std()) / len(difference) ** 0.5,
        }
    write_json(out / "figures.json", facts | {"best": best, "figures": figures})
    _sheet(out, captions, small, true, pictures, best)
    _errors(out, true, pictures, best, kinds)
    _lines(out, true, pictures, best, kinds)
    verdict = _verdict(figures, best)
    with written_beside(out / "report.md") as beside:
        beside.write_text(_page(verdict, figures, best, facts, len(scenes)), encoding="utf-8")
    return verdict
