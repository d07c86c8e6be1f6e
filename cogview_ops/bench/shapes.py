"""A shape in words: `16x4224x64`, `16x4224x64,pivots=768` or `heads=16,seqlen=4224`; what is not named has its default.

Sizes are named as the problem's builder names them. A batch counts as more heads. Grids, windows and lists of lengths
are written with x, `grid=64x48`; what is true or false by its name alone, `causal`.
"""

import inspect
import re
from typing import Any

from .operators import TIMED, Timed

_OF_BENCHMARKS = ("alone", "without")  # which baselines there are: --baselines says that
Sizes = dict[str, Any]


def sizes(operator: Timed) -> Sizes:
    """Every size of an operator and its default."""
    found = inspect.signature(operator.build).parameters.values()
    given = getattr(operator.build, "keywords", {})  # what makes a variant of it
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY and p.name not in (*_OF_BENCHMARKS, *given)}


def example(name: str) -> str:
    """The shape that it has by default."""
    default = sizes(TIMED[name])
    return "x".join(written(default[key]) for key in TIMED[name].sizes) or _named(_there(default))


def expected(name: str) -> str:
    """What a shape of this operator looks like."""
    order = " x ".join("rows x columns" if key == "grid" else key for key in TIMED[name].sizes)
    named = _named(_there(sizes(TIMED[name])))
    return f"{example(name)} ({order}), or any of {named}" if order else f"any of {named}"


def _there(default: Sizes) -> Sizes:
    """Without those that follow from others."""
    return {key: value for key, value in default.items() if value is not None}


def _named(found: Sizes) -> str:
    return ",".join(f"{key}={written(value)}" for key, value in found.items())


def parsed(name: str, text: str) -> Sizes:
    """What the builder takes. ValueError says what is wrong and what was expected."""
    operator, found = TIMED[name], Sizes()
    default = sizes(operator)
    words = re.split(r",|(?<!=)-", text) if text else []
    try:
        for i, word in enumerate(words):
            key, equals, value = (part.strip() for part in word.partition("="))
            if not equals and i == 0 and operator.sizes and key[:1].isdigit():
                found |= _plain(operator, key)
            elif key not in default:
                raise ValueError(f"there is no size {key!r}")
            elif not equals and not isinstance(default[key], bool):
                raise ValueError(f"{key} has no value")
            else:
                found[key] = _value(key, value if equals else "true", default[key])
    except ValueError as error:
        raise ValueError(f"--shape {text!r}: {error}; expected {expected(name)}") from None
    return found


def split(text: str) -> tuple[tuple[int, ...], str]:
    """The plain numbers that a shape begins with, and the rest."""
    plain, rest = re.fullmatch(r"([\dx]*)(.*)", text).groups()  # type: ignore[union-attr]
    return tuple(int(number) for number in plain.split("x") if number), rest


def written(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def label(name: str, given: Sizes) -> str:
    """The shape of a row, which `parsed` takes again: plain numbers where there are such, as in results of
    `python -m benchmarks`, and what else was given; or all sizes."""
    default = sizes(TIMED[name])
    used = default | given
    if not (plain := "x".join(written(used[key]) for key in TIMED[name].sizes)):
        return _named({key: value for key, value in used.items() if value is not None or default[key] is not None})
    return ",".join([plain, *(f"{k}={written(v)}" for k, v in given.items() if k not in TIMED[name].sizes)])


def _plain(operator: Timed, text: str) -> Sizes:
    numbers = [_positive("a size", part) for part in text.split("x")]
    found: Sizes = {}
    for key in operator.sizes:
        value: Any = (numbers.pop(0), numbers.pop(0)) if key == "grid" and len(numbers) > 1 else None
        if value is None:
            if not numbers:
                raise ValueError("too few numbers")
            value = numbers.pop(0)
        if found.setdefault(key, value) != value:
            raise ValueError(f"{key} is both {found[key]} and {value}")
    if numbers:
        raise ValueError("too many numbers")
    return found


def _value(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{key} is true or false, got {text!r}")
        return text == "true"
    if isinstance(default, str):
        return text
    if isinstance(default, float):
        return float(text)
    if not isinstance(default, tuple):
        return _positive(key, text)
    if text == "none" and key == "coarse":
        return None
    numbers = tuple(_positive(key, part) for part in text.split("x"))
    if key != "lengths" and len(numbers) != len(default):
        raise ValueError(f"{key} is {len(default)} numbers with x between them, got {text!r}")
    return numbers


def _positive(key: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{key} is a whole number from 1 on, got {text!r}")
    return int(text)
