"""The modules under what replaces, moves or shards parameters: LoRA, offloading, quantisation, FSDP, a TP plan.

What is read outside the forward of its own module is not there, or not what was put in its place.
"""

import copy
from typing import Any

import pytest
import torch
from cases import some_pivots
from common import in_two_processes, needs_processes
from torch import Tensor, nn

from cogview_ops.modules import LocalAttention2d, SandwichLayerNorm, ThreeRegionAttention


class Layers(nn.Module):
    """All modules with parameters, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.regions = ThreeRegionAttention(32, 4, num_kv_heads=2, block_size=4, window_blocks=2)
        self.local = LocalAttention2d(32, 4, num_kv_heads=2, grid=(4, 6), kernel_size=(3, 3), raster_causal=True)
        self.first, self.second = SandwichLayerNorm(32), SandwichLayerNorm(32)
        self.register_buffer("pivots", some_pivots("text", 2, 24))

    def forward(self, x: Tensor) -> Tensor:
        h, x = self.first(self.regions(x, self.pivots), x)
        prefix_key, prefix_value = self.local.keys_values(x[:, :5])
        h, x = self.second(self.local(x, prefix_key=prefix_key, prefix_value=prefix_value), h)
        return h + x


def example() -> tuple[Layers, Tensor]:
    torch.manual_seed(0)
    return Layers(), torch.randn(2, 24, 32)


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    layers, x = example()
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(layers), config)
    keys, plain = tuned.base_model.model.local.keys_values(x), layers.local.keys_values(x)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(keys, plain, strict=True))
    out = tuned(x)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in tuned.named_parameters() if "lora_B" in name}
    assert len(grads) == 8
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())
    torch.testing.assert_close(tuned.merge_and_unload()(x), out)


def test_cpu_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    layers, x = example()
    with torch.no_grad():
        expected = layers(x)
        accelerate.cpu_offload(layers, torch.device("cpu"))
        assert layers.first.post.weight.is_meta
        torch.testing.assert_close(layers(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_dynamically() -> None:
    layers, x = example()
    with torch.no_grad():
        expected = layers(x)
        small = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, torch.qint8)
        out = small(x)
        assert 0 < (out - expected).square().mean() < 1e-2 * expected.square().mean()
        torch.testing.assert_close(small.regions(x, layers.pivots, small.regions.make_cache(2, 24)),
                                   small.regions(x, layers.pivots))  # fmt: skip


def sharded(layers: Layers, how: str, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if how == "TP":
        columns = {f"{a}.{p}_proj": ColwiseParallel() for a in ("regions", "local") for p in "qkv"}
        rows = {f"{a}.out_proj": RowwiseParallel() for a in ("regions", "local")}
        return parallelize_module(layers, mesh, columns | rows)
    if how == "FSDP of every module":  # the norms inside the fused step as well
        for module in list(layers.modules())[1:]:
            if next(module.parameters(recurse=False), None) is not None:
                fully_shard(module, mesh=mesh)
    if how == "FSDP of layers":
        for module in layers.children():
            fully_shard(module, mesh=mesh)
    return fully_shard(layers, mesh=mesh)


def worker(mesh: Any) -> None:
    layers, x = example()
    expected = layers(x)
    expected.square().sum().backward()
    grads = {name: p.grad for name, p in layers.named_parameters()}
    for how in ("TP", "FSDP of layers", "FSDP of every module"):
        spread = sharded(example()[0], how, mesh)
        out = spread(x)
        torch.testing.assert_close(out, expected, msg=lambda m, how=how: f"{how}: {m}")
        out.square().sum().backward()
        for name, p in spread.named_parameters():
            grad: Any = p.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(whole, grads[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        if how == "TP":
            with torch.no_grad():
                cache: Any = spread.regions.make_cache(2, 24)  # type: ignore[operator, union-attr]
                assert cache.keys.shape == (2, 1, 24, 8)
                mine = spread.regions(x, layers.pivots, cache)  # type: ignore[operator]
                torch.testing.assert_close(mine, layers.regions(x, layers.pivots))


@needs_processes
def test_sharded_on_two_processes() -> None:
    in_two_processes(worker)
