"""DTensors: the operators on two processes equal those on one, whatever is sharded, and shard what they can."""

import itertools
from typing import Any

import pytest
import torch
from cases import BY_LABEL, DECODE, DIFFERENTIABLE, PRODUCTS
from common import Case, in_two_processes, needs_processes
from torch import Tensor

from cogview_ops import dalle_attention, linear_decode, pb_relax_softmax, sandwich_rms_norm, three_region_attention

GROUPED = BY_LABEL["blocks_of_64"]._replace(
    label="two_key_heads", shapes={"query": (2, 4, 200, 16), "key": (2, 2, 200, 16), "value": (2, 2, 200, 16)}
)
NORMS = [
    BY_LABEL["sandwich"]._replace(label="sandwich_plain", options={}),
    BY_LABEL["sandwich"]._replace(label="sandwich_tensor", options={"relax": "tensor"}),
    BY_LABEL["softmax"]._replace(label="softmax_full", options={}),
]
# not those with a single head of keys
SINGLE = ("tiny", "grouped_32", "sets_32", "packed_32", "tiny_packed", "tiny_biased")
CASES = [case for case in [*DIFFERENTIABLE, GROUPED, *NORMS, *DECODE] if case.label not in SINGLE]
# cases that cannot be sharded in any dimension but the batch, or not at all
KEPT = {"blocks_of_64": (0,), "softmax": (0, 1), **dict.fromkeys(("tiny_local", "tiny_cross", "local_2d_decode"), (0,))}
KEPT |= {"packed": (1,)}
KEPT |= dict.fromkeys(("sandwich", "sandwich_wide", "sandwich_tensor", "layer_post", "rms_post", "layer_seeds"), ())
KEPT |= dict.fromkeys(("layer_seeds_pre", "rms_seeds", "rms_seeds_post"), (0,))


def sharded_dims(case: Case) -> tuple[int, ...]:
    return KEPT.get(case.label, (0, 1))


def check(case: Case, dim: int | None, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    inputs = {k: x.requires_grad_(case.differentiable) for k, x in case.inputs(torch.float64).items()}
    expected = case(inputs, "auto")

    def spread(x: Tensor, name: str = "") -> DTensor:
        placement = Replicate() if dim is None or x.dim() < 3 or x.shape[dim] == 1 else Shard(dim)
        if name == "bias":  # of heads alone
            placement = Shard(0) if dim == 1 else Replicate()
        return distribute_tensor(x.detach(), mesh, [placement]).requires_grad_(x.requires_grad)

    spreads = {k: spread(x, k) for k, x in inputs.items()}
    outputs = case(spreads, "auto")  # type: ignore[arg-type]
    for mine, theirs in zip(outputs, expected, strict=True):
        assert isinstance(mine, DTensor)
        tokens_last = case.packed and mine.dim() == 2  # [H, total] beside [total, H, D]
        shards = [p.dim + tokens_last for p in mine.placements if isinstance(p, Shard)]
        kept = shards == [dim] if dim in sharded_dims(case) else dim not in shards
        assert kept, f"{case.label}, {dim}: {mine.placements}"
        torch.testing.assert_close(mine.full_tensor(), theirs)
    if not case.differentiable:
        return
    seeds = [torch.randn_like(x) for x in expected]
    last = len(seeds) - 1
    for first in {0, last} if dim == 0 else {0}:  # of all outputs, and of the last one alone
        of = [spread(x) for x in seeds[first:]]
        grads = torch.autograd.grad(outputs[first:], list(spreads.values()), of, retain_graph=True)
        truths = torch.autograd.grad(expected[first:], list(inputs.values()), seeds[first:], retain_graph=True)
        for name, mine, theirs in zip(inputs, grads, truths, strict=True):
            where = f"{case.label}, {dim}, {name}, outputs from {first}"
            torch.testing.assert_close(mine.full_tensor(), theirs, msg=lambda m, w=where: f"{w}: {m}")


def worker(mesh: Any) -> None:
    for case in CASES:
        for dim in (None, 0, 1, 2) if case is GROUPED else (0, 1):
            torch.manual_seed(0)
            check(case, dim, mesh)
    for dim in (0, 1):
        beside_plain_tensors(dim, mesh)
    seeds_of_samples(mesh)


def seeds_of_samples(mesh: Any) -> None:
    """Sharded as the samples are, evenly or not, or the same everywhere; a process with one sample has one seed."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for count, placement in itertools.product((2, 3), (Shard(0), Replicate())):
        x, seeds = torch.randn(count, 5, 8), torch.arange(count) + 2**40
        whole, spread = x.requires_grad_(), distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
        truth = sandwich_rms_norm(whole, whole.detach(), dropout_p=0.5, seed=seeds)
        of_each = distribute_tensor(seeds, mesh, [placement])
        outputs = sandwich_rms_norm(spread, spread.detach(), dropout_p=0.5, seed=of_each)
        for mine, theirs in zip(outputs, truth, strict=True):
            assert mine.placements == (Shard(0),)
            torch.testing.assert_close(mine.full_tensor(), theirs, rtol=0, atol=0)
        (mine,) = torch.autograd.grad(outputs[1].square().sum(), spread)
        (theirs,) = torch.autograd.grad(truth[1].square().sum(), whole)
        torch.testing.assert_close(mine.full_tensor(), theirs)


def beside_plain_tensors(dim: int, mesh: Any) -> None:
    """Masks and pivots that are the same everywhere, as compositions make them too."""
    from torch.distributed.tensor import Shard, distribute_tensor

    x, mask = torch.randn(2, 2, 16, 8), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 3] = False
    spread = distribute_tensor(x, mesh, [Shard(dim)])
    image: dict[str, Any] = {"kind": "row", "text_len": 4, "grid": (3, 4)}
    for call in (
        lambda x: pb_relax_softmax(x, mask=mask[:, None, None, :8]),
        lambda x: dalle_attention(x, x, x, **image),
        lambda x: dalle_attention(x, x, x, **image, text_mask=mask[:, :4]),
    ):
        out = call(spread)
        assert out.placements == (Shard(dim),)
        torch.testing.assert_close(out.full_tensor(), call(x))
    for bad in ([[0, 3], [0, 99]], [[0, 99], [0, 3]]):  # refused by both, or one would wait for the other
        with pytest.raises(ValueError, match="pivots: expected indices below 16"):
            three_region_attention(spread, spread, spread, torch.tensor(bad), block_size=4)


def products(mesh: Any) -> None:
    """Over rows of x, or over outputs: of weight, bias and scale, where there are these."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for case in PRODUCTS:
        named = {
            **case.inputs(torch.float64),
            "weight": case.options.get("weight", case.inputs(torch.float64).get("weight")),
        }
        for left_out, over_outputs in itertools.product((None, "bias"), (False, True)):
            given = {name: x for name, x in named.items() if name != left_out}
            spread = {
                name: distribute_tensor(x, mesh, [Shard(0) if (name != "x") == over_outputs else Replicate()])
                for name, x in given.items()
            }
            out = linear_decode(**spread)
            assert out.placements == (Shard(out.dim() - 1 if over_outputs else 0),)
            torch.testing.assert_close(out.full_tensor(), linear_decode(**given))


@needs_processes
def test_two_processes_equal_one() -> None:
    in_two_processes(worker)


@needs_processes
def test_products_in_two_processes() -> None:
    in_two_processes(products)
