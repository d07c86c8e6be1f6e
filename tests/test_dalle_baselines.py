"""DALLE-pytorch's formulas, as the benchmarks write them, see what they are said to see; the schedule is DALL-E's."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cogview.recipes.dalle import kind_of
from cogview_ops import dalle_attention, patterns
from cogview_ops.bench import baselines, dalle_baselines, dalle_problems
from cogview_ops.bench.correctness import contestants, results
from cogview_ops.bench.problems import NO_BACKWARD

TEXT, GRID = 5, (4, 6)
SEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of steps down and to the right, from key to query
    "row": lambda down, right: (down == 0) & (right >= 0),
    "column": lambda down, right: (down >= 0) & (right == 0),
    "square of 3": lambda down, right: (down >= 0) & (down < 3) & (right >= 0) & (right < 3),
    "square of 5": lambda down, right: (down >= 0) & (down < 5) & (right >= 0) & (right < 5),
}
FORMULAS = {
    "row": dalle_baselines.axial("row", TEXT, GRID),
    "column": dalle_baselines.axial("column", TEXT, GRID),
    "square of 3": dalle_baselines.convolutional(TEXT, GRID, 3),
    "square of 5": dalle_baselines.convolutional(TEXT, GRID),
}


def mask_of(seen: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    position = torch.arange(TEXT + GRID[0] * GRID[1])
    cell = position - TEXT
    down, right = (x[:, None] - x for x in (cell // GRID[1], cell % GRID[1]))
    among_text = (position[:, None] < TEXT) & (position <= position[:, None])
    of_image = (position[:, None] >= TEXT) & ((position < TEXT) | seen(down, right))
    return among_text | of_image


def tensors() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(3, 2, 3, TEXT + GRID[0] * GRID[1], 8, dtype=torch.float64).unbind()


@pytest.mark.parametrize("name", SEEN)
def test_a_formula_is_attention_with_its_own_mask(name: str) -> None:
    """Output and gradients, of two samples and three heads."""
    expected = results(tensors(), True, baselines.vanilla_attention(mask_of(SEEN[name])))
    torch.testing.assert_close(results(tensors(), True, FORMULAS[name]), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", ["row", "column", "convolutional"])
def test_rows_and_columns_are_the_operators_and_the_convolution_is_not(kind: str) -> None:
    operator = dalle_attention(*tensors(), kind=kind, text_len=TEXT, grid=GRID, kernel_size=5, impl="reference")
    formula = FORMULAS["square of 5" if kind == "convolutional" else kind](*tensors())
    assert torch.allclose(operator, formula, atol=1e-13, rtol=0) == (kind != "convolutional")
    torch.testing.assert_close(operator[:, :, :TEXT], formula[:, :, :TEXT], atol=1e-13, rtol=0)


def test_the_schedule_is_that_of_the_recipe() -> None:
    for layers in (1, 2, 8, 64):
        assert dalle_problems.kinds(layers) == [kind_of(i, layers) for i in range(layers)]
    assert dalle_problems.kinds(8)[:4] == ["row", "column", "row", "row"]


def test_work_of_the_schedule_is_that_of_its_layers() -> None:
    sizes = {"heads": 2, "text": 5, "grid": (6, 7), "dim": 8}
    whole = dalle_problems.dalle_schedule(torch.float32, True, layers=6, **sizes)
    kinds = ["row", "column", "row", "row", "row", "convolutional"]
    layers = [dalle_problems.dalle(torch.float32, True, kind=kind, **sizes) for kind in kinds]
    for name in ("bytes", "flops", "exps"):
        assert getattr(whole, name) == sum(getattr(layer, name) for layer in layers) > 0
    assert len(whole.inputs) == 18
    assert len({x.data_ptr() for x in whole.inputs}) == 18


def test_every_layer_of_the_schedule_is_checked() -> None:
    """One wrong layer, the fourth, and the contestant is not timed."""
    sizes = {"heads": 2, "text": 5, "grid": (6, 7), "dim": 8}
    problem = dalle_problems.dalle_schedule(torch.float32, True, layers=6, **sizes)
    how = {"text_len": 5, "grid": (6, 7), "kernel_size": 11, "wrap": False}
    place = torch.arange(5 + 6 * 7)
    right = [
        baselines.sdpa(patterns.dalle(place[:, None], place, kind=kind, **how)) for kind in dalle_problems.kinds(6)
    ]
    wrong = [*right[:3], right[1], *right[4:]]
    tried = {"right": dalle_problems.in_turn(right), "wrong": dalle_problems.in_turn(wrong)}
    calls, failed = contestants(dataclasses.replace(problem, baselines=tried, others={}), True)
    assert set(calls) == {"right", "ours"}
    assert failed["wrong"].startswith("result 3 is off by")


def test_where_a_layer_is_left_out_the_schedule_is() -> None:
    problem = dalle_problems.dalle_schedule(torch.bfloat16, True, heads=1, text=5, grid=(6, 7), dim=8)
    assert problem.baselines["FlexAttention"] == NO_BACKWARD
