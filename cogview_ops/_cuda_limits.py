"""What the CUDA C++ kernels of attention take, as one sentence why not: the rest is Triton's.

What a graph does not know, where tensors begin, their bindings see to: they copy.
"""

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 64, 96, 128)
TOKENS, COARSE = 2**26, 2**20 - 1  # at most
COLUMNS = (9, 13, 17)  # of windows of local attention, by which the tables below have a number of rows each
# Rows of a window at most, by KB of a block's shared memory and head_dim. Windows that move inward at the edges need
# more room, most in images that are hardly larger.
CLIPPED = {
    227: {32: (29, 29, 29), 64: (25, 21, 17), 96: (17, 13, 9), 128: (17, 9, 9)},
    163: {32: (29, 29, 29), 64: (13, 13, 9), 96: (9, 5, 5), 128: (9, 5, 5)},
    99: {32: (21, 17, 13), 64: (5, 1, 1), 96: (1, 1, 0), 128: (1, 0, 0)},
}
SHIFTED = {
    227: {32: (19, 19, 19), 64: (13, 13, 9), 96: (11, 5, 3), 128: (9, 5, 3)},
    163: {32: (19, 19, 11), 64: (9, 9, 3), 96: (5, 3, 3), 128: (3, 3, 1)},
    99: {32: (11, 11, 5), 64: (3, 1, 1), 96: (1, 1, 0), 128: (1, 0, 0)},
}
SHIFTED_IN_SMALL = {
    227: {32: (13, 13, 0), 64: (11, 11, 0), 96: (9, 3, 0), 128: (5, 3, 0)},
    163: {32: (13, 13, 0), 64: (5, 5, 0), 96: (3, 3, 0), 128: (3, 3, 0)},
    99: {32: (9, 9, 0), 64: (3, 1, 0), 96: (1, 1, 0), 128: (1, 0, 0)},
}


def attention(**tensors: Tensor | None) -> str | None:
    """Of query and whatever else has rows, `[B, H, S, D]` or packed `[total, H, D]`; by their names."""
    query = tensors["query"]
    assert query is not None
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "query: expected on a device of compute capability 8.0 or later"
    if query.dtype not in DTYPES:
        return f"query: expected bfloat16 or float16, got {query.dtype}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"query: expected head_dim 32, 64, 96 or 128, got {query.shape[-1]}"
    for name, x in tensors.items():
        if x is None:
            continue
        most = COARSE if name.startswith("coarse") else TOKENS
        tokens = x.shape[2 if x.dim() == 4 else 0]
        if tokens > most:
            return f"{name}: expected at most {most} tokens, got {tokens}"
        if not _in_packs(x):
            return f"{name}: expected rows aligned to 16 bytes, got strides {tuple(x.stride())}"
    return None


def local_2d(window: tuple[Any, Any, Any, str], coarse_kernel_size: Any, **tensors: Tensor | None) -> str | None:
    """`window`: grid, kernel_size, dilation, edge."""
    why = attention(**tensors)
    if why is not None:
        return why
    query = tensors["query"]
    assert query is not None
    grid, kernel_size, dilation, edge = window
    for name, kernel in (("kernel_size", kernel_size), ("coarse_kernel_size", coarse_kernel_size)):
        if kernel is not None and (kernel[0] % 2 == 0 or kernel[1] % 2 == 0):
            return f"{name}: expected odd sizes, got {tuple(kernel)}"
    if kernel_size is None:
        return None
    dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
    small = any(n // d < 2 * k + 3 for n, k, d in zip(grid, kernel_size, dilation, strict=True))
    table = CLIPPED if edge != "shift" else SHIFTED_IN_SMALL if small else SHIFTED
    rows = most_rows(table, int(query.shape[-1]), kernel_size[1], _shared_memory(query.device))
    if kernel_size[0] > rows:
        least = f"at most {rows} rows with so many columns" if rows else "fewer columns"
        return f"kernel_size: expected {least} for head_dim {query.shape[-1]} here, got {tuple(kernel_size)}"
    return None


def most_rows(table: dict[int, dict[int, tuple[int, int, int]]], head_dim: int, columns: int, shared: int) -> int:
    """0: none, with so many columns."""
    for size, rows in table.items():
        if size * 1024 <= shared:
            for most, of in zip(COLUMNS, rows[head_dim], strict=True):
                if columns <= most:
                    return of
            return 0
    return 0


def _in_packs(x: Tensor) -> bool:
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return _begins_aligned(x) and all(stride * x.element_size() % 16 == 0 for stride in strides)


def _begins_aligned(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    if type(x) not in (Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active():
        return x.storage_offset() * x.element_size() % 16 == 0
    return x.data_ptr() % 16 == 0


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin
