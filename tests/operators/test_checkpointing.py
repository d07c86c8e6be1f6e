"""Selective activation checkpointing: what is kept, what is computed again, and that gradients are the same."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from cogview_ops import layer_norm, local_attention_2d, pb_relax_softmax, three_region_attention
from cogview_ops.checkpointing import selective_contexts

PIVOTS = torch.arange(4).expand(2, -1).contiguous()


class Count(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def block(x: Tensor, weight: Tensor) -> Tensor:
    """A norm, a projection, three attentions and a softmax."""
    q = (layer_norm(x) @ weight).unflatten(-1, (2, 8)).transpose(1, 2)
    a = three_region_attention(q, q, q, PIVOTS, block_size=4, window_blocks=1)
    b = local_attention_2d(q, q, q, grid=(3, 4), kernel_size=(3, 3))
    c = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    return x + (pb_relax_softmax(a) * b + c).transpose(1, 2).flatten(2)


@pytest.fixture
def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 12, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)]


def gradients(inputs: list[Tensor], call: Any) -> tuple[list[Tensor], Counter[str]]:
    """Of a loss of the call, and how often operators ran in forward and backward together."""
    with Count() as count:
        grads = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    return list(grads), count.calls


@pytest.mark.parametrize(
    "also_save", [(), (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)], ids=["", "products"]
)
def test_attentions_run_once_and_all_else_twice(inputs, also_save) -> None:
    plain, _ = gradients(inputs, block)
    contexts = partial(selective_contexts, also_save=also_save)
    grads, calls = gradients(inputs, partial(checkpoint, block, use_reentrant=False, context_fn=contexts))
    for a, b in zip(grads, plain, strict=True):
        assert torch.equal(a, b)
    for once in ("three_region_attention_fwd", "local_attention_2d_fwd", "_scaled_dot_product_flash_attention_for_cpu"):
        assert calls[once] == 1, calls
    for twice in ("layer_norm_fwd", "pb_relax_softmax_fwd"):
        assert calls[twice] == 2, calls
    products = calls["mm"] + calls["bmm"]
    assert products == (3 if also_save else 4), calls  # two of them are the backward's


class Alive(TorchDispatchMode):
    """The storages that operators made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.sizes[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return out


def test_what_is_kept_is_attention(inputs) -> None:
    def kept(call: Any) -> int:
        """Bytes that wait for the backward."""
        with Alive() as alive:
            out = call(*inputs)
        held = sum(size for storage, size in alive.sizes.items() if not storage.expired())
        assert out.requires_grad
        return held - out.untyped_storage().nbytes()

    selective = kept(partial(checkpoint, block, use_reentrant=False, context_fn=selective_contexts))
    out, lse = inputs[0].numel() * 4, inputs[0].numel() // 8 * 4
    assert 3 * (out + lse) <= selective <= 3 * (out + lse) + 64, selective  # SDPA also returns its random state
    assert kept(block) > 1.5 * selective


def test_inside_a_compiled_function(inputs) -> None:
    call = partial(checkpoint, block, use_reentrant=False, context_fn=selective_contexts)
    plain, _ = gradients(inputs, block)
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_packet_of_overloads_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"^also_save: expected operators as torch.ops.aten.mm.default, got <OpOverloadP"
    ):
        selective_contexts(also_save=(torch.ops.aten.mm,))
