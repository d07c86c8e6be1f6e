"""Attentions over disjoint key sets, joined into one softmax: the glue for other people's kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""`out = sum_i exp(lse_i - lse) * out_i` with `lse = log sum_i exp(lse_i)`, in plain torch, differentiable.

    Args:
        outputs: attention outputs `[B, H, S, D]`, one per disjoint set of keys.
        lses: their natural-log log-sum-exps `[B, H, S]`, float32 or float64; -inf where a set has no visible key.

    Returns:
        `(out, lse)` of the attention over the union; zeros and -inf where no set has a visible key.
    """
    _checks.require(
        len(outputs) == len(lses) and len(outputs) > 0,
        "lses",
        "as many as outputs, at least one",
        lambda: f"{len(outputs)} outputs and {len(lses)} lses",
    )
    for k, (out, part) in enumerate(zip(outputs, lses, strict=True)):
        _checks.tensor(out, f"outputs[{k}]")
        _checks.tensor(part, f"lses[{k}]", (torch.float32, torch.float64))
        _checks.shape(out, f"outputs[{k}]", outputs[0].shape)
        _checks.lse(part, f"lses[{k}]", outputs[0])
    stacked = torch.stack(list(lses))
    alive = (stacked > -torch.inf).any(0)
    # rows without any key: a finite stand-in keeps NaN out of values and gradients
    safe = stacked.masked_fill(~alive, 0)
    lse = torch.logsumexp(safe, 0)
    weights = (safe - lse).exp().masked_fill(~alive, 0)
    out = sum(w[..., None] * o for w, o in zip(weights, outputs, strict=True))
    return out.to(outputs[0].dtype), lse.masked_fill(~alive, -torch.inf)  # type: ignore[union-attr]
