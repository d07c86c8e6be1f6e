"""What answers come to: of each model the scores and how often it is the best, super-resolution against none."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cogview.config import require
from cogview.data.files import write_json
from cogview.human import report
from cogview.human.answers import Answers, Scores, read
from cogview.human.key import SCORES, Key, Picture
from cogview.pictures import check_place
from cogview.studies.paired import compare


class Judged(NamedTuple):
    """A picture by one evaluator."""

    picture: Picture
    scores: Scores
    best: bool


def run(paths: Sequence[Path], key: Path, out: Path) -> str:
    """Writes report.md, figures.json and scores.png; returns the first sentence."""
    known = Key.read(key)
    answers = read(paths, known)
    check_place(out / "report.md")
    figures = measure(answers, known)
    write_json(out / "figures.json", figures)
    return report.write(out, figures)


def measure(answers: Sequence[Answers], key: Key) -> dict[str, Any]:
    """Of the evaluators who are kept; ValueError where none is."""
    dropped = {str(one.evaluator): one.fault for one in answers if one.fault}
    kept = [one for one in answers if not one.fault]
    why = "; ".join(f"evaluator {number}: {fault}" for number, fault in list(dropped.items())[:5])
    require(bool(kept), "answers", "those of at least one evaluator that can be kept", why)
    judged = [found for one in kept for found in _judged(one, key)]
    groups = {name: [one for one in judged if one.picture.model == name] for name in key.models}
    figures = {
        "form": key.form,
        "captions": len(key.captions),
        "evaluators": {"asked": len(key.shown), "answered": len(answers), "kept": len(kept), "dropped": dropped},
        "agreement": {str(one.evaluator): one.agreement for one in kept},
        "comparisons": len(kept) * len(key.captions),
        "models": {name: _figures(some) for name, some in groups.items()},
    }
    if key.ab is not None:
        figures["super_resolution"] = {"model": key.ab} | _against(groups[key.ab], len(key.captions))
    return figures


def _judged(answers: Answers, key: Key) -> list[Judged]:
    return [
        Judged(key.pictures[number], given, number == best)
        for scores, best in zip(answers.scores, answers.best, strict=True)
        for number, given in scores.items()
    ]


def _figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Share of the captions of which it was chosen as the best, and of each score mean and standard deviation."""
    scores = {name: [one.scores[name] for one in judged] for name in SCORES}
    return {
        "judgements": len(judged),
        "best": statistics.fmean(one.best for one in judged),
        "scores": {n: {"mean": statistics.fmean(s), "deviation": statistics.pstdev(s)} for n, s in scores.items()},
    }


def _against(judged: Sequence[Judged], captions: int) -> dict[str, Any]:
    """With and without; and the difference of means of the same caption, over the captions judged both ways."""
    sides = {kind: [one for one in judged if one.picture.enlarged == kind] for kind in (False, True)}
    found: dict[str, Any] = {}
    for name, kind in (("without", False), ("with", True)):
        found[name] = _figures(sides[kind]) if sides[kind] else None
    both = {c: [[one for one in sides[k] if one.picture.caption == c] for k in (True, False)] for c in range(captions)}
    pairs = [pair for pair in both.values() if all(pair)]
    found["captions"] = len(pairs)
    if not pairs:
        return found | {"difference": None}
    means = {
        name: torch.tensor([[statistics.fmean(one.scores[name] for one in side) for side in pair] for pair in pairs])
        for name in SCORES
    }
    return found | {"difference": {name: compare(values[:, 0], values[:, 1]) for name, values in means.items()}}
