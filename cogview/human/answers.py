"""What evaluators saved, which nobody vouches for, and whose answers are taken."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogview.config import require
from cogview.data.files import read_object
from cogview.human.key import SCORES, Key

MAX_BYTES = 4 << 20
AGREE = 0.8
"""More than this share of an evaluator's best pictures have the highest overall score (appendix E)."""

Scores = dict[str, int]


@dataclass(frozen=True)
class Answers:
    """Of one evaluator to a whole form, with holes where something was not answered."""

    evaluator: int
    scores: list[dict[int, Scores]]
    """Of each caption, by the number of the picture."""
    best: list[int | None]
    """Of each caption."""
    missing: int
    """How many there are not."""

    @property
    def agreement(self) -> float:
        """Share of the captions whose best picture has the highest overall score, alone or with others; of answers
        without holes."""
        pairs = zip(self.scores, self.best, strict=True)
        agreed = [scores[best]["overall"] == max(s["overall"] for s in scores.values()) for scores, best in pairs]  # type: ignore[index]
        return sum(agreed) / len(agreed)

    @property
    def fault(self) -> str:
        """Why they are not taken, or nothing."""
        if self.missing:
            return f"{self.missing:,} answer{'s' if self.missing > 1 else ''} missing"
        if self.agreement <= AGREE:
            return f"{self.agreement:.0%} of the best pictures have the highest overall score, not over {AGREE:.0%}"
        return ""


def read(paths: Sequence[Path], key: Key) -> list[Answers]:
    """Of each evaluator, by number; ValueError in a sentence for a file that is not as the form saves it, and for an
    evaluator with two."""
    require(bool(paths), "answers", "at least one file", "none")
    found = dict[int, tuple[Path, Answers]]()
    for path in paths:
        answers = _read(path, key)
        other, _ = found.setdefault(answers.evaluator, (path, answers))
        twice = f"two of evaluator {answers.evaluator}: {other} and {path}"
        if other is not path:
            raise ValueError(f"answers: expected one file of each evaluator, got {twice}")
    return [found[evaluator][1] for evaluator in sorted(found)]


def _read(path: Path, key: Key) -> Answers:
    fields = read_object(path, "answers", MAX_BYTES)

    def check(ok: bool, expected: str, got: Any, caption: int | None = None) -> None:
        place = "" if caption is None else f"caption {caption} of "
        require(ok, "answers", f"{expected} in {place}{path}", got)

    check(fields.keys() == {"form", "evaluator", "answers"}, "form, evaluator and answers", list(fields))
    form, evaluator, answers = fields["form"], fields["evaluator"], fields["answers"]
    check(form == key.form, f"answers to the form {key.form}", form)
    check(_whole(evaluator, len(key.shown)), f"an evaluator from 1 to {len(key.shown):,}", evaluator)
    check(isinstance(answers, list), "a list of answers", type(answers).__name__)
    check(len(answers) == len(key.captions), f"answers to {len(key.captions):,} captions", len(answers))
    scores, best = list[dict[int, Scores]](), list[int | None]()
    for number, (of, shown) in enumerate(zip(answers, key.shown[evaluator - 1], strict=True), 1):
        check(isinstance(of, dict) and of.keys() == {"scores", "best"}, "scores and best", of, number)
        names = {str(picture): picture for picture in shown}
        known = isinstance(of["scores"], dict) and of["scores"].keys() <= names.keys()
        check(known, f"scores of the pictures {', '.join(names)}", of["scores"], number)
        for given in of["scores"].values():
            known = isinstance(given, dict) and given.keys() <= SCORES.keys()
            check(known, f"scores of {', '.join(SCORES)}", given, number)
            for name, score in given.items():
                check(_whole(score, SCORES[name]), f"a number from 1 to {SCORES[name]} for {name}", score, number)
        chosen = of["best"]
        fits = chosen is None or (_whole(chosen, max(shown)) and chosen in shown)
        check(fits, f"one of the pictures {', '.join(names)} or null as the best", chosen, number)
        scores.append({names[picture]: given for picture, given in of["scores"].items()})
        best.append(chosen)
    asked = sum(len(shown) * len(SCORES) + 1 for shown in key.shown[evaluator - 1])
    there = sum(len(given) for some in scores for given in some.values()) + sum(chosen is not None for chosen in best)
    return Answers(evaluator, scores, best, asked - there)


def _whole(value: Any, most: int) -> bool:
    """A whole number from 1 on; True is none."""
    return type(value) is int and 1 <= value <= most
