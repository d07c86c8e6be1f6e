"""`python -m benchmarks.sass [NAME …]`: what the GPU compilers make of the kernels, and what that should take.

No GPU is needed (gpu_code.py). The columns:
regs    of a thread; local: instructions that move some to and from memory: spills
blocks  of a multiprocessor at once, by registers, shared memory and threads, and their warps
loop    instructions a score (attention) or an element of a row: in the cheapest loop with matrix products and in the
        dearest (tiles at an edge of the pattern); where there is no product in the row loop or the whole kernel
waits   for wgmma in the cheapest loop, by how many products may still be under way
floor   µs on an H100 that no method of the direction, forward or backward, can avoid: bytes or products
µs      from all parts overlapping to none: instructions, exponentials, products of whole tiles (counted in Triton's
        interpreter), loads of 16 bytes from L2, memory
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from cogview_ops.bench.measure import DTYPES

from . import gpu_code
from .gpu_code import CHIPS, KINDS, NAMES, OPS, ROOT

# an H100: multiprocessors, clock, exponentials a clock; bytes of a copy and of L2, FLOPs of bfloat16, a second
PROCESSORS, CLOCK, EXPS, COPY, L2, MATMUL = 132, 1.755e9, 16, 3.0e12, 5.5e12, 8e14
PRODUCTS = {"forward": 2, "grad_query": 3, "decode": 2}  # of a score; 4 elsewhere


def products(op: str, dtype: str, size: int | None) -> dict[str, int]:
    """FLOPs of each kernel's matrix products, tiles whole; in a process with Triton's interpreter."""
    from triton.runtime import interpreter

    from cogview_ops.triton import configs

    flops: Counter[str] = Counter()
    kernel, run = "", interpreter.GridExecutor.__call__

    def named(self: Any, *args: Any, **arguments: Any) -> Any:
        nonlocal kernel
        kernel = next((kind for constant, kind in KINDS.items() if arguments.get(constant)), self.fn.__name__[:-7])
        return run(self, *args, **arguments)

    def dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        flops[kernel] += 2 * a.data.size * b.data.shape[1]
        return total

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", named),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
        mock.patch.object(configs, "chip", return_value=90),
        mock.patch.object(configs, "processors", return_value=PROCESSORS),
    ):
        gpu_code.call(op, dtype, size)
    return flops


def counted(op: str, dtype: str, size: int | None) -> dict[str, int]:
    """`products` in a process of its own. They are the same with the Triton that is installed, whatever PYTHONPATH says
    (the interpreter of 3.6 fails with numpy 2.4), and in float16 (bfloat16 is not interpreted)."""
    command = [sys.executable, "-m", "benchmarks.sass", op, "--products", "--dtype", dtype.replace("bf", "fp")]
    command += ["--size", str(size)] if size else []
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE)
    flops: dict[str, int] = json.loads(run.stdout)
    return flops


def floors(op: str, dtype: str, size: int | None) -> dict[str, tuple[int, float, float]]:
    """By direction: how many times the small case it is, µs of its bytes, and µs that no method can avoid."""
    out, before = {}, (0, 0)
    for direction in ("forward", "backward")[: 1 + (op != "decode")]:
        part, times = gpu_code.problem(op, dtype, direction == "backward", size)
        moved, flops = part.bytes * times - before[0], part.flops * times - before[1]
        before = (part.bytes * times, part.flops * times)
        memory = 1e6 * moved / COPY
        out[direction] = (times, memory, max(memory, 1e6 * flops / MATMUL))
    return out


def expect(row: dict[str, Any], elements: float, memory: float, flops: int) -> tuple[float, float]:
    """Least and most µs."""
    a_clock = elements * 1e6 / (PROCESSORS * CLOCK)
    parts = [memory, a_clock * row["loop"] / 128, a_clock * row["mufu"] / EXPS]  # 4 instructions of a warp at once
    if flops:
        parts += [1e6 * flops / MATMUL, 1e6 * elements * row["loaded"] / L2]
    return max(parts), sum(parts)


def report(names: list[str], chip: int, dtype: str, size: int | None) -> list[dict[str, Any]]:
    rows = []
    for op in dict.fromkeys(name.rpartition(".")[0] for name in names):
        kind = op.removeprefix("cuda.")
        cuda = kind != op
        tiles = cuda and kind in gpu_code.TILES
        if tiles:
            codes = gpu_code.cuda_tiles(kind, chip, dtype)
        else:
            codes = (gpu_code.cuda_kernels if cuda else gpu_code.triton_kernels)(kind, chip, dtype, size)
        wanted = [name for name in codes if f"{op}.{name}" in names]
        limits = floors(kind, dtype, size)
        attention = kind in ("three_region", "decode", "local_2d") and not tiles
        flops = counted(kind, dtype, size) if attention and chip == 90 else {}
        for name in wanted:
            row = {"kernel": f"{op}.{name}", **gpu_code.read(codes[name], chip)}
            direction = "forward" if name in ("forward", "decode") else "backward"
            times, memory, row["floor"] = limits[direction]
            elements, products = OPS[kind].rows * gpu_code.width(kind, size), flops.get(name, 0)
            if flops:  # scores; each kernel of a backward has its part of the bytes
                elements = products // (2 * gpu_code.width(kind, size) * PRODUCTS.get(name, 4))
                memory /= 1 if direction == "forward" else len(codes) - 1
            if chip == 90 and not tiles:  # of which nothing counts the scores that they compute
                row["least"], row["most"] = expect(row, elements * times, memory, products * times)
            rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    counts = " ".join(f"{name} {count}" for name, count in row["counts"].items())
    span = f"{row['least']:.0f} to {row['most']:.0f}" if "least" in row else ""
    waits = " ".join(map(str, row["waits"])) or "-"
    return (
        f"{row['kernel']:<22}{row['registers']:5}{row['local']:6}{row['shared'] / 1024:7.1f}"
        f"{row['blocks']:4} x {row['warps']:<3}{row['loop']:6.1f}{row['edge']:7.1f}  {waits:<6}"
        f"{row['floor']:6.0f} {span:>13}  {counts}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sass", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a kernel or all of an operator: " + ", ".join(NAMES))
    parser.add_argument("--chip", type=int, choices=sorted(CHIPS), default=90)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--size", type=int, help="head_dim, or columns of a row (default: the case's)")
    parser.add_argument("--out", type=Path, help="a folder for rows as JSON, <chip>-<dtype>-triton-<version>.json")
    parser.add_argument("--products", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    how = (options.dtype, options.size)
    os.environ["TRITON_INTERPRET"] = str(int(options.products))  # before Triton is imported
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it was before 3.10
    if options.products:
        print(json.dumps(products(options.names[0], *how)))
        return
    names = [name for name in NAMES if not options.names or any(f"{name}.".startswith(f"{x}.") for x in options.names)]
    for name in options.names:
        if not any(f"{x}.".startswith(f"{name}.") for x in NAMES):
            parser.error(f"no kernel {name!r}: {', '.join(NAMES)}")
    import triton

    print(f"sm_{options.chip}, {options.dtype}, Triton {triton.__version__}")
    print(f"{'kernel':<22} regs local     KB  blocks   loop   edge  waits  floor      µs")
    rows = report(names, options.chip, *how)
    print(*map(line, rows), sep="\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"sm_{options.chip}-{options.dtype}-triton-{triton.__version__}.json"
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
