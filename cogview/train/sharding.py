"""A model cut over several processes: heads and MLPs of its layers (tensor parallel), then every parameter (FSDP2).

Each layer is gathered for its own computation, in the dtype of the training, and its gradients are added up in float32.
Norms, embeddings and what is between the layers is the same on all processes of a column.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cogview.config import TrainConfig, require
from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Recipe
from cogview.train.ranks import Ranks


def built(
    recipe: Recipe, device: torch.device, config: TrainConfig, ranks: Ranks, begin: Callable[[Transformer], None]
) -> Transformer:
    """A recipe's model on a device, with the weights that it has alone: new ones of the seed, changed by `begin`. Of
    several processes the first makes them, and the others get their parts."""
    check_layout(recipe, config, ranks)

    def made() -> Transformer:
        torch.manual_seed(config.seed)
        model = recipe.model()
        begin(model)
        return model

    if ranks.mesh is None:
        return made().to(device)
    weights: dict[str, Any] = {}
    ranks.of_first(lambda: weights.update(made().state_dict()))
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.device("meta"):
        model = recipe.model()
    _cut(model, config, ranks)
    model.to_empty(device=device)
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=how)
    return model


def check_layout(recipe: Recipe, config: TrainConfig, ranks: Ranks) -> None:
    """ValueError where the processes do not divide the heads or the batch, or cannot compute again what is to be."""
    heads, of = recipe.config.num_heads, f"num_heads ({recipe.config.num_heads})"
    require(heads % ranks.tensor == 0, "tensor_parallel", f"a divisor of {of}", ranks.tensor)
    unit = ranks.parts * config.accumulate
    wanted = f"a multiple of {unit}, of {ranks.parts} processes and accumulate {config.accumulate}"
    require(config.batch_size % unit == 0, "batch_size", wanted, config.batch_size)
    # attention and MLP are FSDP units then, whose work is none of the operators that are kept
    fits = ranks.mesh is None or config.gradient_scaling == "loss" or config.checkpoint_activations != "selective"
    wanted = "none or full where several processes scale gradients by blocks"
    require(fits, "checkpoint_activations", wanted, config.checkpoint_activations)


def _cut(model: Transformer, config: TrainConfig, ranks: Ranks) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    data, tensor = ranks.mesh["data"], ranks.mesh["tensor"]
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
    outside, blocks = policy, config.gradient_scaling == "blocks"
    if blocks:  # what is between them is float32, and cast where it enters one; biases inside are float16, too
        policy, outside = replace(policy, cast_forward_inputs=False), MixedPrecisionPolicy()
    for layer in model.stack.layers:
        if ranks.tensor > 1:
            plan = {
                "attention.query_key_value": ColwiseParallel(),
                "attention.dense": RowwiseParallel(),
                "mlp.dense_h_to_4h": ColwiseParallel(),
                "mlp.dense_4h_to_h": RowwiseParallel(),
            }
            if hasattr(layer.attention, "fine_dense"):
                plan |= {
                    name.replace("attention.", "attention.fine_"): how
                    for name, how in plan.items()
                    if "mlp" not in name
                }
            parallelize_module(layer, tensor, plan)
        for part in (*((layer.attention, layer.mlp) if blocks else ()), layer):
            how = outside if part is layer else policy
            fully_shard(part, mesh=data, mp_policy=how, reshard_after_forward=config.reshard)
    fully_shard(model, mesh=data, mp_policy=outside)
