"""Where CUDA C++ is the faster of two kernels, as data: what a device has not measured is Triton's.

`python -m benchmarks.sweep` measures both on the GPU at hand and prints rows to put here.
"""

import torch

# by compute capability: of (operator, head_dim), Triton's time over that of CUDA C++, forward and backward: the least
# of several shapes, on an H100 with torch 2.11 and Triton 3.6 (benchmarks/results/sweep has all of them)
RATIOS: dict[tuple[int, int], dict[tuple[str, int], tuple[float, float]]] = {
    (9, 0): {
        ("local_attention_2d", 32): (1.57, 1.64),
        ("local_attention_2d", 64): (1.62, 1.67),
        ("local_attention_2d", 96): (2.25, 1.83),
        ("local_attention_2d", 128): (2.48, 1.59),
        ("three_region_attention", 32): (1.06, 0.85),
        ("three_region_attention", 64): (1.32, 0.78),
        ("three_region_attention", 96): (1.06, 0.99),
        ("three_region_attention", 128): (1.39, 0.82),
    },
}


def cuda_first(op: str, device: torch.device, head_dim: int) -> tuple[bool, bool]:
    """Whether CUDA C++ was the faster forward and backward. Not by call: a forward gives the same bits without
    gradients as with them. Packed sequences, which were not measured, go by the batch: their kernels are the same, in
    either language, but for where rows begin."""
    if not RATIOS or device.type != "cuda":
        return False, False
    rows = RATIOS.get(torch.cuda.get_device_capability(device), {})
    forward, backward = rows.get((op.removesuffix("_fwd").removesuffix("_varlen"), head_dim), (0.0, 0.0))
    return forward > 1, backward > 1
