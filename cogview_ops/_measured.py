"""Where CUDA C++ is the faster of two kernels, as data: what a device has not measured is Triton's.

`python -m benchmarks.sweep` measures both on the GPU at hand and prints rows to put here.
"""

import torch

# by compute capability: of (operator, head_dim), Triton's time over that of CUDA C++, forward and with its backward
RATIOS: dict[tuple[int, int], dict[tuple[str, int], tuple[float, float]]] = {}


def cuda_first(op: str, device: torch.device, head_dim: int) -> bool:
    """Whether CUDA C++ was faster in both. Not by call: a forward without gradients gives the same bits as one with."""
    if not RATIOS or device.type != "cuda":
        return False
    rows = RATIOS.get(torch.cuda.get_device_capability(device), {})
    return min(rows.get((op.removesuffix("_fwd"), head_dim), (0.0,))) > 1
