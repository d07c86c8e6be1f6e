"""sample_pivots of packed sequences: as in test_sample_pivots.py, one row for each."""

import itertools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cogview_ops import sample_pivots

ROWS = ("tttiiiiiiiiiiiiiiiii", "", "tttttttt....iiiiiiii", "iiii", ".....", "titititititititititi", "")
TEXT, IMAGE = (torch.tensor([c == kind for c in "".join(ROWS)]) for kind in "ti")
BEGINS = torch.tensor([0, *itertools.accumulate(map(len, ROWS))])


@pytest.mark.parametrize("count", [10, 11, 19, 20, 30])
def test_what_is_drawn(count: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        pivots = sample_pivots(TEXT, IMAGE, count, cu_seqlens=BEGINS, generator=generator)
        assert pivots.shape == (len(ROWS), count)
        assert pivots.dtype == torch.int32
        for row, drawn in zip(ROWS, pivots.tolist(), strict=True):
            chosen = [p for p in drawn if p >= 0]
            assert drawn == chosen + [-1] * (count - len(chosen))
            assert chosen == sorted(set(chosen))
            assert {p for p, kind in enumerate(row) if kind == "t"} <= set(chosen)
            assert all(row[p] in "ti" for p in chosen)
            assert len(chosen) == min(count, sum(kind in "ti" for kind in row))
    other = sample_pivots(TEXT, IMAGE, 10, cu_seqlens=BEGINS, generator=torch.Generator().manual_seed(9))
    again = sample_pivots(TEXT, IMAGE, 10, cu_seqlens=BEGINS.int(), generator=torch.Generator().manual_seed(9))
    assert torch.equal(other, again)


def test_every_image_token_is_equally_likely() -> None:
    row, draws, count = "tttt" + "i" * 16 + "....", 4000, 10
    text, image = (torch.tensor([c == kind for c in row]).repeat(draws) for kind in "ti")
    ends = torch.arange(draws + 1) * len(row)
    pivots = sample_pivots(text, image, count, cu_seqlens=ends, generator=torch.Generator().manual_seed(0))
    frequency = torch.zeros(24).index_add_(0, pivots.flatten().long(), torch.ones(draws * count)) / draws
    assert (frequency[:4] == 1).all()
    assert (frequency[20:] == 0).all()
    p = 6 / 16
    assert ((frequency[4:20] - p).abs() < 5 * (p * (1 - p) / draws) ** 0.5).all()
    together = ((pivots == 4).any(1) & (pivots == 19).any(1)).float().mean()
    assert abs(together - 6 / 16 * 5 / 15) < 0.03


def test_drawing_never_waits_for_the_device() -> None:
    """One graph, then one for all sizes, and nothing read from the tensors: on a GPU there is no synchronisation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample_pivots, fullgraph=True, backend=counter)
    for n in range(2, 6):
        lengths = BEGINS.diff().repeat(n)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        pivots = compiled(TEXT.repeat(n), IMAGE.repeat(n), 10 + n, cu_seqlens=ends)
        assert pivots.shape == (n * len(ROWS), 10 + n)
        assert pivots[len(ROWS), :3].tolist() == [0, 1, 2]
    assert counter.frame_count <= 2
    on_meta = sample_pivots(TEXT.to("meta"), IMAGE.to("meta"), 1, cu_seqlens=BEGINS.to("meta"))
    assert on_meta.shape == (len(ROWS), 1)


@pytest.mark.parametrize("sequences", [0, 3])
def test_nothing_to_draw_from(sequences: int) -> None:
    mask, ends = torch.zeros(0, dtype=torch.bool), torch.zeros(sequences + 1, dtype=torch.int32)
    expected = torch.full((sequences, 4), -1, dtype=torch.int32)
    assert torch.equal(sample_pivots(mask, mask, 4, cu_seqlens=ends), expected)


def test_invalid_masks() -> None:
    table: list[tuple[str, type[Exception], dict[str, Any]]] = [
        ("text_mask", ValueError, {"text_mask": TEXT[None]}),
        ("image_mask", ValueError, {"image_mask": IMAGE[:-1]}),
        ("image_mask", ValueError, {"image_mask": IMAGE | TEXT}),
        ("num_pivots", ValueError, {"num_pivots": 9}),
        ("cu_seqlens", TypeError, {"cu_seqlens": 3}),
        ("cu_seqlens", TypeError, {"cu_seqlens": BEGINS.float()}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS[None]}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS[:-2]}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS.flip(0)}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS.to("meta")}),
    ]
    good = {"text_mask": TEXT, "image_mask": IMAGE, "num_pivots": 10, "cu_seqlens": BEGINS}
    sample_pivots(**good)  # type: ignore[arg-type]
    for name, error, changed in table:
        with pytest.raises(error, match=rf"^{name}: expected .+, got .+"):
            sample_pivots(**{**good, **changed})  # type: ignore[arg-type]
