"""Selective activation checkpointing that knows these operators.

    from cogview_ops.checkpointing import selective_contexts
    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=selective_contexts)

A block is computed again in the backward, but for its attentions: of all that a transformer computes they take the
longest for each byte of output, of these operators (outputs and lse) as of SDPA's fused kernels. Norms, softmax and
projections are computed again, and so are FlexAttention and SDPA's plain formula, which are no operators of their own;
`also_save` keeps more, all products, say:
`functools.partial(selective_contexts, also_save=(torch.ops.aten.mm.default,))`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from . import _manifest, _namespaces

_ATTENTIONS = frozenset(x.forward for x in _manifest.KERNELS if "attention" in x.name and x.differentiable)
_SDPA = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)


def policy(ctx: Any, op: Any, *args: Any, also_save: Sequence[Any] = (), **kwargs: Any) -> CheckpointPolicy:
    """What `torch.utils.checkpoint.create_selective_checkpoint_contexts` asks of each operator."""
    own = isinstance(op, torch._ops.OpOverload) and op.namespace in _namespaces.ALL
    saved = op._opname in _ATTENTIONS if own else op in _SDPA
    return CheckpointPolicy.MUST_SAVE if saved or op in also_save else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts(also_save: Sequence[Any] = ()) -> Any:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`; `also_save`: operators, `torch.ops.<…>.default`."""
    for op in also_save:
        if not isinstance(op, torch._ops.OpOverload):  # a packet of overloads would be equal to none
            raise TypeError(f"also_save: expected operators as torch.ops.aten.mm.default, got {op!r}")
    return create_selective_checkpoint_contexts(partial(policy, also_save=tuple(also_save)))
