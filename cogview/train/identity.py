"""Whether a checkpoint is of the run that is to go on, in words."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CAUSES = ("recipe", "tokenizers", "hold_out", "data", "tokens", "pictures")  # what else differs then follows from these
LATER = ("hold_out", "tokens", "pictures")  # what runs of before they existed do not say
BEFORE = {
    "codebook": "moving_average",
    "reconstruction": "pixels",
    "kl_weight": 6.6,
    "norms": "sandwich",
    "padding": "masked",
    "schedule": [],
    "softmax": "joint",
}  # fields of configs that runs of before they existed do not say, and what they were


class AnotherRun(ValueError):
    """A checkpoint is of another model, other data or another seed than the run that should go on from it."""


def check_same(path: Path, ours: dict[str, Any], header: dict[str, Any]) -> None:
    """AnotherRun says what differs."""
    for name in dict.fromkeys((*CAUSES, *ours)):
        if name not in ours or (name in LATER and name not in header):
            continue
        for part, wanted, got in _differences(name, ours[name], header.get(name)):
            raise AnotherRun(f"{path} is of another run: {_sentence(part, wanted, got)}")


def _differences(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ, fields of a config by their own names."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from _differences(key, ours.get(key), theirs.get(key, BEFORE.get(key)))
    elif ours != theirs:
        yield name, ours, theirs


def other_tokenizers(now: Sequence[str], then: Sequence[Any]) -> list[str]:
    """Which of the text and the image tokenizer, given by their hashes, are not the same."""
    return [kind for kind, a, b in zip(("text", "image"), now, then, strict=True) if a != b]


def _sentence(part: str, now: Any, then: Any) -> str:
    if part == "tokenizers" and isinstance(then, list) and len(then) == len(now):
        others = (f"another {kind} tokenizer" for kind in other_tokenizers(now, then))
        return f"its tokens were made by {' and '.join(others)}"
    if part == "tokens":
        return "its tokens were others, though as many"
    if part == "pictures":
        return "it was trained on other pictures"
    if part == "data" and isinstance(then, int):
        return f"it was trained on {then:,} samples, and now there are {now:,}"
    if part == "hold_out" and isinstance(then, float):
        return f"it held out {then:g} of its samples, and now it would be {now:g}"
    return f"{part}: expected {now!r}, got {then!r}"
