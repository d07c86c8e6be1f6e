"""Products of float16 on CPUs, most of which do not multiply it: computed in float32 and rounded at their end, as on
GPUs, they take a tenth to a thirtieth of the time."""

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def multiplies_float16() -> bool:
    """Whether this CPU does."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_slow(x: Tensor) -> bool:
    """Whether products with it are better computed in float32."""
    return x.dtype == torch.float16 and x.device.type == "cpu" and not multiplies_float16()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of one dtype."""
    return (a.float() @ b.float()).to(a.dtype) if is_slow(a) else a @ b
