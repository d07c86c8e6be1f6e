"""The names of released checkpoints, CogView's and CogView2's, and the order of rows of what makes queries, keys and
values."""

from torch import Tensor

THREE = ("attention.query_key_value.weight", "attention.query_key_value.bias")

_LAYER = {
    "attention.query_key_value": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "post_norm": "third_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.dense_h_to_4h": "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h": "mlp.dense_4h_to_h",
    "mlp_post_norm": "fourth_layernorm",
}
_FINE = {"fine_query_key_value": "query_key_value", "fine_dense": "dense"}  # of direct super-resolution alone


def published_names(num_layers: int) -> dict[str, str]:
    """Of every parameter of a Transformer the published name. A layer's last norm is there the next one's first."""
    names = {
        "embedding.words.weight": "word_embeddings.weight",
        "embedding.positions.weight": "transformer.position_embeddings.weight",
    }
    for kind in ("weight", "bias"):
        names[f"stack.first_norm.{kind}"] = f"transformer.layers.0.input_layernorm.{kind}"
        for i in range(num_layers):
            for ours, theirs in _LAYER.items():
                names[f"stack.layers.{i}.{ours}.{kind}"] = f"transformer.layers.{i}.{theirs}.{kind}"
            following = f"layers.{i + 1}.input_layernorm" if i + 1 < num_layers else "final_layernorm"
            names[f"stack.layers.{i}.next_norm.{kind}"] = f"transformer.{following}.{kind}"
    return names


def sat_names(num_layers: int, *, fine_projections: bool = False) -> dict[str, str]:
    """Likewise of CogView2's checkpoints, which SwissArmyTransformer wrote; of a super-resolution's positions the
    base's alone. fine_projections: of fine cells, a table of layers for each kind."""
    names = published_names(num_layers)
    names["embedding.words.weight"] = f"transformer.{names['embedding.words.weight']}"
    if fine_projections:
        for kind in ("weight", "bias"):
            for i in range(num_layers):
                for ours, theirs in _FINE.items():
                    names[f"stack.layers.{i}.attention.{ours}.{kind}"] = f"mixins.attention_plus.{theirs}.{i}.{kind}"
    return names


def by_heads(x: Tensor, heads: int) -> Tensor:
    """Rows of a tensor of THREE, all queries, then keys, then values as released, in our order: head by head."""
    return x.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def by_kind(x: Tensor, heads: int) -> Tensor:
    """The way back."""
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
