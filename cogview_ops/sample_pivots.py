"""The pivot tokens of three-region attention: all text and a random sample of the image (CogView, appendix B)."""

from typing import Any

import torch
from torch import Tensor

from . import _checks


def sample_pivots(
    text_mask: Tensor, image_mask: Tensor, num_pivots: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """All text tokens, and image tokens drawn uniformly without replacement, as ascending positions.

    Runs on the masks' device without waiting for it. In training make one draw per layer, outside activation
    checkpointing (a recomputation must see the same pivots).

    Args:
        text_mask, image_mask: bool `[B, S]`, disjoint; padding is in neither.
        num_pivots: P, at least the number of text tokens of every row (checked on CPU; on other devices with
            COGVIEW_OPS_CHECK=1) and at least 1.
        generator: of the masks' device.

    Returns:
        int32 `[B, P]`, strictly ascending, then -1 where a row has fewer than P text and image tokens.
    """
    for mask, name in ((text_mask, "text_mask"), (image_mask, "image_mask")):
        _checks.tensor(mask, name, (torch.bool,), ndim=2)
    _checks.shape(image_mask, "image_mask", text_mask.shape)
    _checks.require(
        image_mask.device == text_mask.device,
        "image_mask",
        lambda: f"text_mask's device {text_mask.device}",
        image_mask.device,
    )
    num_pivots = _checks.integer(num_pivots, "num_pivots", 1)
    _checks.text_fits(text_mask, image_mask, num_pivots)
    batch, seqlen = text_mask.shape
    # the overload that takes a generator has no symbolic sizes
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    rank = torch.rand(batch, seqlen, device=text_mask.device, **given)
    # text first (rank 2), then image by a random rank in [0, 1), everything else last
    rank = rank.masked_fill(~image_mask, -1).masked_fill(text_mask, 2)
    rank = torch.nn.functional.pad(rank, (0, num_pivots), value=-1)  # also where there are fewer tokens than pivots
    best, index = rank.topk(num_pivots, -1)
    chosen = torch.where(best >= 0, index, seqlen).sort(-1).values
    return torch.where(chosen < seqlen, chosen, -1).int()
