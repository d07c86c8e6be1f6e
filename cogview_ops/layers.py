"""Norms without state of their own, whose `forward` takes the place of another module's.

That is how the package `kernels` puts operators into a model; weight and epsilon are the model's. Each is named after
who has it, since RMSNorms differ in when they round and in what the weight is:

    import types
    model.norm.forward = types.MethodType(cogview_ops.layers.LlamaRMSNorm.forward, model.norm)

All are over the last dimension and have a backward; limits and dtypes are those of `rms_norm` and `layer_norm`. Results
have the input's dtype, also where float32 weights beside bfloat16 or float16 would make the model's own float32;
float64 is computed in float64.
"""

from torch import Tensor, nn

from . import _checks
from .sandwich_layer_norm import layer_norm
from .sandwich_rms_norm import rms_norm

__all__ = ["GemmaRMSNorm", "LayerNorm", "LlamaRMSNorm", "Olmo2RMSNorm"]


class LlamaRMSNorm(nn.Module):
    """Of Llama, Mistral, Qwen 2 and 3, Phi-3: `weight * round(x / sqrt(mean(x**2) + variance_epsilon))`."""

    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states`: `[..., D]` in float64, float32, bfloat16 or float16. `weight`: `[D]`, in that or float32."""
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon, round_before_weight=True)


class Olmo2RMSNorm(nn.Module):
    """Of OLMo 2 and 3: `weight * x / sqrt(mean(x**2) + variance_epsilon)`, rounded once."""

    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states`: `[..., D]` in float64, float32, bfloat16 or float16. `weight`: `[D]`, in that or float32."""
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


class GemmaRMSNorm(nn.Module):
    """Of Gemma 1 to 3: `(1 + weight) * x / sqrt(mean(x**2) + eps)`, rounded once."""

    can_torch_compile = True
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """`x`: `[..., D]` in float64, float32, bfloat16 or float16. `weight`: `[D]`, in that or float32."""
        return rms_norm(x, self.weight, eps=self.eps, weight_offset=1.0)


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over one dimension: `weight * (x - mean(x)) / sqrt(var(x) + eps) + bias`, rounded once."""

    can_torch_compile = True
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """`input`: `[..., D]` in float64, float32, bfloat16 or float16. `weight` and `bias`: `[D]`, in that or float32,
        or None."""
        _checks.require(len(self.normalized_shape) == 1, "normalized_shape", "one dimension", self.normalized_shape)
        return layer_norm(input, self.weight, self.bias, eps=self.eps, relax=None)
