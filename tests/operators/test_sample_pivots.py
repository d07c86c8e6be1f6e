"""sample_pivots: all text, a uniform draw from the image, ascending, padded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_ops import sample_pivots, three_region_attention


def masks(*rows: str) -> tuple[Tensor, Tensor]:
    """Rows of "t" (text), "i" (image) and "." (padding) as the two masks."""
    return tuple(torch.tensor([[c == kind for c in row] for row in rows]) for kind in "ti")  # type: ignore[return-value]


ROWS = (
    "tttiiiiiiiiiiiiiiiii",
    "tttttttt....iiiiiiii",
    "iiii................",
    "....................",
    "titititititititititi",
)


@pytest.mark.parametrize("count", [10, 11, 15, 19, 20, 21, 30])
def test_what_is_drawn(count: int) -> None:
    text, image = masks(*ROWS)
    for seed in range(5):
        pivots = sample_pivots(text, image, count, generator=torch.Generator().manual_seed(seed))
        assert pivots.shape == (len(ROWS), count)
        assert pivots.dtype == torch.int32
        for b, row in enumerate(pivots.tolist()):
            chosen = [p for p in row if p >= 0]
            assert row == chosen + [-1] * (count - len(chosen))
            assert chosen == sorted(set(chosen))
            assert set(text[b].nonzero().flatten().tolist()) <= set(chosen)
            assert all(text[b, p] or image[b, p] for p in chosen)
            assert len(chosen) == min(count, int(text[b].sum() + image[b].sum()))


def test_every_image_token_is_equally_likely() -> None:
    text, image = masks("t" * 4 + "i" * 16 + "." * 4)
    draws, count = 4000, 4 + 6
    pivots = sample_pivots(
        text.expand(draws, -1), image.expand(draws, -1), count, generator=torch.Generator().manual_seed(0)
    )
    frequency = torch.zeros(24).index_add_(0, pivots.flatten().long(), torch.ones(draws * count)) / draws
    assert (frequency[:4] == 1).all()
    assert (frequency[20:] == 0).all()
    p = 6 / 16
    assert ((frequency[4:20] - p).abs() < 5 * (p * (1 - p) / draws) ** 0.5).all()
    # pairs as well: without replacement, two given tokens come together with probability 6/16 * 5/15
    together = ((pivots == 4).any(1) & (pivots == 19).any(1)).float().mean()
    assert abs(together - 6 / 16 * 5 / 15) < 0.03


def test_generator_repeats_and_rows_differ() -> None:
    text, image = masks(*["tt" + "i" * 60] * 3)
    first, again, other = (
        sample_pivots(text, image, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(3)
    default = sample_pivots(text, image, 20)
    torch.manual_seed(3)
    assert torch.equal(default, sample_pivots(text, image, 20))


def test_feeds_the_operator() -> None:
    text, image = masks(*["ttt" + "i" * 29, "tttttt" + "i" * 20 + "......"])
    pivots = sample_pivots(text, image, 12)
    q = torch.randn(2, 1, 32, 4)
    out = three_region_attention(q, q, q, pivots, block_size=4, window_blocks=2, impl="reference")
    assert out.isfinite().all()  # type: ignore[union-attr]


def test_never_waits_for_the_device() -> None:
    """One graph, and nothing read from the tensors: on a GPU there is no synchronisation."""
    text, image = masks(*ROWS)
    compiled = torch.compile(lambda t, i: sample_pivots(t, i, 12), fullgraph=True, backend="aot_eager")
    pivots = compiled(text, image)
    assert pivots.shape == (len(ROWS), 12)
    assert (pivots[0, :3] == torch.tensor([0, 1, 2])).all()
    assert sample_pivots(text.to("meta"), image.to("meta"), 1).shape == (len(ROWS), 1)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    assert torch.equal(sample_pivots(mask, mask, 4), torch.full((shape[0], 4), -1, dtype=torch.int32))


def test_invalid_arguments() -> None:
    text, image = masks("tttiii", "t.iiii")
    table: list[tuple[str, type[Exception], tuple[Any, Any, Any]]] = [
        ("text_mask", TypeError, (None, image, 4)),
        ("text_mask", TypeError, (text.int(), image, 4)),
        ("text_mask", ValueError, (text[0], image, 4)),
        ("image_mask", TypeError, (text, image.float(), 4)),
        ("image_mask", ValueError, (text, image[:, :5], 4)),
        ("image_mask", ValueError, (text, image[:1], 4)),
        ("image_mask", ValueError, (text, image.to("meta"), 4)),
        ("image_mask", ValueError, (text, image | text, 4)),
        ("num_pivots", ValueError, (text, image, 2)),
        ("num_pivots", ValueError, (text, image, 0)),
        ("num_pivots", TypeError, (text, image, 4.0)),
    ]
    for name, error, arguments in table:
        with pytest.raises(error, match=rf"^{name}: expected .+, got .+"):
            sample_pivots(*arguments)


def test_a_generator_for_each_row() -> None:
    """What a row draws does not depend on its batch."""
    text, image = torch.zeros(3, 50, dtype=torch.bool), torch.ones(3, 50, dtype=torch.bool)

    def streams(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(s) for s in seeds]

    together = sample_pivots(text, image, 20, generator=streams(1, 2, 1))
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together[1:2], sample_pivots(text[:1], image[:1], 20, generator=streams(2)))
    assert sample_pivots(text[:0], image[:0], 20, generator=[]).shape == (0, 20)
    with pytest.raises(ValueError, match=r"generator: expected one, or one for each row .*, got 2 for \(3, 50\)"):
        sample_pivots(text, image, 20, generator=streams(1, 2))
