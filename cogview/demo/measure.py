"""Judging pictures against the scenes they were asked to show.

A picture is explained as a scene: the background is the median of its corners, where no emoji ever stands;
then, for every place and emoji, how much better the tile over that background fits the picture than the
background alone (squared error). The explanation is the best of the seven layouts: five places of one
emoji, two of two. Pictures are 64 x 64, or 128 x 128 of scenes at twice the scale.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview.data.shuffle import permutation
from cogview.demo.scenes import BACKGROUNDS, NOUNS, PLACES, RELATIONS, SCALES, SIZE, TILE, Scene, tiles

Picture = Image.Image | Tensor
_NOUNS, _PLACES, _COLOURS = list(NOUNS), list(PLACES), list(BACKGROUNDS)
_LAYOUTS = [(place,) for place in PLACES] + [("left", "right"), ("top", "bottom")]
_CORNER = 16  # pixels of a side that no tile touches


def judge(image: Picture, scene: Scene) -> dict[str, float]:
    """How much of `scene` the picture shows, each 0 to 1 (shares of the two emoji may be a half).

    "emoji": those asked for are among the found. "place": of all places or relations the one asked for fits
    the emoji asked for best. "background": it is the nearest colour. "all": the explanation is the scene.
    """
    return score([image], [scene])


def score(images: Sequence[Picture] | Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """The means of `judge` over pictures, all of a size: RGB, or tensors [3, H, W], uint8 or float to 1."""
    explained = _explain(_stack(images))
    if len(explained) != len(scenes):
        raise ValueError(f"scenes: expected one for each of {len(explained)} images, got {len(scenes)}")
    return _mean([_compare(e, s) for e, s in zip(explained, scenes, strict=True)])


def chance(images: Sequence[Picture] | Tensor, scenes: Sequence[Scene], rounds: int = 20) -> dict[str, float]:
    """What `score` gives if the pictures answer other captions of the same list: its mean over shuffles."""
    explained = _explain(_stack(images))
    if len(explained) != len(scenes) or len(scenes) < 2:
        raise ValueError(f"scenes: expected one for each of 2 or more images, got {len(explained)} and {len(scenes)}")
    results = []
    for round_ in range(rounds):
        order = permutation(len(scenes), round_)
        following = dict(zip(order, np.roll(order, 1), strict=True))  # one cycle: nobody keeps his own
        results += [_compare(explained[i], scenes[j]) for i, j in following.items()]
    return _mean(results)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def _stack(images: Sequence[Picture] | Tensor) -> Tensor:
    """Float32 [B, 3, H, W] in 0..255."""
    tensors, wanted = [], [(3, SIZE * scale, SIZE * scale) for scale in SCALES]
    for image in images:
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        if tuple(image.shape) not in wanted:
            sizes = " or ".join(" x ".join(map(str, size)) for size in wanted)
            raise ValueError(f"images: expected {sizes}, all alike, got {tuple(image.shape)}")
        wanted = [tuple(image.shape)]
        tensors.append(image.float() * 255 if image.is_floating_point() else image.float())
    return torch.stack(tensors) if tensors else torch.empty(0, 3, SIZE, SIZE)


@cache
def _templates(scale: int) -> tuple[Tensor, Tensor]:
    """Colours [N, 3, T, T] in 0..255 and alphas [N, 1, T, T] in 0..1 of all nouns' tiles."""
    rgba = torch.stack([torch.from_numpy(np.array(tiles(scale)[n])).permute(2, 0, 1).float() for n in _NOUNS])
    return rgba[:, :3], rgba[:, 3:] / 255


def _explain(images: Tensor) -> list[tuple[Tensor, dict[str, str], str]]:
    """For each picture: excess error [place, noun], the emoji found by place, and the background."""
    return [one for part in images.split(64) for one in _explain_part(part)]


def _explain_part(images: Tensor) -> list[tuple[Tensor, dict[str, str], str]]:
    scale = images.shape[-1] // SIZE
    colours, alphas = _templates(scale)
    c, side = _CORNER * scale, TILE * scale
    corners = [images[:, :, y, x] for y in (slice(c), slice(-c, None)) for x in (slice(c), slice(-c, None))]
    ground = torch.cat([corner.flatten(2) for corner in corners], dim=2).median(dim=2).values  # [B, 3]
    known = torch.tensor([BACKGROUNDS[name][0] for name in _COLOURS], dtype=torch.float32)
    nearest = torch.cdist(ground, known).argmin(dim=1)
    above = images - ground[:, :, None, None]
    tile = alphas * (colours - ground[:, None, :, None, None])  # [B, N, 3, T, T]: what each noun adds
    energy = tile.square().flatten(2).sum(2)
    excess = torch.empty(len(images), len(_PLACES), len(_NOUNS))
    for number, place in enumerate(_PLACES):
        x, y = (scale * n for n in PLACES[place][0])
        patch = above[:, :, y : y + side, x : x + side]
        excess[:, number] = energy - 2 * torch.einsum("bchw,bnchw->bn", patch, tile)
    explained = []
    for number in range(len(images)):
        best, noun = excess[number].min(dim=1)
        costs = [sum(float(best[_PLACES.index(p)]) for p in layout) for layout in _LAYOUTS]
        layout = _LAYOUTS[int(np.argmin(costs))]
        found = {place: _NOUNS[int(noun[_PLACES.index(place)])] for place in layout}
        explained.append((excess[number], found, _COLOURS[int(nearest[number])]))
    return explained


def _compare(explained: tuple[Tensor, dict[str, str], str], scene: Scene) -> dict[str, float]:
    excess, found, background = explained
    asked = [name for name, _ in scene.placed]
    options: dict[str, tuple[str, ...]] = {place: (place,) for place in PLACES}
    if scene.second is not None:
        options = {relation: (first, second) for relation, (first, second, _, _) in RELATIONS.items()}
    costs = {
        option: sum(float(excess[_PLACES.index(p), _NOUNS.index(n)]) for n, p in zip(asked, places, strict=True))
        for option, places in options.items()
    }
    return {
        "emoji": sum(name in found.values() for name in asked) / len(asked),
        "place": float(min(costs, key=lambda option: costs[option]) == scene.place),
        "background": float(background == scene.background),
        "all": float({p: n for n, p in scene.placed} == found and background == scene.background),
    }


def clarity(images: Sequence[Picture] | Tensor) -> float:
    """How near pictures are to the scenes that explain them, whatever was asked for: the mean PSNR in dB."""
    given = _stack(images)
    scale, shown = given.shape[-1] // SIZE, []
    for _, found, background in _explain(given):
        picture = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[background][0])
        for place, noun in found.items():
            (x, y), tile = PLACES[place][0], tiles(scale)[noun]
            picture.paste(tile, (x * scale, y * scale), tile)
        shown.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return float(decibels(given, torch.stack(shown)).mean())


def decibels(pictures: Tensor, true: Tensor, inside: Tensor | None = None) -> Tensor:
    """PSNR of each picture, float [N], or of its pixels inside a mask bool [N, H, W] alone."""
    squares = (pictures.float() - true.float()).square().mean(dim=1) / 255**2
    weights = torch.ones_like(squares) if inside is None else inside.float()
    return -10 * ((squares * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))).clamp_min(1e-12).log10()
