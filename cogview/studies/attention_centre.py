"""A place, or what stands there? A head that prefers the middle of the picture may only follow the emoji, which all
reach into it. Scenes of one emoji beside the middle have background there too.

L layers, H heads, N = g x g places of the picture.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cogview.attention.look import Seen, look, places_of
from cogview.attention.measure import regions_of
from cogview.attention.report import head_table
from cogview.demo.scenes import PLACES, SIZE, TILE, Scene, caption
from cogview.system import System

PARTS = ("emoji, centre", "background, centre", "emoji, outside", "background, outside")


def tile(place: str, grid: int) -> Tensor:
    """bool [grid * grid]: the places of the picture, in raster order, on which an emoji at a place stands."""
    (left, top), cell = PLACES[place][0], SIZE // grid
    x, y = torch.arange(grid**2) % grid * cell, torch.arange(grid**2) // grid * cell
    return (x >= left) & (x < left + TILE) & (y >= top) & (y < top + TILE)


def parts_of(place: str, grid: int) -> Tensor:
    """bool [4, N]: which places are which of PARTS with an emoji at a place."""
    emoji, centre = tile(place, grid), regions_of(grid)["centre"][1][0]
    return torch.stack([emoji & centre, ~emoji & centre, emoji & ~centre, ~emoji & ~centre])


def centre(system: System, scenes: Sequence[Scene], codes: Tensor) -> dict[str, Any]:
    """Of those scenes of one emoji beside the middle, whose pictures have these codes: their number, and of each of
    PARTS [L, H], how many times as much the lower half of the image gives it as evenly."""
    c = system.recipe.config
    some = [n for n, scene in enumerate(scenes) if scene.second is None and scene.place != "centre"]
    given, even = torch.zeros(c.num_layers, c.num_heads, len(PARTS)), torch.zeros(c.num_layers, 1, len(PARTS))
    lower = regions_of(c.image_grid)["centre"][0][:, 0]
    for n in some:
        (ids,) = system.encode(caption(scenes[n], "en"))
        places, parts = places_of(system, ids), parts_of(scenes[n].place, c.image_grid).float().T
        asked = places.image[lower]

        def see(seen: Seen, asked: Tensor = asked, image: Tensor = places.image, parts: Tensor = parts) -> None:
            visible = seen.visible[asked].float()
            for into, weights in (
                (given[seen.layer, seen.heads], seen.weights[:, asked]),
                (even[seen.layer], (visible / visible.sum(1, keepdim=True))[None]),
            ):
                got = weights[:, :, image].sum(1).cpu()
                into += got @ parts / got.sum(1, keepdim=True)

        look(system, ids, codes[n], see)
    times = (given / even).nan_to_num(0.0)
    rounded = [[[round(x, 4) for x in heads] for heads in layers] for layers in times.movedim(-1, 0).tolist()]
    return {"scenes": len(some), "times": dict(zip(PARTS, rounded, strict=True))}


def told(found: dict[str, Any]) -> str:
    """Of `centre`, a part of the report."""
    if not found["scenes"]:
        return "No scene has one emoji beside the middle."
    emoji, background = (torch.tensor(found["times"][name]) for name in PARTS[:2])
    both = torch.stack([emoji, background], dim=-1).tolist()
    cells = [[f"{own:.1f}, {other:.1f}" for own, other in heads] for heads in both]
    on, off, heads = int((emoji >= 1).sum()), int((background >= 1).sum()), emoji.numel()
    return f"""Of the pictures that all heads are measured on {found["scenes"]} have one emoji beside the middle, which
reaches into the centre; the rest of the centre is background. Of what the lower half gives the image {on} of {heads}
heads give the emoji's part of the centre as much as evenly, or more, {off} its background. How many times as much,
emoji and background, both in the centre:

{head_table(cells)}"""
