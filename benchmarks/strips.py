"""What CUDA kernels of local attention do on request, COGVIEW_OPS_STRIPS, as data: how they cut their passes.

Their binding in csrc/bindings reads it at each call; csrc/cuda/local_plan.h has what is taken without.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

VARIABLE = "COGVIEW_OPS_STRIPS"
PLAN = Path(__file__).parents[1] / "csrc" / "cuda" / "local_plan.h"
PASSES = ("forward", "grad_query", "grad_key")
REFUSED = "does not fit"  # what the binding says of a choice that it does not run


class Choice(NamedTuple):
    """Groups of warps, blocks of rows in their ring, rows of units at once; 0: as tuned, or as there is room."""

    groups: int = 0
    blocks: int = 0
    unit_rows: int = 0

    def __str__(self) -> str:
        return ",".join(map(str, self))


def parse(text: str) -> Choice:
    """Of three numbers, as __str__ writes them."""
    if not re.fullmatch(r"\d{1,2},\d{1,2},\d{1,2}", text, re.ASCII):
        raise ValueError(f"choice: expected three numbers up to 99, as in '3,8,1', got {text!r}")
    return Choice(*map(int, text.split(",")))


def spelled(choices: Mapping[str, Choice]) -> str:
    """The variable's value. The backward has no rows of units at once."""
    for name, choice in choices.items():
        if name not in PASSES:
            raise ValueError(f"pass: expected {' or '.join(PASSES)}, got {name!r}")
        if not all(0 <= number <= 99 for number in choice):
            raise ValueError(f"{name}: expected numbers from 0 to 99, got {choice}")
        if name != "forward" and choice.unit_rows:
            raise ValueError(f"{name}: expected no rows of units, got {choice}")
    return ";".join(f"{name}={','.join(map(str, x[: 3 if name == 'forward' else 2]))}" for name, x in choices.items())


@contextmanager
def trying(choices: Mapping[str, Choice]) -> Iterator[None]:
    before = os.environ.get(VARIABLE, "")
    os.environ[VARIABLE] = spelled(choices)
    try:
        yield
    finally:
        os.environ[VARIABLE] = before


def candidates(name: str) -> list[Choice]:
    """More than any window takes: what does not fit is refused before anything of its pass runs."""
    return [Choice(*x) for x in product((3, 4, 2, 1), range(2, 17), (1, 2, 3, 4) if name == "forward" else (0,))]


def tuned(capability: tuple[int, int], head_dim: int) -> dict[str, Choice]:
    """The row of kTuned, or what stands for none."""
    numbers = ", ".join([r"\{(\d+), (\d+), (\d+)\}"] * len(PASSES))
    row = rf"^ +\{{{10 * capability[0] + capability[1]}, {head_dim}, \{{{numbers}\}}\}},$"
    found = re.search(row, PLAN.read_text(), re.MULTILINE)
    flat = [int(x) for x in found.groups()] if found else [0] * 9
    return {name: Choice(*flat[3 * i : 3 * i + 3]) for i, name in enumerate(PASSES)}


def as_row(capability: tuple[int, int], head_dim: int, choices: Mapping[str, Choice]) -> str:
    """Of kTuned."""
    numbers = ", ".join(f"{{{', '.join(map(str, choices[name]))}}}" for name in PASSES)
    return f"    {{{10 * capability[0] + capability[1]}, {head_dim}, {{{numbers}}}}},"
