"""The torch operators of three-region attention, in every namespace with kernels: schemas, fake kernels, derivatives.

Those of packed sequences are told max_seqlen, which is at least the longest of them, or the number of all tokens.
"""

from typing import Any

from torch import Tensor

from . import _dispatch, _registration, _sharding

_TENSORS = "Tensor query, Tensor key, Tensor value"
_NUMBERS = "SymInt block_size, SymInt window_blocks, float pivot_bias, float scale"
_PACKED = "Tensor cu_seqlens, SymInt max_seqlen, "


def empty_varlen(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """out and lse of a forward of packed sequences."""
    lse = _registration.statistic(query)
    return _registration.empty_rows(query), lse.new_empty(lse.shape[1], lse.shape[0])


def _bwd_fake(dout: Any, dlse: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _registration.empty_rows(query), _registration.empty_rows(key), _registration.empty_rows(value)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward_of(namespace: str, forward: str) -> Any:
    name = forward.removesuffix("fwd") + "bwd"

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # asked for once: checkpointing gives them away
        others = (None,) * (len(saved) - 5 + len(ctx.options))  # inputs beside query, key and value
        if dout is None and dlse is None:
            return None, None, None, *others
        dout = _sharding.first(dout, saved[3])
        return *_dispatch.run(namespace, name, dout, dlse, *saved, *ctx.options), *others

    return backward


def _define(namespace: str, backward: str, name: str, packed: str, fake: Any) -> None:
    _registration.define(
        name,
        f"({_TENSORS}, Tensor pivots, {packed}{_NUMBERS}) -> (Tensor, Tensor)",
        fake,
        namespace=namespace,
        backward=_backward_of(backward, name),
        setup_context=_setup_context,
    )


def define_forward(namespace: str, backward: str) -> None:
    """In a namespace, with the backward of another."""
    _define(namespace, backward, "three_region_attention_fwd", "", _registration.empty_attention)


def define_varlen_forward(namespace: str, backward: str) -> None:
    """In a namespace, with the backward of another."""
    _define(namespace, backward, "three_region_attention_varlen_fwd", _PACKED, empty_varlen)


def register(namespace: str) -> None:
    """Define the operators in a namespace."""
    for name, packed in (("three_region_attention_bwd", ""), ("three_region_attention_varlen_bwd", _PACKED)):
        _registration.define(
            name,
            f"(Tensor? dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, Tensor pivots, {packed}{_NUMBERS})"
            " -> (Tensor, Tensor, Tensor)",
            _bwd_fake,
            namespace=namespace,
        )
    define_forward(namespace, namespace)
    define_varlen_forward(namespace, namespace)
    _registration.define(
        "three_region_attention_decode",
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor pivots, Tensor cache_seqlens, "
        f"{_NUMBERS}, Tensor? cache_leftpad=None) -> (Tensor, Tensor)",
        _registration.empty_attention,
        namespace=namespace,
    )
