"""What the study of super-resolution found: figures, a page, and pictures of it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.data.files import write_json, write_text
from cogview.demo.measure import decibels, score
from cogview.demo.scenes import PLACES, SIZE, TILE, Scene
from cogview.pictures import contact_sheet, curves
from cogview.studies.paired import compare
from cogview.studies.seams import KINDS, borders, jumps

SHOWN = 12  # scenes on the sheet
AGAINST = ("bicubic", "codes repeated")
BOUNDS = ("true small, bicubic", "bound")
_STEP = 8  # pixels of a code
_MOST = 24  # mean error of 255 that a map shows as white


def write(
    out: Path,
    scenes: Sequence[Scene],
    captions: Sequence[str],
    small: Tensor,
    true: Tensor,
    pictures: dict[str, Tensor],
    facts: dict[str, Any],
) -> str:
    """Writes report.md, figures.json and pictures of both into `out`; returns what they come to.

    small: uint8 [N, 3, H, W], decoded. true and each of `pictures`: uint8 [N, 3, 2 H, 2 W]; those
    of AGAINST and BOUNDS are no drawings.
    """
    inside, kinds = tile_masks(scenes, true.shape[-1]), borders(true.shape[-1] // _STEP // 4, _STEP)
    figures: dict[str, dict[str, Any]] = {
        name: {
            "psnr": float(decibels(some, true).mean()),
            "psnr_inside_tiles": float(decibels(some, true, inside).mean()),
            "sharpness": sharpness(some, inside) / sharpness(true, inside),
            "all": score(some, scenes)["all"],
            "jumps": jumps(some, true, kinds),
        }
        for name, some in pictures.items()
    }
    drawn = [name for name in pictures if name not in (*AGAINST, *BOUNDS)]
    for name in figures:  # beyond what code borders have, and the true picture after the image tokenizer has there
        figures[name]["seam"] = _step(figures[name]["jumps"]) - _step(figures["bound"]["jumps"])
    ways = sorted(drawn, key=lambda name: -figures[name]["psnr"])
    firsts = {name.partition(",")[0]: name for name in reversed(ways)}  # of each model its best way
    best, others = ways[0], [name for name in firsts.values() if name != ways[0]]
    ours = decibels(pictures[best], true)
    above = {name: compare(ours, decibels(pictures[name], true)) for name in AGAINST}
    write_json(out / "figures.json", facts | {"best": best, "best_above": above, "figures": figures})
    shown = [
        small.repeat_interleave(2, 2).repeat_interleave(2, 3),
        *(pictures[n] for n in AGAINST),
        pictures[best],
        true,
    ]
    cells = [(text, [some[k] for some in shown]) for k, text in enumerate(captions[:SHOWN])]
    note = f"small, enlarged; bicubic; codes repeated; magnified ({best}); true"
    contact_sheet(cells, out / "sheet.png", columns=2, zoom=1, note=note)
    mapped = ["bicubic", *others, best, "bound"]
    maps = [(name, [error_map(pictures[name], true, kinds)]) for name in mapped]
    words = f"mean error, black 0 to white {_MOST} of 255; red: where windows meet"
    contact_sheet(maps, out / "errors.png", columns=2, zoom=3, note=words)
    curves(_profiles(pictures, true, kinds, mapped), out / "seams.png", across="pixel")
    verdict = _verdict(figures, above, best, others)
    write_text(out / "report.md", _page(verdict, figures, above, best, facts, len(scenes)))
    return verdict


def tile_masks(scenes: Sequence[Scene], side: int) -> Tensor:
    """bool [N, side, side]: where the scenes' emoji stand."""
    found, scale = torch.zeros(len(scenes), side, side, dtype=torch.bool), side // SIZE
    for mask, scene in zip(found, scenes, strict=True):
        for _, place in scene.placed:
            x, y = (scale * n for n in PLACES[place][0])
            mask[y : y + scale * TILE, x : x + scale * TILE] = True
    return found


def sharpness(pictures: Tensor, inside: Tensor) -> float:
    """Mean difference of neighbouring pixels inside a mask."""
    steps = pictures.float().diff(dim=3).abs().mean(dim=1)
    return float(steps[inside[:, :, 1:] & inside[:, :, :-1]].mean())


def error_map(pictures: Tensor, true: Tensor, kinds: tuple[Tensor, Tensor]) -> Tensor:
    """uint8 [3, H, W]: the mean error of each pixel, and in red the seams."""
    error = (pictures.float() - true.float()).abs().mean(dim=(0, 1))
    grey = (error * 255 / _MOST).clamp(0, 255).to(torch.uint8).expand(3, -1, -1).clone()
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None]
    grey[:, :, :-1][:, kinds[0] == 0] = red
    grey[:, :-1][:, kinds[1] == 0] = red
    return grey


Lines = dict[str, tuple[list[float], list[float]]]


def _profiles(
    pictures: dict[str, Tensor], true: Tensor, kinds: tuple[Tensor, Tensor], names: Sequence[str]
) -> list[tuple[str, Lines]]:
    """Mean error by column and by row, and where seams are."""
    panels = []
    for title, dim, kind in (("column", 2, kinds[0]), ("row", 3, kinds[1].t())):
        errors = {n: (pictures[n].float() - true.float()).abs().mean(dim=(0, 1, dim)).tolist() for n in names}
        lines: Lines = {name: ([float(x) for x in range(len(line))], line) for name, line in errors.items()}
        top, places = max(map(max, errors.values())), (kind == 0).any(dim=0).nonzero().flatten().tolist()
        lines["where windows meet"] = [p + 0.5 for p in places for _ in range(3)], [0.0, top, math.nan] * len(places)
        panels.append((f"mean error of 255, by {title}", lines))
    return panels


def _step(jump: dict[str, float]) -> float:
    return jump["seams"] - jump["code borders"]


def _verdict(figures: dict[str, dict[str, Any]], above: dict[str, Any], best: str, others: Sequence[str]) -> str:
    words = []
    for name, found in above.items():
        low, high = found["interval"]
        how = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        words.append(f"{how} {name} ({found['difference']:+.2f} dB, 95 % interval {low:+.2f} to {high:+.2f})")
    psnr = {name: f["psnr"] for name, f in figures.items()}
    rest = [f"{name} has {psnr[name]:.2f} dB" for name in (*others, *BOUNDS)]
    seams = [f"{figures[name]['seam']:+.2f} ({name})" for name in (best, *others)]
    return (
        f"By PSNR to the true picture, {psnr[best]:.2f} dB, magnification ({best}) is {' and '.join(words)}; "
        f"{', '.join(rest)}. Seams add {' and '.join(seams)} of 255 to the error of the step from pixel to pixel."
    )


def _page(
    verdict: str,
    figures: dict[str, dict[str, Any]],
    above: dict[str, Any],
    best: str,
    facts: dict[str, Any],
    count: int,
) -> str:
    steps = " | ".join(f"steps, {kind}" for kind in KINDS)
    rows = [f"| | PSNR | inside the emoji | sharpness | recognised | {steps} | seams add |"]
    rows.append("|---" + "|---:" * (5 + len(KINDS)) + "|")
    for name, f in figures.items():
        jumped = " | ".join(f"{f['jumps'][kind]:.2f}" for kind in KINDS)
        inside, sharp = f["psnr_inside_tiles"], f["sharpness"]
        rows.append(
            f"| {name} | {f['psnr']:.2f} | {inside:.2f} | {sharp:.2f} | {f['all']:.0%} | {jumped} | {f['seam']:+.2f} |"
        )
    trained, base = dict(facts["models"]), facts["models"]["gpt"]
    lenses = [
        f"  - {name}: {m['steps']:,} steps in {m['seconds'] / 60:.1f} minutes, held-out loss of the large picture "
        f"{m['held_out']['image_loss']:.3f}, of the small one {m['held_out']['small_loss']:.3f}"
        for name, m in trained.items()
        if name != "gpt"
    ]
    slowest = max(facts["seconds_per_picture"].values())
    sizes = facts["sizes"]
    return f"""{verdict}

# Super-resolution

{count} scenes that training never saw, from 8 x 8 codes (64 pixels) to 16 x 16 (128 pixels), in the windows that the
paper magnifies 32 x 32 codes to 64 x 64 in.

{chr(10).join(rows)}

PSNR in dB, means over pictures. Sharpness: differences between neighbouring pixels of the emoji, as a share of the true
picture's. Recognised: the emoji matcher explains the picture by its scene. Steps: mean error, of 255, of the difference
between two neighbouring pixels, where windows meet, where only codes do, and elsewhere. Seams add what they have more
than borders of codes, less the same of the bound, which has no windows. The bound is the true picture after the image
tokenizer; the true small picture, enlarged bicubically, has not gone through it.

![small, bicubic, codes repeated, magnified, true](sheet.png)

![mean error of each pixel](errors.png)

![mean error by column and row](seams.png)

## How

- Image tokenizer: {sizes["image_steps"]:,} steps on {sizes["scenes"]:,} scenes of 128 pixels, half of them at 64.
- The model that draws at 64 pixels: {base["steps"]:,} steps in {base["seconds"] / 60:.1f} minutes, held-out image loss
  {base["held_out"]["image_loss"]:.3f}. Finetuned on {sizes["crops"]} squares of each scene, 4 x 4 codes to 8 x 8:
{chr(10).join(lenses)}
- Cut from pictures: a square is tokenised by itself, as published. Cut from codes: the whole picture is, at either
  size, and squares are taken of its codes; these know what is around, as those do that magnification is given.
- {slowest:.2f} seconds a picture, many at once; threads: {facts["threads"]}.
"""
