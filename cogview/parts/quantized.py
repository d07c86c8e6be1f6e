"""Weights of fewer bits, for drawing only."""

from torch import Tensor, nn


def int8_weights(model: nn.Module) -> None:
    """Quantises the weights of a model's linear layers to int8, a scale a row, by torchao; what is computed with them
    stays in the model's dtype. The token table, which is also the head, stays as it is."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("int8: needs the package torchao, which is missing here: `pip install torchao`") from error
    quantize_(model, Int8WeightOnlyConfig(version=2))


def int8_parts(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of a weight that is quantised so: int8 [out, in] and the scale of each row, [out]. None of any other."""
    numbers, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    return None if numbers is None or scale is None else (numbers, scale.flatten())
