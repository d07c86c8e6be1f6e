"""The pivot tokens of three-region attention: all text and a random sample of the image (CogView, appendix B)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, patterns

_NONE = 2**31 - 1  # no position: larger than any


def sample_pivots(
    text_mask: Tensor,
    image_mask: Tensor,
    num_pivots: int,
    *,
    cu_seqlens: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """All text tokens, and image tokens drawn uniformly without replacement, as ascending positions.

    Runs on the masks' device without waiting for it. In training make one draw per layer, outside activation
    checkpointing (a recomputation must see the same pivots).

    Args:
        text_mask, image_mask: bool `[B, S]`, disjoint; padding is in neither. With cu_seqlens `[total]`.
        num_pivots: P, at least the number of text tokens of every row or sequence (checked on CPU; on other devices
            with COGVIEW_OPS_CHECK=1) and at least 1.
        cu_seqlens: int32 or int64 `[sequences + 1]`, of sequences without padding between them: as in
            `three_region_attention_varlen`.
        generator: of the masks' device; or one for each row, so that what a row draws does not depend on its batch.

    Returns:
        int32 `[B, P]`, strictly ascending, then -1 where a row has fewer than P text and image tokens. With cu_seqlens
        `[sequences, P]`, positions within each sequence.
    """
    for mask, name in ((text_mask, "text_mask"), (image_mask, "image_mask")):
        _checks.tensor(mask, name, (torch.bool,), ndim=2 if cu_seqlens is None else 1)
    _checks.shape(image_mask, "image_mask", text_mask.shape)
    _checks.require(
        image_mask.device == text_mask.device,
        "image_mask",
        lambda: f"text_mask's device {text_mask.device}",
        image_mask.device,
    )
    num_pivots = _checks.integer(num_pivots, "num_pivots", 1)
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, text_mask, "text_mask")
        _checks.cu_seqlens_values(cu_seqlens, text_mask.shape[0])
    _checks.text_fits(text_mask, image_mask, num_pivots, cu_seqlens)
    rank = _uniform(text_mask, generator)
    if cu_seqlens is not None:
        return _of_sequences(rank, text_mask, image_mask, num_pivots, cu_seqlens)
    # text first (rank 2), then image by a random rank in [0, 1), everything else last
    rank = rank.masked_fill(~image_mask, -1).masked_fill(text_mask, 2)
    rank = torch.nn.functional.pad(rank, (0, num_pivots), value=-1)  # also where there are fewer tokens than pivots
    best, index = rank.topk(num_pivots, -1)
    return _ascending(torch.where(best >= 0, index, _NONE))


def _uniform(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """In [0, 1), float32 of this shape."""
    if isinstance(generator, Sequence):
        found = f"{len(generator)} for {tuple(like.shape)}"
        fits = like.dim() == 2 and len(generator) == len(like)
        _checks.require(fits, "generator", "one, or one for each row of [B, S]", found)
        rows = [torch.rand(like.shape[1], device=like.device, generator=own) for own in generator]
        return torch.stack(rows) if rows else torch.rand(like.shape, device=like.device)
    # the overload that takes a generator has no symbolic sizes
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.rand(*like.shape, device=like.device, **given)


def _of_sequences(rank: Tensor, text_mask: Tensor, image_mask: Tensor, num_pivots: int, cu_seqlens: Tensor) -> Tensor:
    """One sort for all: by sequence, in which text is first, then image by its random rank, everything else last."""
    total, last = text_mask.shape[0], 2**25
    sequence, position = patterns.packed(cu_seqlens, total)
    key = torch.where(image_mask, 1 + (rank * 2**24).long(), last).masked_fill(text_mask, 0)  # all bits of a rank
    key, order = (sequence * 2**26 + key).sort()
    chosen = torch.where(key % 2**26 < last, position[order], _NONE)
    chosen = torch.nn.functional.pad(chosen, (0, 1), value=_NONE)
    index = cu_seqlens[:-1, None].long() + torch.arange(num_pivots, device=rank.device)
    inside = (index >= 0) & (index < cu_seqlens[1:, None]) & (index < total)  # not checked on other devices
    return _ascending(chosen[torch.where(inside, index, total)])


def _ascending(chosen: Tensor) -> Tensor:
    """Rows of positions, then -1 for those that are none."""
    chosen = chosen.sort(-1).values
    return torch.where(chosen < _NONE, chosen, -1).int()
