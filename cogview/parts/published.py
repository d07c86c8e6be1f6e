"""The names of CogView's released checkpoints."""

_LAYER = {
    "attention.query_key_value": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "post_norm": "third_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.dense_h_to_4h": "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h": "mlp.dense_4h_to_h",
    "mlp_post_norm": "fourth_layernorm",
}


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
