"""Tile sizes of the Triton kernels, as data: by chip, kernel, element size and head_dim.

Rows say what fits without spilling registers (tests/test_triton_build.py); `python -m cogview_ops.triton.tune` measures
candidates on the GPU at hand and prints rows to put here. Nothing is tuned while a program runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch


class Config(NamedTuple):
    m: int  # rows of queries
    n: int  # rows of keys
    warps: int
    stages: int


SMALL = Config(0, 0, 4, 1)  # of kernels that have no tiles of queries and keys
INTERPRETER = Config(16, 16, 4, 1)

Rows = dict[tuple[str, int], dict[int, Config]]  # of (kernel, bytes of an element): by head_dim, the next larger one

ANY: Rows = {  # at most 99 KB of shared memory, no wgmma
    ("forward", 2): {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 2)},
    ("grad_query", 2): {64: Config(128, 64, 8, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 8, 2)},
    ("grad_key", 2): {64: Config(32, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(16, 32, 8, 1)},
    ("grad_pivot", 2): {64: Config(32, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(16, 32, 8, 1)},
    ("decode", 2): {128: Config(16, 64, 4, 3), 256: Config(16, 32, 4, 3)},
    ("forward", 4): {128: Config(32, 32, 8, 2), 256: Config(32, 16, 8, 1)},
    ("grad_query", 4): {64: Config(64, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 2)},
    ("grad_key", 4): {64: Config(32, 32, 8, 2), 128: Config(16, 32, 8, 2), 256: Config(16, 16, 8, 2)},
    ("grad_pivot", 4): {64: Config(32, 32, 8, 2), 128: Config(16, 32, 8, 2), 256: Config(16, 16, 8, 2)},
    ("decode", 4): {64: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 2)},
    ("forward", 8): {64: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    ("grad_query", 8): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(8, 16, 8, 1)},
    ("grad_key", 8): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 4, 1, 1)},
    ("grad_pivot", 8): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 4, 1, 1)},
    ("decode", 8): {256: Config(16, 16, 8, 1)},
    ("local_forward", 2): {64: Config(64, 32, 4, 3), 128: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 2)},
    ("local_grad_query", 2): {64: Config(64, 32, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
    ("local_grad_key", 2): {64: Config(32, 64, 4, 2), 128: Config(32, 64, 8, 2), 256: Config(16, 32, 8, 1)},
    ("local_decode", 2): {128: Config(16, 64, 4, 3), 256: Config(16, 32, 4, 3)},
    ("local_forward", 4): {64: Config(32, 32, 8, 2), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    ("local_grad_query", 4): {64: Config(32, 32, 8, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 16, 8, 2)},
    ("local_grad_key", 4): {64: Config(32, 32, 8, 2), 128: Config(16, 32, 8, 2), 256: Config(16, 16, 8, 2)},
    ("local_decode", 4): {64: Config(16, 32, 4, 2), 256: Config(16, 16, 8, 1)},
    ("local_forward", 8): {64: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    ("local_grad_query", 8): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(8, 16, 8, 1)},
    ("local_grad_key", 8): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 4, 1, 1)},
    ("local_decode", 8): {256: Config(16, 16, 8, 1)},
}
ROOMY: Rows = {  # where a block has 160 KB
    (kernel, 8): {64: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)}
    for kernel in ("grad_query", "grad_key", "grad_pivot", "local_grad_query", "local_grad_key")
}
CHIPS: dict[int, Rows] = {  # by compute capability; what is missing is as above
    80: ROOMY,
    90: ROOMY
    | {
        ("forward", 2): {64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
        ("grad_query", 2): {64: Config(64, 32, 4, 2), 128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
        ("grad_key", 2): {64: Config(32, 64, 4, 2), 128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 2)},
        ("grad_pivot", 2): {64: Config(32, 64, 4, 3), 128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 2)},
        ("local_forward", 2): {64: Config(64, 64, 4, 3), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        ("local_grad_query", 2): {64: Config(64, 64, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
    },
    100: ROOMY,
    120: {("forward", 2): {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(64, 32, 8, 2)}},
}

_trial: ContextVar[tuple[str, Config] | None] = ContextVar("trial", default=None)


@contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Use this configuration for one kernel, whatever the tables say."""
    token = _trial.set((kernel, config))
    try:
        yield
    finally:
        _trial.reset(token)


def lookup(kernel: str, arch: int, size: int, head_dim: int) -> Config:
    """Configuration for elements of `size` bytes on `chip(device)`."""
    trial = _trial.get()
    if trial and trial[0] == kernel:
        return trial[1]
    if arch < 0:
        return INTERPRETER
    row = CHIPS.get(arch, {}).get((kernel, size)) or ANY[kernel, size]
    return row[min(dim for dim in row if dim >= head_dim)]


def chip(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; 0 where there is none, -1 in the interpreter."""
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return -1 if device.type == "cpu" else 0


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; some number elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def splits(programs: int, work: int, most: int, device: torch.device, resident: int = 2) -> int:
    """Into how many parts, at most `most`, to split the work of each program so that every processor has some, of the
    `resident` that it runs at once."""
    return max(1, min(most, work, resident * processors(device) // max(programs, 1)))
