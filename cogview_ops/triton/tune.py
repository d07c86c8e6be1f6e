"""`python -m cogview_ops.triton.tune`: measure tile sizes on the GPU at hand, print the best as rows for configs.py.

Each kernel is tuned by the time of the whole call it is part of, the others at their shipped sizes. Lines of `#` have
its five best and the shipped one. Kernels are timed in the order given, each as soon as it is compiled for all sizes.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context

import torch
import triton
from torch import Tensor

from . import configs, local_attention_2d, three_region_attention
from ._compile_ahead import Compiler, Found, caught
from ._tiles import block_d
from .configs import Config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Calls = dict[str, Callable[[], object]]  # by the kernel that they are for
KERNELS = (  # what takes longest in training first
    *("forward", "local_forward", "grad_key", "grad_query", "grad_pivot", "local_grad_key", "local_grad_query"),
    *("decode", "local_decode"),
)


def candidates(kernel: str, wgmma: bool = True) -> Iterator[Config]:
    """wgmma multiplies 64 rows at a time: of queries or, for gradients of keys, of keys."""
    sides, decode, of_keys = (16, 32, 64, 128), kernel.endswith("decode"), kernel.endswith(("grad_key", "grad_pivot"))
    rows = (16,) if decode else sides if not wgmma else (64, 128) if of_keys else (64, 128, 256)
    others = (32, 64, 128) if wgmma and not decode else sides
    for own, other, warps, stages in itertools.product(rows, others, (4, 8), (2, 3, 4) if wgmma else (1, 2, 3)):
        if decode or 1024 <= own * other <= 2048 * warps:  # more scores than 64 a thread spill
            yield Config(*((other, own) if of_keys else (own, other)), warps, stages)


def measure(kernel: str, config: Config, call: Callable[[], object]) -> float:
    """Microseconds."""
    with configs.trying(kernel, config):
        try:
            return 1e3 * triton.testing.do_bench(call, warmup=5, rep=40, return_mode="median")
        except (triton.OutOfResources, RuntimeError) as error:
            print(f"{kernel} {config}: {error}", file=sys.stderr, flush=True)
            return float("inf")


def tune(kernels: list[str], build: Callable[[], Calls], size: int, dim: int, compiler: Compiler) -> None:
    arch = configs.chip(torch.device("cuda"))
    with caught() as usual:
        calls = build()
    compiler.ask(usual)
    needs: dict[str, dict[Config, Found]] = {kernel: {} for kernel in kernels}
    for kernel in kernels:
        shipped = configs.lookup(kernel, arch, size, block_d(dim))
        for config in dict.fromkeys([shipped, *candidates(kernel, size == 2 and arch in (90, 100))]):
            with caught() as needs[kernel][config], configs.trying(kernel, config):
                calls[kernel]()
            compiler.ask(needs[kernel][config])
    print(f"head_dim {dim}: {len(compiler.asked)} compilations", file=sys.stderr, flush=True)
    compiler.fits(usual)
    calls = build()  # now forward computes
    for kernel, sizes in needs.items():
        shipped, others = next(iter(sizes.items()))
        compiler.fits(others)
        fit = [
            config for config, found in sizes.items() if compiler.fits({x: found[x] for x in found if x not in others})
        ]
        print(f"{kernel}: {len(fit)} of {len(sizes)} sizes fit", file=sys.stderr, flush=True)
        times = {config: measure(kernel, config, calls[kernel]) for config in fit}
        finalists = sorted(times, key=times.__getitem__)[:5]
        times = {config: measure(kernel, config, calls[kernel]) for config in dict.fromkeys([*finalists, shipped])}
        best, *_ = ranking = sorted(times, key=times.__getitem__)
        for config in ranking:
            print(f"# {times[config]:9.1f} us {config}{', shipped' if config == shipped else ''}")
        print(f'("{kernel}", {size}): {{{dim}: {best}}},', flush=True)


def three_region_calls(qkv: Tensor, pivots: Tensor, block_size: int, window_blocks: int) -> Calls:
    (q, k, v), dout = qkv, torch.randn_like(qkv[0])
    op, pattern = three_region_attention, (block_size, window_blocks, 0.0, q.shape[3] ** -0.5)
    out, lse = op.forward(q, k, v, pivots, *pattern)
    lengths = torch.full(q.shape[:1], q.shape[2], device=q.device)

    def gradients() -> object:
        return op.backward(dout, None, q, k, v, out, lse, pivots, *pattern)

    return {
        "forward": lambda: op.forward(q, k, v, pivots, *pattern),
        "grad_query": gradients,
        "grad_key": gradients,
        "grad_pivot": gradients,
        "decode": lambda: op.decode(q[:, :, -1:], k, v, pivots, lengths, *pattern),
    }


def local_2d_calls(qkv: Tensor, grid: list[int], kernel_size: list[int]) -> Calls:
    (q, k, v), dout = qkv, torch.randn_like(qkv[0])
    op, no_sets, window = local_attention_2d, (None,) * 7, (grid, kernel_size, [1, 1])
    rest = (0.0, [0, 0], [0, 0], 0.0, q.shape[3] ** -0.5)
    out, lse = op.forward(q, k, v, *no_sets, *window, False, False, *rest)
    lengths = torch.full(q.shape[:1], q.shape[2], device=q.device)

    def gradients() -> object:
        return op.backward(dout, None, q, k, v, *no_sets, out, lse, *window, False, False, *rest)

    return {
        "local_forward": lambda: op.forward(q, k, v, *no_sets, *window, False, False, *rest),
        "local_grad_query": gradients,
        "local_grad_key": gradients,
        "local_decode": lambda: op.decode(q[:, :, -1:], k, v, *no_sets, lengths, None, *window, True, False, *rest),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cogview_ops.triton.tune", description=__doc__)
    for name, default in (("batch", 4), ("heads", 40), ("tokens", 4224), ("pivots", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--window-blocks", type=int, default=6)
    parser.add_argument("--grid", type=int, nargs=2, default=[64, 64])
    parser.add_argument("--kernel-size", type=int, nargs=2, default=[9, 9])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2), help="that compile")
    args = parser.parse_args()
    device, dtype = torch.device("cuda"), DTYPES[args.dtype]

    def build(dim: int) -> Calls:
        torch.manual_seed(0)
        pivots = torch.stack([torch.randperm(args.tokens, device=device)[: args.pivots] for _ in range(args.batch)])
        # each its own memory: what was one tensor would be read once
        shape = (3, args.batch, args.heads)
        text = torch.randn(*shape, args.tokens, dim, device=device, dtype=dtype)
        image = torch.randn(*shape, args.grid[0] * args.grid[1], dim, device=device, dtype=dtype)
        calls = three_region_calls(text, pivots.sort().values.int(), args.block_size, args.window_blocks)
        return calls | local_2d_calls(image, args.grid, args.kernel_size)

    with get_context("spawn").Pool(args.workers) as pool:
        compiler = Compiler(pool)
        print(f"# {torch.cuda.get_device_name()}, Triton {triton.__version__}: CHIPS[{configs.chip(device)}]")
        for dim in args.head_dim:
            tune(args.kernels, partial(build, dim), dtype.itemsize, dim, compiler)


if __name__ == "__main__":
    main()
