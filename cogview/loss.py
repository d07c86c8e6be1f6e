"""Token losses: float32 log-softmax over a tied head, a chunk of tokens at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**26  # float32 logits alive at once: 256 MB


def chunk_rows(vocabulary: int) -> int:
    """Tokens whose logits are alive at once."""
    return max(1, _CHUNK_LOGITS // vocabulary)


def token_nll(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood, float32 [B, S], of labels [B, S] under `softmax(hidden @ headᵀ)`.

    hidden [B, S, C], head [V, C]. Large batches are split, and a chunk's logits computed again in the
    backward pass, so that they never exist all at once.
    """
    flat, rows = hidden.flatten(0, 1), labels.flatten()
    size = chunk_rows(len(head))
    if len(rows) <= size:
        return _nll(flat, head, rows).view_as(labels).clone()
    parts = [
        checkpoint(_nll, x, head, y, use_reentrant=False)
        for x, y in zip(flat.split(size), rows.split(size), strict=True)
    ]
    return torch.cat(parts).view_as(labels).clone()  # FSDP wants no views


def _nll(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), labels, reduction="none")


def weighted_mean(nll: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of nll; 0 where no weight is."""
    return (nll * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def check_finite(rows: Tensor) -> None:
    """ValueError names the first of rows [B, ...], which come from logits, that has a value that is not finite."""
    finite = rows.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"the model's logits are not finite, in row {int(finite.int().argmin())} of {len(rows)}")


def row_means(nll: Tensor, kept: Tensor) -> Tensor:
    """Means [B] of nll [B, S] over the places that are kept (bool [B, S]), 0 where none is.

    ValueError where one of them is not finite.
    """
    chosen = torch.where(kept, nll, 0)
    check_finite(chosen)
    return chosen.sum(dim=1) / kept.sum(dim=1).clamp_min(1)
