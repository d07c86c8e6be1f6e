"""What models ask of attention and these operators cannot do: told, with what to do instead."""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# an argument of transformers' attention functions: what it is, what to do
_FEATURES = {
    "softcap": ("soft capping of scores", "set config.attn_logit_softcapping=None"),
    "s_aux": ("attention sinks", "use attn_implementation='eager'"),
    "sinks": ("attention sinks", "use attn_implementation='eager'"),
    "position_bias": ("a bias of scores", "use attn_implementation='cogview_pb_relax'"),
    "sliding_window": (
        "a sliding window of the model's own",
        "set config.sliding_window=None and config.layer_types to 'full_attention'",
    ),
    "indices": ("keys chosen by an indexer", "use attn_implementation='eager'"),
    "block_indices": ("keys chosen by an indexer", "use attn_implementation='eager'"),
    "head_mask": ("a mask of heads", "use attn_implementation='eager'"),
    "block_table": ("a paged cache", "use attn_implementation='sdpa' for continuous batching"),
    "output_attentions": ("attention weights as output", "use attn_implementation='cogview_pb_relax'"),
}


def refuse(name: str, *, dropout: float, **given: Any) -> None:
    """Raise a ValueError for the first of these that is there."""
    if dropout > 0:
        raise ValueError(f"{name}: expected no dropout of attention weights, got {dropout}; set it to 0 in the config")
    for argument, (what, instead) in _FEATURES.items():
        value = given.get(argument)
        if value is not None and value is not False:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise ValueError(f"{name}: expected no {argument} ({what}), got {got}; {instead}")


@torch.compiler.assume_constant_result
def refuse_models_without_interface(config: type) -> None:
    """Raise for models whose own attention would read masks that are not meant for it."""
    if not _uses_interface(config):
        raise ValueError(
            "attn_implementation: expected a model that takes its attention from transformers' AttentionInterface, got "
            f"one of {config.__name__}; use attn_implementation='eager'"
        )


@cache
def _uses_interface(config: type) -> bool:
    """As transformers itself finds out, by a look at the source of a model."""
    file = config.__module__.replace(".configuration_", ".modeling_")
    found: list[Any] = [x for x in vars(sys.modules.get(file, sys)).values() if isinstance(x, type)]
    return all(
        x._can_set_attn_implementation() for x in found if issubclass(x, PreTrainedModel) and x.__module__ == file
    )
