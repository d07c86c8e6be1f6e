"""The GPU kernels' machine code on a machine without a GPU: compiled for cases with a target, disassembled, counted."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from cogview_ops.bench.measure import DTYPES
from cogview_ops.bench.problems import Problem

from .cases import GPU_CASES

ROOT = Path(__file__).parents[1]
CHIPS = {80: (164, 64), 90: (228, 64), 100: (228, 64), 120: (100, 48)}  # KB of shared memory, warps of a multiprocessor
KINDS = {"PIVOT": "grad_pivot", "DENSE": "grad_prefix"}  # constants that make another kernel of one
SHOWN = ("MUFU", "HGMMA", "HMMA", "LDG", "LDGSTS", "LDS", "LDSM", "STS", "SHFL", "BAR")


class Op(NamedTuple):
    case: str
    shape: str
    kernels: tuple[str, ...]
    small: dict[str, int]  # options of the case of which it is so many times as large
    rows: int = 0  # that the small case has, of kernels without matrix products
    size: str = "dim"  # the option that --size sets


KEYS, ROWS = ("forward", "grad_query", "grad_key"), ("forward", "backward")
OPS = {
    "three_region": Op("three_region_attention", "160x4224x64", (*KEYS, "grad_pivot"), {"heads": 1}),
    "decode": Op("three_region_attention_decode", "8x40x4224x64", ("decode",), {"heads": 1, "kv_heads": 1}),
    "local_2d": Op("local_attention_2d", "320x64x64x64", KEYS, {"heads": 1}),
    "softmax": Op("pb_relax_softmax", "320x1088x1088-causal", ROWS, {"heads": 1}, 1088, "seqlen"),
    "layer_norm": Op("layer_norm", "33792x2560", ROWS, {"rows": 1024}, 1024),
    "sandwich": Op("sandwich_layer_norm", "33792x2560", ROWS, {"rows": 1024}, 1024),
}
# of the CUDA C++ kernels: the file, and the template arguments of rows that are aligned and stay in registers
CUDA = {
    "softmax": ("pb_relax_softmax", r"{}I{}Lb1ELi([1-9]\d*)EE"),
    # the residual's dtype is the branch's: a reference to it, or float again
    "layer_norm": ("sandwich_layer_norm", r"{}I{}(?:S\w?_|(?<=If)f)Lb1ELi([1-9]\d*)ELb0E"),
    "sandwich": ("sandwich_layer_norm", r"{}I{}(?:S\w?_|(?<=If)f)Lb1ELi([1-9]\d*)ELb1E"),
}
# of attention in CUDA C++: the file, the kernel's template arguments, warps, scores that a warp's loop has at once (of
# windows of 9 x 9 in units of 16 keys); head_dim 64
TILES = {
    "local_2d": {
        "forward": ("tests/cuda_default_paths.cu", "13local_forwardI{}Li64E", 12, 3 * 256),
        "grad_query": ("tests/cuda_default_paths.cu", "14local_backwardI{}Li64ELb0E", 12, 256),
        "grad_key": ("tests/cuda_default_paths.cu", "14local_backwardI{}Li64ELb1E", 8, 256),
    },
    "three_region": {
        "forward": ("csrc/cuda/three_region_attention.cu", "7forwardI{}Li64E", 4, 4 * 256),
        "grad_query": ("csrc/cuda/three_region_attention.cu", "10grad_queryI{}Li64E", 4, 2 * 256),
        "grad_key": ("csrc/cuda/three_region_attention.cu", "11grad_windowI{}Li64E", 4, 2 * 256),
        "grad_pivot": ("csrc/cuda/three_region_attention.cu", "10grad_pivotI{}Li64E", 4, 2 * 256),
    },
}
SCALARS = {"bf16": "13__nv_bfloat16", "fp16": "6__half", "fp32": "f"}
NAMES = [f"{op}.{kernel}" for op, x in OPS.items() for kernel in x.kernels]
NAMES += [f"cuda.{op}.{kernel}" for op in CUDA for kernel in ROWS]
NAMES += [f"cuda.{op}.{kernel}" for op, kernels in TILES.items() for kernel in kernels]


class Code(NamedTuple):
    cubin: bytes
    warps: int
    shared: int  # dynamic
    elements: int  # scores of a tile, or elements of the rows that a block has at once
    symbol: str = "."


# --- compiling -------------------------------------------------------------------------------------------------------


def problem(op: str, dtype: str, backward: bool, size: int | None) -> tuple[Problem, int]:
    """A part of the case, and how many times as much all of it is."""
    about = OPS[op]
    build = next(x.build for x in GPU_CASES if (x.op, x.shape) == (about.case, about.shape))
    assert isinstance(build, partial)
    name = next(iter(about.small))
    torch.manual_seed(0)
    options = about.small | ({about.size: size} if size else {})
    return partial(build, **options)(DTYPES[dtype], backward), build.keywords[name] // about.small[name]


def width(op: str, size: int | None) -> int:
    """Elements of a row."""
    return size or int(OPS[op].shape.removesuffix("-causal").split("x")[-1])


def call(op: str, dtype: str, size: int | None, **how: Any) -> None:
    """Forward and, where there is one, backward of the small case in Triton."""
    backward = op != "decode"
    made, _ = problem(op, dtype, backward, size)
    inputs = [x.requires_grad_(backward) for x in made.inputs]
    results = made.ours(*inputs, impl="triton", **how)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    if backward:
        torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results])


def triton_kernels(op: str, chip: int, dtype: str, size: int | None) -> dict[str, Code]:
    """What Triton compiles for a call, which does not happen."""
    sys.path.insert(0, str(ROOT / "tests"))
    from triton_aot import caught

    from cogview_ops import _dispatch, _registration

    implement = _registration.implement
    with mock.patch.object(_registration, "implement", lambda name, f, devices: implement(name, f, ("cpu",))):
        assert _dispatch._load_triton() is None
    found: dict[str, Code] = {}
    with caught(chip) as launches:
        call(op, dtype, size)
    for launch in launches:
        it = launch.compilation
        name = next((kind for constant, kind in KINDS.items() if it.constants.get(constant)), it.kernel[:-7])
        if name in OPS[op].kernels:
            binary = it.compile(chip)
            shape = it.constants["SHAPE"]._asdict() if "SHAPE" in it.constants else it.constants
            tile = shape["M"] * (shape["N"] if "D" in shape else width(op, size))
            found[name] = Code(binary.asm["cubin"], it.warps, binary.metadata.shared, tile)
    return found


def cuda_kernels(op: str, chip: int, dtype: str, size: int | None) -> dict[str, Code]:
    """As csrc/cuda/row_team.cuh launches them for rows that stay in registers."""
    file, pattern = CUDA[op]
    cubin = compiled_by_nvcc(ROOT / "csrc" / "cuda" / f"{file}.cu", chip, dtype)
    cols, found = width(op, size), {}
    for name in ROWS:
        symbol = pattern.format(name, SCALARS[dtype])
        packs = re.search(symbol.encode(), cubin)
        assert packs, symbol
        kept = int(packs[1]) * 16 // DTYPES[dtype].itemsize
        team = next((t for t in (4, 8, 16, 32) if t * kept >= cols), -(-cols // (32 * kept)) * 32)
        threads = max(team, 128) if team <= 32 else team
        # the norms' backward keeps its sums in it
        shared = threads * kept * 4 * {"layer_norm": 2, "sandwich": 4}.get(op, 0) if name == "backward" else 0
        found[name] = Code(cubin, threads // 32, shared, threads // team * cols, symbol)
    return found


def cuda_tiles(op: str, chip: int, dtype: str) -> dict[str, Code]:
    """Attention in CUDA C++, of heads of 64, whatever the size of the problem. Shared memory is what a plan takes, all
    of it, or not known here."""
    found = {}
    for name, (source, pattern, warps, scores) in TILES[op].items():
        cubin = compiled_by_nvcc(ROOT / source, chip, dtype)
        found[name] = Code(cubin, warps, 0, warps * scores, pattern.format(SCALARS[dtype]))
    return found


@cache
def compiled_by_nvcc(source: Path, chip: int, dtype: str) -> bytes:
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    target = f"{chip}a" if chip == 90 else f"{chip}"
    flags = ["-std=c++17", "-O3", *COMMON_NVCC_FLAGS, f"-gencode=arch=compute_{target},code=sm_{target}"]
    flags += [f"-DCOGVIEW_ONE_DTYPE={dtype.replace('fp', 'f')}", "-cubin", "-o"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "k.cubin"
        subprocess.run(["nvcc", *flags, out, source], check=True)
        return out.read_bytes()


# --- reading ---------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(path) if path.exists() else shutil.which(name)
    if not found:
        sys.exit(f"benchmarks.sass: no {name}, neither of Triton nor on PATH")
    return found


def disassembled(code: Code) -> tuple[int, int, list[str], list[tuple[int, int]]]:
    """Registers, static shared memory, instructions without predicates, loops as (first, last)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.cubin)
        file.flush()
        usage = subprocess.check_output([tool("cuobjdump"), "-res-usage", file.name], text=True, stderr=subprocess.PIPE)
        text = subprocess.check_output([tool("nvdisasm"), "-c", file.name], text=True, stderr=subprocess.PIPE)
    resources = re.search(rf"Function \S*{code.symbol}.*\n.*REG:(?P<regs>\d+).* SHARED:(?P<shared>\d+)", usage)
    body = next(x for x in text.split("\t.section\t.text.")[1:] if re.search(code.symbol, x.splitlines()[0]))
    assert resources
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops = []
    for line in body.splitlines():
        if match := re.match(r"(\.L_\w+):", line):
            labels[match[1]] = len(lines)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?) *;", line):
            if (to := re.match(r"BRA.*`\((\.L_\w+)\)", match[1])) and to[1] in labels:
                loops.append((labels[to[1]], len(lines)))
            lines.append(match[1])
    return int(resources["regs"]), int(resources["shared"]), lines, loops


def read(code: Code, chip: int) -> dict[str, Any]:
    registers, static, lines, loops = disassembled(code)
    products = [x for x in loops if any("HGMMA" in line or "HMMA" in line for line in lines[x[0] : x[1]])]
    # without those around others
    inner = [x for x in products if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in products)]
    longest = max(loops, key=lambda x: x[1] - x[0], default=(0, 0))
    rows = longest if 2 * (longest[1] - longest[0]) > len(lines) else (0, len(lines) - 1)
    cheapest, *_, dearest = sorted(inner or [rows], key=lambda x: x[1] - x[0]) * 2
    each = 32 * code.warps / code.elements
    main = lines[cheapest[0] : cheapest[1] + 1]
    counts = Counter(line.split()[0].split(".")[0] for line in main)
    loads = [line for line in main if line.startswith("LDG")]  # narrow ones are of the same few numbers by many lanes
    shared, warps = CHIPS[chip]
    memory = code.shared + static
    fits = (32, warps // code.warps, 65536 // (-(-registers // 8) * 256 * code.warps), shared * 1024 // (memory + 1024))
    return {
        "registers": registers,
        "local": sum(line.startswith(("LDL", "STL")) for line in lines),
        "shared": memory,
        "warps": code.warps,
        "blocks": min(fits),
        "loop": len(main) * each,
        "edge": (dearest[1] - dearest[0] + 1) * each,
        "mufu": counts["MUFU"] * each,
        "loaded": each * 16 * sum(".128" in line for line in loads),
        "waits": [int(x, 16) for x in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", "\n".join(main))],
        "counts": {name: counts[name] for name in SHOWN if counts[name]},
    }
