"""Weights of fewer bits, for drawing only."""

from torch import nn

from cogview.parts.linear import Linear


def int8_weights(model: nn.Module) -> None:
    """Quantises the weights of a model's linear layers to int8, a scale a row, by torchao; what is computed with them
    stays in the model's dtype. The token table, which is also the head, stays as it is."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("int8: needs the package torchao, which is missing here: `pip install torchao`") from error
    try:
        quantize_(model, Int8WeightOnlyConfig(version=2))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"int8: this torchao does not quantise as 0.15 and later did ({error})") from error
    for module in model.modules():
        if isinstance(module, Linear):
            module.int8 = True
