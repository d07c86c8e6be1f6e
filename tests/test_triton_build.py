"""The Triton kernels as compiled ahead of time for GPUs, on machines without one: matrix instructions, wide accesses,
spills, sizes.

What is compiled is what the launchers launch: they run on meta tensors, and `launch` is caught. A process of its own
does it, because in this one kernels are interpreted (conftest.py). `python tests/test_triton_build.py` prints all rows.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = {80: 163, 90: 227}  # KB that a block can have
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int32": "i32", "int64": "i64"}
DTYPES |= {"uint8": "u8"}
# forward, backward and decode for both chips, in both dtypes, at head_dim 64 and 128
ATTENTION = [
    *(("three_region", *x) for x in ((80, "bfloat16", 128), (90, "bfloat16", 64))),
    ("three_region", 90, "float16", 128),
    ("local_2d", 80, "float16", 64),  # the image alone
    ("local_2d_shift", 90, "bfloat16", 64),  # dilated and shifted
    ("local_2d_sets", 90, "bfloat16", 64),  # with a prefix and a coarse grid
]
# the widest rows of which nothing spills, rows that are no power of two, several of them in a program
ROWS = [
    *(("softmax", *x) for x in ((80, "float16", 1088), (90, "bfloat16", 64), (90, "bfloat16", 16384))),
    *(("layer_norm", *x) for x in ((80, "bfloat16", 4096), (90, "float16", 2560))),
    *(("sandwich", *x) for x in ((80, "float16", 2560), (90, "bfloat16", 4096))),
    ("sandwich_tensor", 90, "bfloat16", 2560),
]
OPS = ("three_region", "local_2d", "local_2d_shift", "local_2d_sets")
ALL = [
    *itertools.product(OPS, (80, 90), ("bfloat16", "float16", "float32", "float64"), (16, 64, 128, 256)),
    *itertools.product(dict.fromkeys(x[0] for x in ROWS), (80, 90), ("bfloat16", "float32"), (64, 1088, 2560, 65536)),
]
# rows that a kernel reads and writes, parameters that it reads, and gradients of them that it writes, in float32
TENSORS = {
    ("softmax", "forward_kernel"): (1, 1, 0, 0),
    ("softmax", "backward_kernel"): (2, 1, 0, 0),
    ("layer_norm", "forward_kernel"): (1, 1, 2, 0),
    ("layer_norm", "backward_kernel"): (2, 1, 1, 2),
    ("sandwich", "forward_kernel"): (2, 2, 4, 0),
    ("sandwich", "backward_kernel"): (4, 2, 2, 4),
    ("sandwich_tensor", "peak_kernel"): (1, 0, 0, 0),
    ("sandwich_tensor", "forward_kernel"): (1, 1, 2, 0),
}


class Kernel(NamedTuple):
    op: str
    chip: int
    dtype: str
    size: int  # head_dim, or columns of a row
    name: str
    elements: int  # of a tensor in a thread, where programs have whole rows
    registers: int
    spilled: int  # bytes of a thread
    shared: int
    matrix: dict[str, int]  # instructions by opcode
    accesses: dict[str, int]  # of global memory, by opcode


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    command = [sys.executable, __file__, json.dumps([*ATTENTION, *ROWS])]
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": root}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return [Kernel(*row) for row in json.loads(run.stdout)]


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    of_sets = {
        "three_region": ["grad_pivot_kernel"],
        "local_2d": [],
        "local_2d_shift": [],
        "local_2d_sets": ["grad_prefix_kernel"],
    }
    for target in ATTENTION:
        names = ["forward_kernel", "grad_query_kernel", *of_sets[target[0]], "grad_key_kernel", "decode_kernel"]
        assert [kernel.name for kernel in kernels if kernel[:4] == target] == names
    for target in ROWS:
        names = [name for op, name in TENSORS if op == target[0]]
        assert [kernel.name for kernel in kernels if kernel[:4] == target] == names


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.spilled == 0, kernel


def test_shared_memory_fits(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.shared <= SHARED_MEMORY[kernel.chip] * 1024, kernel


def test_matrix_instructions(kernels: list[Kernel]) -> None:
    """wgmma on Hopper, mma.sync elsewhere and for the 16 rows of a decode."""
    for kernel in (x for x in kernels if x.op in OPS):
        opcode = "wgmma.mma_async" if kernel.chip == 90 and kernel.name != "decode_kernel" else "mma.sync"
        # s and out; with a gradient also dp, and dv or not; the loops of full tiles and of edge tiles have them each,
        # or those of the sets
        dots = {"forward_kernel": 2, "grad_query_kernel": 3, "decode_kernel": 2}.get(kernel.name, 4)
        if kernel.op == "three_region":
            dots *= 1 if kernel.name == "decode_kernel" else 2
        elif kernel.op == "local_2d_sets" and kernel.name not in ("grad_prefix_kernel", "grad_key_kernel"):
            dots *= 3
        assert kernel.matrix[opcode] >= dots, kernel
        assert sum(kernel.matrix.values()) == kernel.matrix[opcode], kernel


def test_rows_move_16_bytes_at_once(kernels: list[Kernel]) -> None:
    """And once: nothing is read again."""
    for kernel in (x for x in kernels if x.op not in OPS):
        packs = kernel.elements // 8
        read, written, parameters, sums = TENSORS[kernel.op, kernel.name]
        wide = {"ld": packs * (read + parameters), "st": packs * (written + 2 * sums)}
        for access, count in wide.items():
            assert kernel.accesses.get(f"{access}.global.v4.b32", 0) == count, kernel
        # mean and 1 / standard deviation of every row, or its largest |element|
        numbers = {"softmax": 0, "layer_norm": 2, "sandwich": 4, "sandwich_tensor": 3}[kernel.op]
        assert sum(kernel.accesses.values()) - sum(wide.values()) <= numbers, kernel


# --- the process that compiles ---------------------------------------------------------------------------------------


def launches(op: str, chip: int, dtype: torch.dtype, size: int) -> list[tuple[Any, ...]]:
    """(name, kernel, configuration, arguments) of a forward, a backward and, of attention, a decode."""
    from cogview_ops.triton import (
        configs,
        local_attention_2d,
        pb_relax_softmax,
        sandwich_layer_norm,
        three_region_attention,
    )

    caught: dict[str, tuple[Any, ...]] = {}

    def catch(fn: Any, programs: tuple[int, ...], config: Any, **arguments: Any) -> None:
        kinds = {"PIVOT": "grad_pivot_kernel", "DENSE": "grad_prefix_kernel"}
        name = next((kinds[kind] for kind in kinds if arguments.get(kind)), fn.fn.__name__)
        if "M" in arguments and "N" in arguments:
            caught[name] = (fn, config, arguments)

    calls = {"three_region": call_three_region} | dict.fromkeys(OPS[1:], call_local_2d)
    with contextlib.ExitStack() as patches:
        for module in (three_region_attention, local_attention_2d, pb_relax_softmax, sandwich_layer_norm):
            patches.enter_context(mock.patch.object(module, "launch", catch))
        patches.enter_context(mock.patch.object(configs, "chip", return_value=chip))
        calls.get(op, call_rows)(op, dtype, size)
    return [(name, *row) for name, row in caught.items()]


def call_three_region(op: str, dtype: torch.dtype, head_dim: int) -> None:
    from cogview_ops.triton import three_region_attention

    x = torch.empty(4, 40, 4224, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(4, 40, 4224, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta")
    pivots = torch.empty(4, 768, dtype=torch.int32, device="meta")
    options = (128, 6, 1.6, head_dim**-0.5)
    three_region_attention.forward(x, x, x, pivots, *options)
    three_region_attention.backward(x, lse, x, x, x, x, lse, pivots, *options)
    three_region_attention.decode(x[:, :, :1], x, x, pivots, pivots[:, 0], *options)


def call_local_2d(op: str, dtype: torch.dtype, head_dim: int) -> None:
    """CogView2's super-resolution from 32 x 32 to 64 x 64, its local part alone, or that dilated and shifted."""
    from cogview_ops.triton import local_attention_2d

    def empty(tokens: int) -> torch.Tensor:
        return torch.empty(4, 40, tokens, head_dim, dtype=dtype, device="meta")

    x, prefix, coarse = empty(4096), empty(64), empty(1024)
    lse = torch.empty(4, 40, 4096, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta")
    mask, lengths = (
        torch.empty(4, 64, dtype=torch.bool, device="meta"),
        torch.empty(4, dtype=torch.int64, device="meta"),
    )
    others = (prefix, prefix, coarse, coarse, mask) if op == "local_2d_sets" else (None,) * 5
    shift = op == "local_2d_shift"
    window, rest = ([64, 64], [17, 9], [3, 2] if shift else [1, 1]), (1.2, [32, 32], [7, 7], 0.5, head_dim**-0.5)
    local_attention_2d.forward(x, x, x, *others, *window, not shift, shift, *rest)
    local_attention_2d.backward(x, lse, x, x, x, *others, x, lse, *window, not shift, shift, *rest)
    local_attention_2d.decode(x[:, :, :1], x, x, *others, lengths, *window, *rest)


def call_rows(op: str, dtype: torch.dtype, width: int) -> None:
    from cogview_ops.triton import pb_relax_softmax, sandwich_layer_norm

    x = torch.empty(4096, width, dtype=dtype, device="meta")
    weight, stats = x[0], torch.empty(4096, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    relax = sandwich_layer_norm.TENSOR if op == "sandwich_tensor" else sandwich_layer_norm.ROW
    if op == "softmax":
        pb_relax_softmax.forward(x, None, 32.0, True)
        pb_relax_softmax.backward(x, x, 32.0, True)
    elif op == "layer_norm":
        sandwich_layer_norm.layer_norm_forward(x, weight, weight, 1e-5, relax)
        sandwich_layer_norm.layer_norm_backward(x, x, weight, stats, stats)
    else:
        sandwich_layer_norm.sandwich_forward(x, x, *(weight,) * 4, 1e-5, relax, 0.1, seed)
        if relax == sandwich_layer_norm.ROW:  # the backward does not know
            sandwich_layer_norm.sandwich_backward(*(x,) * 4, weight, weight, *(stats,) * 4, 0.1, seed)


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and divisibility as Triton's launcher derives them from arguments."""
    types, constants, hints = {}, {}, {}
    for k, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            types[name] = "fp32"
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + DTYPES[str(value.dtype).removeprefix("torch.")]
            hints[(k,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                hints[(k,)] = [["tt.divisibility", 16]]
    return types, constants, hints


def build(op: str, chip: int, dtype: str, size: int, emit: Callable[[Kernel], None]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name, kernel, config, arguments in launches(op, chip, getattr(torch, dtype), size):
        source = ASTSource(kernel, *specialised(kernel, arguments))
        options = {"num_warps": config.warps, "num_stages": config.stages}
        binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
        assert found, usage
        ptx = binary.asm["ptx"]
        matrix = {opcode: ptx.count(f"{opcode}.") for opcode in ("wgmma.mma_async", "mma.sync")}
        accesses = dict(Counter(re.findall(r"\b(?:ld|st)\.global\b[.\w]*", ptx)))
        elements = arguments["M"] * arguments["N"] // (32 * config.warps)
        registers, spilled = int(found[1]), int(found[2]) + int(found[3])
        shared = binary.metadata.shared
        emit(Kernel(op, chip, dtype, size, name, elements, registers, spilled, shared, matrix, accesses))


if __name__ == "__main__":
    rows: list[Kernel] = []
    chosen = json.loads(sys.argv[1]) if len(sys.argv) > 1 else None
    for target in chosen or ALL:
        build(*target, rows.append if chosen else print)
    if chosen:
        print(json.dumps(rows))
