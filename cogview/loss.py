"""Token losses: float32 log-softmax over a tied head, a chunk of tokens at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cogview.half import product

_CHUNK_LOGITS = 2**26  # float32 logits alive at once: 256 MB
_GAIN = 64.0  # of probabilities in float16, whose smallest would be lost
_HALF_ROWS = 4096  # whose gradients of the head are added up in float16, which more of one label could leave


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
    return F.cross_entropy(product(hidden, head.t()).float(), labels, reduction="none")


def weighted_nll(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of `token_nll` times weights, float32 [B, S], and the losses themselves, which have no gradient here.

    Since weights are known, the gradients of hidden and head are computed while a chunk's logits are there: these are
    computed once, and the backward only scales what it finds.
    """
    if torch.is_grad_enabled():
        return _WeightedNll.apply(hidden, head, labels, weights)
    nll = token_nll(hidden, head, labels)
    return (nll * weights).sum(), nll


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        nll, grad_hidden = hidden.new_empty(labels.shape, dtype=torch.float32), hidden.new_empty(hidden.shape)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        columns = labels.reshape(-1, 1), weights.reshape(-1, 1), nll.view(-1, 1)
        tensors = hidden.flatten(0, 1), grad_hidden.flatten(0, 1), *columns
        size = chunk_rows(len(head))
        if head.dtype == torch.float16:
            size = min(size, _HALF_ROWS)
        for x, grad_x, y, w, loss in zip(*(t.split(size) for t in tensors), strict=True):
            z = product(x, head.t()).float()
            z -= z.amax(1, keepdim=True)
            label = z.gather(1, y)
            total = z.exp_().sum(1, keepdim=True)
            loss.copy_(total.log() - label)
            if head.dtype == torch.float16:  # which exponentials of a large vocabulary could leave, at any loss scale
                z.mul_(_GAIN / total)
                total.fill_(_GAIN)
            # the gradient of a row's logits is w / total * (exponentials - total at the label)
            grad = z.scatter_add_(1, y, -total).to(head.dtype)
            del z
            scale = w / total
            grad_x.copy_(product(grad, head)).mul_(scale)
            grad_head += product(grad.t(), (x * scale).to(x.dtype))
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors  # scaled in place: once is enough, and they are large
        return grad_hidden.mul_(grad), grad_head.mul_(grad).to(ctx.dtype), None, None


def weighted_mean(nll: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of nll; 0 where no weight is."""
    return (nll * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def check_finite(rows: Tensor) -> None:
    """ValueError names the first of rows [B, ...], which come from logits, that has a value that is not finite."""
    finite = rows.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"the model's logits are not finite, in row {int(finite.int().argmin())} of {len(rows)}")


def row_means(nll: Tensor, kept: Tensor) -> Tensor:
    """Means [B] of nll [B, S] over the places that are kept (bool [B, S]), NaN where none is.

    ValueError where one of them is not finite.
    """
    chosen = torch.where(kept, nll, 0)
    check_finite(chosen)
    return chosen.sum(dim=1) / kept.sum(dim=1)
