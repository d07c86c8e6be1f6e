"""How the operators run on DTensors: what may be sharded over a mesh, forward and backward.

Attention over batch and heads (key heads along with the query's that share them), of packed sequences over heads; norms
and softmax over rows; weights are replicated and get their gradients as partial sums. Anything else is replicated
first, also where the result of a row depends on others: relax="tensor", and dropout, whose mask depends on the place in
the whole tensor.
"""

import itertools
import math
import sys
from typing import Any

import torch

_done: set[str] = set()


def register() -> None:
    """For all operators that are defined by now, if the program uses DTensors at all: they are slow to import."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for namespace in ("cogview_ops", "cogview_ops_triton", "cogview_ops_mixed"):
        ops = getattr(torch.ops, namespace)
        for name, rule in _RULES.items():
            key = f"{namespace}::{name}"
            if key not in _done and hasattr(ops, name):
                _done.add(key)
                register_sharding(getattr(ops, name).default)(rule)


def _replicated(inputs: Any, outputs: int) -> Any:
    from torch.distributed.tensor import Replicate

    return [Replicate()] * outputs, [Replicate() if _is_tensor(x) else None for x in inputs]


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "tensor_meta")


def _rows(inputs: Any, dims: Any, weights: set[int], outputs: int, sums: int = 0) -> Any:
    """Shards of one leading dimension of everything but the weights at these places; `sums`: trailing outputs that are
    sums over rows."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    rules = [_replicated(inputs, outputs + sums)]
    for dim in dims:
        given = [(Replicate() if k in weights else Shard(dim)) if _is_tensor(x) else None for k, x in enumerate(inputs)]
        rules.append(([Shard(dim)] * outputs + [Partial()] * sums, given))
    return rules


def _softmax_fwd(scores: Any, mask: Any, alpha: float, causal: bool) -> Any:
    return _rows((scores, mask, alpha, causal), range(scores.ndim - 1 - causal), set(), 1)


def _softmax_bwd(dout: Any, out: Any, alpha: float, causal: bool) -> Any:
    return _rows((dout, out, alpha, causal), range(out.ndim - 1), set(), 1)


def _layer_norm_fwd(*inputs: Any) -> Any:
    x, _, _, _, relax = inputs
    return _rows(inputs, range(x.ndim - 1) if relax != 2 else (), {1, 2}, 3)


def _layer_norm_bwd(*inputs: Any) -> Any:
    return _rows(inputs, range(inputs[1].ndim - 1), {2}, 1, 2)


def _sandwich_fwd(*inputs: Any) -> Any:
    branch, *_, relax, dropout_p, _ = inputs
    return _rows(inputs, range(branch.ndim - 1) if relax != 2 and dropout_p == 0 else (), {2, 3, 4, 5, 9}, 6)


def _sandwich_bwd(*inputs: Any) -> Any:
    branch, dropout_p = inputs[2], inputs[10]
    return _rows(inputs, range(branch.ndim - 1) if dropout_p == 0 else (), {4, 5, 11}, 2, 4)


def _attention(inputs: Any, query: Any, key: Any, outputs: list[bool]) -> Any:
    """Shards of the batch, and of the heads of all tensors that have them; `outputs`: which there are (the gradients of
    others are empty)."""
    from torch.distributed.tensor import Replicate, Shard

    rules = [_replicated(inputs, len(outputs))]
    for dim in (0, 1) if _heads_stay_together(query, key) else (0,):
        given = [None if not _is_tensor(x) else Shard(dim) if dim == 0 or x.ndim > 2 else Replicate() for x in inputs]
        rules.append(([Shard(dim) if there else Replicate() for there in outputs], given))
    return rules


def _heads_stay_together(query: Any, key: Any) -> bool:
    """Whether queries stay with the key heads that they share, over any dimensions of the mesh."""
    sizes, heads = query.mesh.shape, key.shape[1]
    shards = [math.prod(some) for n in range(1, len(sizes) + 1) for some in itertools.combinations(sizes, n)]
    return query.shape[1] == heads or all(n > heads or heads % n == 0 for n in shards)


def _attention_fwd(*inputs: Any) -> Any:
    return _attention(inputs, inputs[0], inputs[1], [True, True])


def _attention_decode(*inputs: Any) -> Any:
    return _attention(inputs, inputs[0], inputs[1], [True])


def _attention_bwd(*inputs: Any) -> Any:
    return _attention(inputs, inputs[2], inputs[3], [True] * 3)


def _local_bwd(*inputs: Any) -> Any:
    return _attention(inputs, inputs[2], inputs[3], [_is_tensor(x) for x in inputs[2:9]])


def _packed(inputs: Any, query: Any, key: Any, dims: list[int | None], outputs: list[int]) -> Any:
    """Shards of the heads, of each tensor this dimension (None: it has none), and none of the tokens."""
    from torch.distributed.tensor import Replicate, Shard

    rules = [_replicated(inputs, len(outputs))]
    if _heads_stay_together(query, key):
        of = [*dims, *[None] * (len(inputs) - len(dims))]
        given = [
            None if not _is_tensor(x) else Replicate() if dim is None else Shard(dim)
            for x, dim in zip(inputs, of, strict=True)
        ]
        rules.append(([Shard(dim) for dim in outputs], given))
    return rules


def _varlen_fwd(*inputs: Any) -> Any:
    return _packed(inputs, inputs[0], inputs[1], [1, 1, 1], [1, 0])


def _varlen_bwd(*inputs: Any) -> Any:
    return _packed(inputs, inputs[2], inputs[3], [1, 0, 1, 1, 1, 1, 0], [1, 1, 1])


_RULES = {
    "pb_relax_softmax_fwd": _softmax_fwd,
    "pb_relax_softmax_bwd": _softmax_bwd,
    "layer_norm_fwd": _layer_norm_fwd,
    "layer_norm_bwd": _layer_norm_bwd,
    "sandwich_layer_norm_fwd": _sandwich_fwd,
    "sandwich_layer_norm_bwd": _sandwich_bwd,
    "three_region_attention_fwd": _attention_fwd,
    "three_region_attention_bwd": _attention_bwd,
    "three_region_attention_decode": _attention_decode,
    "three_region_attention_varlen_fwd": _varlen_fwd,
    "three_region_attention_varlen_bwd": _varlen_bwd,
    "local_attention_2d_fwd": _attention_fwd,
    "local_attention_2d_bwd": _local_bwd,
    "local_attention_2d_decode": _attention_decode,
}


def beside(x: Any, like: torch.Tensor) -> Any:
    """A plain tensor among DTensors is the same everywhere."""
    if x is None or type(like) is torch.Tensor or type(x) is not torch.Tensor or not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
