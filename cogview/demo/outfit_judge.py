"""What outfits pictures show: at the place of every part the dyed piece that explains the picture best, or nothing.

The background is the nearest of those there are; then, of each piece in each colour, how much better it over that
background fits the picture than the background alone (squared error).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cogview.config import require
from cogview.demo.outfits import BACKGROUNDS, COLOURS, PARTS, SIZE, TILE, Outfit, dyed, held_out

_EXPLAINED = 0.38  # of all that is at a place beside the background: more than noise, less than parts with neighbours
_CORNER = 24  # pixels of a side that no part touches


def shown(pictures: Tensor) -> list[Outfit]:
    """Of uint8 [N, 3, SIZE, SIZE]."""
    fits = pictures.dtype == torch.uint8 and tuple(pictures.shape[1:]) == (3, SIZE, SIZE)
    require(fits, "pictures", f"uint8 [N, 3, {SIZE}, {SIZE}]", pictures)
    corners = torch.cat([pictures[:, :, :_CORNER, :_CORNER], pictures[:, :, -_CORNER:, -_CORNER:]], dim=2)
    known = torch.tensor(BACKGROUNDS, dtype=torch.float32)
    nearest = torch.cdist(corners.float().flatten(2).median(dim=2).values, known).argmin(dim=1).tolist()
    found = []
    for picture, number in zip(pictures.float(), nearest, strict=True):
        above, outfit = picture - known[number][:, None, None], Outfit()
        for part, ((x, y), _) in PARTS.items():
            tiles, energy = _added(part, number)
            there = above[:, y : y + TILE, x : x + TILE].flatten()
            excess = energy - 2 * tiles @ there
            if -float(excess.min()) > _EXPLAINED * float(there.square().sum()):
                outfit[part] = _names(part)[int(excess.argmin())]
        found.append(outfit)
    return found


def _names(part: str) -> list[tuple[str, str]]:
    return [(piece, colour) for piece in PARTS[part][1] for colour in COLOURS]


@cache
def _added(part: str, background: int) -> tuple[Tensor, Tensor]:
    """What each dyed piece adds to a background, float32 [N, 3 T T], and its energy [N]."""
    rgba = torch.stack([torch.from_numpy(np.array(dyed(*name))).permute(2, 0, 1).float() for name in _names(part)])
    ground = torch.tensor(BACKGROUNDS[background], dtype=torch.float32)[:, None, None]
    tiles = (rgba[:, 3:] / 255 * (rgba[:, :3] - ground)).flatten(1)
    return tiles, tiles.square().sum(dim=1)


def score(pictures: Tensor, asked: Sequence[Outfit]) -> dict[str, float]:
    """Shares that are right, over all parts asked for: "piece", "colour", "both"; "both" of "known" and of "held out"
    pairs of piece and colour; "absent": of the parts not asked for those not there; "all": of the pictures."""
    require(len(pictures) == len(asked), "asked", f"one of each of {len(pictures)} pictures", len(asked))
    right: dict[str, list[bool]] = {}
    for found, outfit in zip(shown(pictures), asked, strict=True):
        for part in PARTS:
            if part not in outfit:
                right.setdefault("absent", []).append(part not in found)
                continue
            (piece, colour), got = outfit[part], found.get(part, ("", ""))
            same = {"piece": got[0] == piece, "colour": got[1] == colour, "both": got == (piece, colour)}
            for name, is_right in same.items():
                right.setdefault(name, []).append(is_right)
            right.setdefault("held out" if held_out(piece, colour) else "known", []).append(same["both"])
        right.setdefault("all", []).append(found == outfit)
    return {name: sum(values) / len(values) for name, values in right.items()}
