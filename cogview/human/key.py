"""Who is shown which pictures, and whose they are: the key of a form, which evaluators must not see."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from cogview.config import require
from cogview.data.files import read_object, write_json

SCORES = {"clarity": 5, "texture": 5, "relevance": 5, "overall": 10}
"""What is scored, in this order, from 1 to so many (appendix E)."""
_MAX_BYTES = 64 << 20


class Picture(NamedTuple):
    """Of a caption, by its number from 0 on. enlarged: with super-resolution, in the A-B test."""

    caption: int
    model: str
    enlarged: bool = False


class Plan(NamedTuple):
    """As `Key` has them."""

    pictures: dict[int, Picture]
    shown: list[list[list[int]]]


@dataclass(frozen=True)
class Key:
    form: str
    """Its name, which answers have too."""
    models: list[str]
    ab: str | None
    """Which of them is shown with super-resolution to some, without it to others."""
    captions: list[str]
    shown: list[list[list[int]]]
    """Numbers of pictures, in the order in which evaluator e + 1 sees those of caption c: shown[e][c]."""
    pictures: dict[int, Picture]
    seed: int
    """Of all draws: who knows it can tell the models."""

    def __post_init__(self):
        require(self.ab is None or self.ab in self.models, "ab", f"one of {', '.join(self.models)}", self.ab)
        for numbers in self.shown:
            for caption, some in zip(range(len(self.captions)), numbers, strict=True):
                found = [self.pictures[number] for number in some]
                fits = sorted(picture.model for picture in found) == sorted(self.models)
                require(fits, "shown", "a picture of each model", some)
                require(all(picture.caption == caption for picture in found), "shown", "pictures of a caption", some)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self) | {"pictures": {n: p._asdict() for n, p in self.pictures.items()}})

    @classmethod
    def read(cls, path: Path) -> "Key":
        """ValueError in a sentence where the file is none."""
        fields = read_object(path, "key", _MAX_BYTES)
        try:
            pictures = {int(number): Picture(**picture) for number, picture in fields["pictures"].items()}
            return cls(**fields | {"pictures": pictures})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"key: expected the key that `cogview human form` wrote, got {str(path)!r}") from error


def plan(captions: int, models: Sequence[str], ab: str | None, evaluators: int, seed: int) -> Plan:
    """Of so many captions and evaluators; pictures have numbers from 1 on, in random order.

    The order of the models is drawn for each evaluator and caption. ab: evaluators and captions are divided at random
    into halves Ea, Eb and Ca, Cb; this model's pictures of Ca come without super-resolution to Ea and with it to Eb,
    those of Cb the other way round, so that either half of the judgements is of either kind (appendix E).
    """
    whole = [Picture(c, model, enlarged) for c in range(captions) for model in models for enlarged in (False, True)]
    whole = [picture for picture in whole if picture.model == ab or not picture.enlarged]
    draws = random.Random(f"pictures {seed}")
    draws.shuffle(whole)
    numbers = {picture: number for number, picture in enumerate(whole, 1)}
    first_evaluators, first_captions = (set(draws.sample(range(n), n // 2)) for n in (evaluators, captions))
    shown = list[list[list[int]]]()
    for evaluator in range(evaluators):
        order = random.Random(f"evaluator {evaluator + 1} {seed}")
        seen = list[list[int]]()
        for caption in range(captions):
            enlarged = (evaluator in first_evaluators) != (caption in first_captions)
            some = [numbers[Picture(caption, model, model == ab and enlarged)] for model in models]
            seen.append(order.sample(some, len(some)))
        shown.append(seen)
    return Plan({number: picture for picture, number in numbers.items()}, shown)
