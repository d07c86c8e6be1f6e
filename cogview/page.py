"""What a page over a run's models answers (`cogview page`): for each tab a function from what people give to what is
shown, a generator where that comes in parts. Nothing here knows what shows it.

Whatever is wrong with what was given is a ValueError; `sentence` has the words for whoever gave it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview import completion
from cogview.bilingual import LANGUAGES
from cogview.cogview2 import CogView2, Settings
from cogview.config import require
from cogview.data.captions import blank
from cogview.data.images import to_rgb
from cogview.editing import AROUND, surrounding
from cogview.inputs import BadCaption, images, whole
from cogview.pictures import image_of
from cogview.progress import Sum
from cogview.recipes.coglm import CogLMCaption
from cogview.sampling import check_seeds
from cogview.system import Described, Ranked, System

Update = Callable[[float, str], None]
"""Is told what share is done, and what is being done."""
MAX_PIXELS = 1 << 24  # of a picture that is edited; each result is as large, and a PNG
PAINTED = 768  # pixels of the longer side of the copy that people paint on
_WORDS: dict[str, Any] = {"temperature": 0.7, "top_k": 200}  # of captions, as `cogview caption` draws them
_OPAQUE = 64  # of 255: from here on a stroke counts


class Shown(NamedTuple):
    picture: Image.Image
    below: str


class Drawn(NamedTuple):
    candidates: list[Shown]
    """The best first, where the run has a model that ranks them."""
    pictures: list[Shown]
    """The first of these, larger where the run has a model for that; none while they are chosen and enlarged."""
    said: str


class Captioned(NamedTuple):
    pictures: list[Shown]
    """The square that was cut out, and what the image tokenizer leaves of it."""
    captions: list[Described]
    """The lowest CapLoss first; none while they are being drawn."""
    said: str


class Edited(NamedTuple):
    pictures: list[Shown]
    """The one that was given, then the best."""
    said: str


@dataclass(frozen=True)
class Models:
    """Of one run: what draws small pictures, and what of the others is there."""

    base: System
    how: Settings = field(default_factory=Settings)
    """How each stage draws; `lens` as direct does."""
    judge: System | None = None
    """Ranks them, and captions pictures."""
    cogview2: CogView2 | None = None
    """Edits, and enlarges where it has its other stages."""
    lens: System | None = None
    """Draws them at twice their side, in a run without CogView2."""

    @classmethod
    def of(cls, cogview2: CogView2, how: Settings | None = None) -> "Models":
        """Those of CogView2, which ranks its own."""
        return cls(cogview2.base, Settings() if how is None else how, judge=cogview2.base, cogview2=cogview2)

    @property
    def all(self) -> list[System]:
        stages = [self.base, self.judge, self.lens] if self.cogview2 is None else self.cogview2.stages
        return [model for model in stages if model is not None]

    @property
    def enlarge(self) -> bool:
        return self.lens is not None or (self.cogview2 is not None and self.cogview2.direct is not None)

    @property
    def as_drawn(self) -> bool:
        """Whether what is drawn stays as it is: neither ranked nor enlarged."""
        return self.judge is None and not self.enlarge

    @property
    def languages(self) -> list[str]:
        """Which captions can be asked for in; none where the model chooses."""
        recipe = None if self.judge is None else self.judge.recipe.drawing("captions")
        return list(LANGUAGES) if isinstance(recipe, CogLMCaption) else []

    def work(self, candidates: int, count: int) -> int:
        """Cells to be drawn."""
        if self.cogview2 is not None:
            return self.cogview2.work(1, count, candidates)
        return (candidates + (0 if self.lens is None else 4 * count)) * self.base.recipe.config.image_tokens

    def candidates(self, caption: str, seeds: Sequence[int], update: Callable[[int], None]) -> Iterator[Tensor]:
        """Small codes [b, h, w], a batch after the other."""
        return self.base.code_batches([caption] * len(seeds), self.how.base, seeds=seeds, update=update)

    def ranked(self, caption: str, codes: Tensor) -> Ranked:
        """Candidates in the order of CapLoss; without a judge in their own, and CapLoss is NaN."""
        if self.judge is None:
            return Ranked(torch.arange(len(codes)), torch.full((len(codes),), torch.nan))
        return self.judge.rerank(caption, codes, batch_size=self.how.base.batch_size)

    def enlarged(self, caption: str, codes: Tensor, seeds: Sequence[int], told: Sum) -> Tensor:
        """uint8 [n, 3, H, W] of small codes [n, h, w], as `generate` makes them of these seeds."""
        if self.lens is not None:
            about: dict[str, Any] = {"seeds": seeds, "update": told.part()}
            return torch.cat(list(self.lens.magnify_batches([caption] * len(codes), codes, self.how.direct, **about)))
        if self.cogview2 is None:
            return self.base.pictures(codes)
        ids = self.base.encode(caption) * len(codes)
        direct, fine = self.cogview2.enlarge(ids, codes, self.how, seeds, told)
        return self.base.pictures(next(c for c in (fine, direct, codes) if c is not None))


def draw(
    models: Models,
    caption: str,
    candidates: int | None = None,
    count: int = 1,
    seed: int = 0,
    update: Update = lambda share, doing: None,
) -> Iterator[Drawn]:
    """Many small pictures of a caption, a batch after the other, all of them in their order, then the best `count`,
    larger. candidates: default as many."""
    caption, seeds = _asked(models, caption, candidates, count, seed)
    begun, total, doing = time.monotonic(), models.work(len(seeds), count), f"drawing {_several(len(seeds), 'picture')}"
    told = Sum(lambda cells: update(min(1.0, cells / total), doing))
    update(0.0, doing)
    codes, small = list[Tensor](), list[Shown]()
    for part in models.candidates(caption, seeds, told.part()):
        codes.append(part)
        small = [*small, *_shown(models.base.pictures(part), [f"seed {s}" for s in seeds[len(small) :]])]
        said = f"{len(small)} of {_several(len(seeds), 'picture')} drawn …"
        yield Drawn(small, small if models.as_drawn else [], said)
    ranking = models.ranked(caption, torch.cat(codes))
    order = ranking.order.tolist()
    if models.judge is not None:
        scores = _scores(ranking.caploss)
        small = [Shown(small[n].picture, scores[n]) for n in order]
    if models.enlarge:
        doing = f"enlarging {'the best of them' if models.judge is not None else 'them'}"
        yield Drawn(small, [], f"{doing.capitalize()} …")
    chosen = order[:count]
    larger = models.enlarged(caption, torch.cat(codes)[chosen], [seeds[n] for n in chosen], told)
    pictures = _shown(larger, [one.below for one in small])
    yield Drawn(small, pictures, f"{_several(count, 'picture')} in {_seconds(begun)}.")


def describe(
    models: Models,
    path: Path | None,
    count: int = 1,
    language: str | None = None,
    seed: int = 0,
    update: Update = lambda share, doing: None,
) -> Iterator[Captioned]:
    """What the model sees of a picture, then the captions among `count` drawn ones that are not the same, as `cogview
    caption` draws them. language: of `models.languages`."""
    assert models.judge is not None
    given, judge = opened(path, exact=False), models.judge
    count, seed, begun = _whole(count, "captions", 1), _whole(seed, "seed", 0), time.monotonic()
    doing = f"writing {_several(count, 'caption')}"
    update(0.0, doing)
    square = images(given, judge.side)
    codes, cut = judge.tokenize(square), _cut(given, judge.side)
    pictures = _shown(torch.cat([square, judge.pictures(codes)]), ["cut out", "as the model sees it"])
    yield Captioned(pictures, [], f"{cut} {doing.capitalize()} …")
    about: dict[str, Any] = {"seed": seed, "language": language, "batch_size": models.how.base.batch_size}
    (found,) = judge.describe(codes, count, **about, **_WORDS)
    several = _several(len(found), "caption") if found else "No caption: the model ends it at once,"
    yield Captioned(pictures, found, f"{cut} {several} in {_seconds(begun)}.")


def opened(path: Path | None, exact: bool = True) -> Tensor:
    """uint8 [3, H, W] of an uploaded picture, as large as it is. exact: to be edited, [4, H, W] with transparency."""
    if path is None:
        raise ValueError("Open a picture first.")
    try:
        given = whole(path, exact=exact)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ").removeprefix("image: ")
        raise ValueError(f"The file {path.name}: {reason}") from error
    height, width = given.shape[1:]
    most = f"a picture of at most {MAX_PIXELS / 1e6:.0f} million pixels"
    require(not exact or height * width <= MAX_PIXELS, f"The file {path.name}", most, f"{width} x {height}")
    return given


def to_paint_on(given: Tensor) -> Image.Image:
    """A copy of a size that people can paint on."""
    image = to_rgb(image_of(given))
    share = PAINTED / max(image.size)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.NEAREST if share > 1 else Image.Resampling.LANCZOS)


def painted(strokes: Sequence[Image.Image], given: Tensor, around: float = AROUND) -> Tensor:
    """The mask bool [H, W] of strokes, RGBA, on such a copy of any size; ValueError where it is no part of the picture
    that can be drawn anew."""
    height, width = given.shape[1:]
    mask = torch.zeros(height, width, dtype=torch.bool)
    for layer in strokes:
        scale = max(layer.size) / max(height, width)
        if abs(layer.width - width * scale) > 1 or abs(layer.height - height * scale) > 1:
            raise ValueError("What is painted is of another picture: open this one again.")
        alpha = layer.convert("RGBA").getchannel("A").resize((width, height), Image.Resampling.BILINEAR)
        mask |= torch.from_numpy(np.array(alpha) >= _OPAQUE)
    if not bool(mask.any()):
        raise ValueError("Nothing is painted: paint over the part of the picture that is to be drawn anew.")
    if bool(mask.all()):
        raise ValueError("Everything is painted: leave a part of the picture, by which the rest is drawn.")
    try:
        surrounding(mask, around)
    except ValueError as error:
        longest = f"no higher or wider than {min(height, width)} pixels, the picture's shorter side"
        raise ValueError(f"Too much is painted: what is drawn anew is to be {longest}.") from error
    return mask


def edit(
    models: Models,
    path: Path | None,
    strokes: Sequence[Image.Image],
    caption: str,
    candidates: int | None = None,
    count: int = 1,
    seed: int = 0,
    feather: int = 0,
    around: float = AROUND,
    update: Update = lambda share, doing: None,
) -> Edited:
    """What is painted over of a picture drawn anew; all other pixels are those of the file. strokes: as `painted` takes
    them, on what `to_paint_on` makes of the file. around: as `completion.edit` takes it."""
    assert models.cogview2 is not None
    given = opened(path)
    mask = painted(strokes, given, around)
    caption, seeds = _asked(models, caption, candidates, count, seed)
    begun, total, doing = time.monotonic(), models.work(len(seeds), count), "drawing what is painted over"
    about: dict[str, Any] = {"count": count, "candidates": len(seeds), "seed": seeds[0]}
    about |= {"feather": _whole(feather, "feather", 0), "around": around}
    about["update"] = lambda cells: update(min(1.0, cells / total), doing)
    update(0.0, doing)
    found = completion.edit(models.cogview2, given, mask, caption, models.how, **about)
    pictures = [Shown(image_of(given), "as it was"), *_shown(found.pictures, _scores(found.caploss))]
    return Edited(pictures, f"{_several(count, 'picture')} in {_seconds(begun)}.")


def sentence(error: Exception) -> str:
    """What went wrong, for people who see no command line."""
    if isinstance(error, BadCaption):
        return f"The caption: expected {error.expected}, got {error.got}."
    words = " ".join(str(error).split()) or type(error).__name__
    words = words if len(words) <= 300 else f"{words[:300]}…"
    if not isinstance(error, ValueError):
        words = f"That did not work: {words}"
    return f"{words[0].upper()}{words[1:]}{'' if words[-1] in '.…!?' else '.'}"


def _asked(models: Models, caption: str, candidates: int | None, count: int, seed: int) -> tuple[str, list[int]]:
    """The caption and the seeds of its candidates, of which `count` are kept; ValueError before anything is drawn."""
    if blank(caption or ""):
        raise ValueError("Write a caption: what the picture is to show.")
    count = _whole(count, "kept", 1)
    drawn = count if candidates is None else _whole(candidates, "candidates", 1)
    require(drawn >= count, "candidates", f"at least as many as are kept ({count})", drawn)
    first, caption = _whole(seed, "seed", 0), caption.strip()
    for model in models.all:
        model.encode(caption)
    return caption, check_seeds(range(first, first + drawn), drawn)


def _cut(given: Tensor, side: int) -> str:
    """How a picture becomes the square of `side` pixels that a model takes."""
    height, width = given.shape[1:]
    short = min(height, width)
    part = "The whole picture" if height == width else f"The middle {short} x {short} of {width} x {height} pixels"
    return f"{part}{'' if short == side else f', brought to {side} x {side}'}."


def _whole(value: Any, name: str, least: int) -> int:
    whole_number = isinstance(value, int | float) and value == value // 1 and value >= least
    require(whole_number, name, f"a whole number, at least {least}", value)
    return int(value)


def _shown(pictures: Tensor, names: Sequence[str]) -> list[Shown]:
    return [Shown(image_of(picture), name) for picture, name in zip(pictures, names, strict=False)]


def _scores(caploss: Tensor) -> list[str]:
    return [f"CapLoss {loss:.2f}" for loss in caploss.tolist()]


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _seconds(begun: float) -> str:
    return f"{time.monotonic() - begun:.1f} s"
