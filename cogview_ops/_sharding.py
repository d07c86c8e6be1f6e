"""How the operators run on DTensors: what may be sharded over a mesh, forward and backward.

Attention over batch and heads (key heads along with the query's that share them), of packed sequences over heads; norms
and softmax over rows; weights are replicated and get their gradients as partial sums; products over rows or outputs.
Anything else is replicated first, also where the result of a row depends on others: relax="tensor", and dropout, whose
mask depends on the place in the whole tensor, or, with a seed for each sample, in the sample: samples may be sharded.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ._namespaces import ALL

_done: set[str] = set()


def register() -> None:
    """For all operators that are defined by now, if the program uses DTensors at all: they are slow to import."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for namespace in ALL:
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


def _rows(inputs: Any, dims: Any, weights: set[int], rows: list[bool], sums: Sequence[bool] = ()) -> Any:
    """Shards of one leading dimension of everything but the weights at these places. Outputs are `rows`, then `sums`
    over rows: which there are (others are empty)."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    rules = [_replicated(inputs, len(rows) + len(sums))]
    for dim in dims:
        given = [(Replicate() if k in weights else Shard(dim)) if _is_tensor(x) else None for k, x in enumerate(inputs)]
        outputs = [Shard(dim) if there else Replicate() for there in rows]
        rules.append((outputs + [Partial() if there else Replicate() for there in sums], given))
    return rules


def _softmax_fwd(scores: Any, mask: Any, alpha: float, causal: bool) -> Any:
    return _rows((scores, mask, alpha, causal), range(scores.ndim - 1 - causal), set(), [True])


def _softmax_bwd(dout: Any, out: Any, alpha: float, causal: bool) -> Any:
    return _rows((dout, out, alpha, causal), range(out.ndim - 1), set(), [True])


def _norm_fwd(*inputs: Any) -> Any:
    x, _, bias, _, relax, *_ = inputs
    return _rows(inputs, range(x.ndim - 1) if relax != 2 else (), {1, 2}, [True, _is_tensor(bias), True])


def _norm_bwd(*inputs: Any) -> Any:
    _, x, _, mean, *_ = inputs
    return _rows(inputs, range(x.ndim - 1), {2}, [True], [True, _is_tensor(mean)])


def _step_fwd(*inputs: Any) -> Any:
    branch, _, *weights, _, _, _, relax, _, _, dropout_p, _, seed = inputs
    dims = _step_dims(branch, dropout_p, seed) if relax != 2 else ()
    post, post_bias, pre, pre_bias = map(_is_tensor, weights)
    return _rows(inputs, dims, {2, 3, 4, 5}, [True, pre, post_bias, post, pre_bias, pre])


def _step_bwd(*inputs: Any) -> Any:
    _, dx, branch, _, post, _, pre, row_scale, post_mean, _, pre_mean, *_ = map(_is_tensor, inputs)
    same_gradient, dropout_p, seed = inputs[12], inputs[15], inputs[17]
    dims = _step_dims(inputs[2 if branch else 1], dropout_p, seed)
    rows = [not same_gradient, dx, row_scale and branch]
    return _rows(inputs, dims, {4, 5, 6}, rows, [post, post_mean, pre, pre_mean])


def _step_dims(x: Any, dropout_p: float, seed: Any) -> Any:
    """Of a step's rows x, where nothing else couples them. Seeds of samples are sharded along with these."""
    if dropout_p == 0:
        return range(x.ndim - 1)
    return range(x.ndim > 1 and seed.shape == x.shape[:1])


def _attention(inputs: Any, query: Any, key: Any, outputs: list[bool], table: int | None = None) -> Any:
    """Shards of the batch, and of the heads of all tensors that have them; `outputs`: which there are (the gradients of
    others are empty); `table`: the place of a tensor of the heads alone, whose gradient is the last output."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    rules = [_replicated(inputs, len(outputs))]
    for dim in (0, 1) if _heads_stay_together(query, key) else (0,):
        given = [None if not _is_tensor(x) else Shard(dim) if dim == 0 or x.ndim > 2 else Replicate() for x in inputs]
        results: list[Any] = [Shard(dim) if there else Replicate() for there in outputs]
        if table is not None and given[table] is not None:
            given[table] = Shard(0) if dim == 1 else Replicate()
            if len(outputs) > 2:
                results[-1] = Shard(0) if dim == 1 else Partial()
        rules.append((results, given))
    return rules


def _heads_stay_together(query: Any, key: Any) -> bool:
    """Whether queries stay with the key heads that they share, over any dimensions of the mesh."""
    sizes, heads = query.mesh.shape, key.shape[1]
    shards = [math.prod(some) for n in range(1, len(sizes) + 1) for some in itertools.combinations(sizes, n)]
    return query.shape[1] == heads or all(n > heads or heads % n == 0 for n in shards)


def _attention_fwd(*inputs: Any) -> Any:
    return _attention(inputs, inputs[0], inputs[1], [True, True])


def _attention_bwd(*inputs: Any) -> Any:
    return _attention(inputs, inputs[2], inputs[3], [True] * 3)


def _local_fwd(*inputs: Any) -> Any:
    return _attention(inputs, inputs[0], _first(inputs[1:7]), [True, True], 7)


def _local_bwd(*inputs: Any) -> Any:
    return _attention(inputs, inputs[2], _first(inputs[3:9]), [_is_tensor(x) for x in inputs[2:10]], 9)


def _local_decode(*inputs: Any) -> Any:
    return _attention(inputs, inputs[0], inputs[1], [True], 7)


def _first(keys: Any) -> Any:
    return next(x for x in keys if _is_tensor(x))


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


def _linear_decode(*inputs: Any) -> Any:
    """Over rows of x, or over outputs, which come sharded then."""
    from torch.distributed.tensor import Replicate, Shard

    x, *of_outputs = inputs
    columns = [Replicate(), *(Shard(0) if _is_tensor(part) else None for part in of_outputs)]
    return [*_rows(inputs, range(x.ndim - 1), {1, 2, 3}, [True]), ([Shard(x.ndim - 1)], columns)]


_RULES = {
    "pb_relax_softmax_fwd": _softmax_fwd,
    "pb_relax_softmax_bwd": _softmax_bwd,
    "layer_norm_fwd": _norm_fwd,
    "layer_norm_bwd": _norm_bwd,
    "rms_norm_fwd": _norm_fwd,
    "rms_norm_bwd": _norm_bwd,
    "sandwich_layer_norm_fwd": _step_fwd,
    "sandwich_layer_norm_bwd": _step_bwd,
    "sandwich_rms_norm_fwd": _step_fwd,
    "sandwich_rms_norm_bwd": _step_bwd,
    "three_region_attention_fwd": _attention_fwd,
    "three_region_attention_bwd": _attention_bwd,
    "three_region_attention_decode": _attention_fwd,
    "three_region_attention_varlen_fwd": _varlen_fwd,
    "three_region_attention_varlen_bwd": _varlen_bwd,
    "local_attention_2d_fwd": _local_fwd,
    "local_attention_2d_bwd": _local_bwd,
    "local_attention_2d_decode": _local_decode,
    "linear_decode": _linear_decode,
}


def first(x: Any, like: Any) -> Any:
    """An operator's first argument, zeros where there is none: torch 2.11 asks it for the mesh."""
    return torch.zeros_like(like) if x is None and hasattr(like, "device_mesh") else x


def beside(x: Any, like: torch.Tensor) -> Any:
    """A plain tensor among DTensors is the same everywhere."""
    if x is None or type(like) is torch.Tensor or type(x) is not torch.Tensor or not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
