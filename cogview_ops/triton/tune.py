"""`python -m cogview_ops.triton.tune`: measure tile sizes on the GPU at hand, print the best as rows for configs.py.

Each kernel is tuned by the time of the whole call it is part of, the others at their shipped sizes.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from . import configs, local_attention_2d, three_region_attention
from .configs import Config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Calls = dict[str, Callable[[], object]]  # by the kernel that they are for
KERNELS = (
    *("forward", "grad_query", "grad_key", "grad_pivot", "decode"),
    *("local_forward", "local_grad_query", "local_grad_key", "local_decode"),
)


def candidates(kernel: str) -> Iterator[Config]:
    decode = kernel.endswith("decode")
    rows = (16,) if decode else (16, 32, 64, 128)
    for m, n, warps, stages in itertools.product(rows, (16, 32, 64, 128), (4, 8), (1, 2, 3)):
        if decode or m * n >= 1024:
            yield Config(m, n, warps, stages)


def best(kernel: str, call: Callable[[], object]) -> Config:
    """The fastest candidate that fits the chip."""
    times: dict[Config, float] = {}
    for config in candidates(kernel):
        with configs.trying(kernel, config):
            try:
                times[config] = triton.testing.do_bench(call, return_mode="median")
            except (triton.OutOfResources, triton.CompilationError):
                continue
    if not times:
        raise RuntimeError(f"{kernel}: none of the candidates fits this GPU")
    return min(times, key=lambda config: times[config])


def three_region_calls(x: Tensor, pivots: Tensor, block_size: int, window_blocks: int) -> Calls:
    op, pattern = three_region_attention, (block_size, window_blocks, 0.0, x.shape[3] ** -0.5)
    out, lse = op.forward(x, x, x, pivots, *pattern)
    lengths = torch.full(x.shape[:1], x.shape[2], device=x.device)

    def gradients() -> object:
        return op.backward(x, None, x, x, x, out, lse, pivots, *pattern)

    return {
        "forward": lambda: op.forward(x, x, x, pivots, *pattern),
        "grad_query": gradients,
        "grad_key": gradients,
        "grad_pivot": gradients,
        "decode": lambda: op.decode(x[:, :, -1:], x, x, pivots, lengths, *pattern),
    }


def local_2d_calls(x: Tensor, grid: list[int], kernel_size: list[int]) -> Calls:
    op, no_sets, window = local_attention_2d, (None,) * 5, (grid, kernel_size, [1, 1])
    rest = (0.0, [0, 0], [0, 0], 0.0, x.shape[3] ** -0.5)
    out, lse = op.forward(x, x, x, *no_sets, *window, False, False, *rest)
    lengths = torch.full(x.shape[:1], x.shape[2], device=x.device)

    def gradients() -> object:
        return op.backward(x, None, x, x, x, *no_sets, out, lse, *window, False, False, *rest)

    return {
        "local_forward": lambda: op.forward(x, x, x, *no_sets, *window, False, False, *rest),
        "local_grad_query": gradients,
        "local_grad_key": gradients,
        "local_decode": lambda: op.decode(x[:, :, -1:], x, x, *no_sets, lengths, *window, *rest),
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
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    args = parser.parse_args()
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    pivots = torch.stack(
        [torch.randperm(args.tokens, device=device, generator=generator)[: args.pivots] for _ in range(args.batch)]
    )
    print(f"# {torch.cuda.get_device_name()}, Triton {triton.__version__}: CHIPS[{configs.chip(device)}]")
    for dim in args.head_dim:

        def draw(tokens: int, dim: int = dim) -> Tensor:
            shape = (args.batch, args.heads, tokens, dim)
            return torch.randn(shape, device=device, dtype=DTYPES[args.dtype], generator=generator)

        call = three_region_calls(draw(args.tokens), pivots.sort().values.int(), args.block_size, args.window_blocks)
        call |= local_2d_calls(draw(args.grid[0] * args.grid[1]), args.grid, args.kernel_size)
        for kernel in args.kernels:
            size = DTYPES[args.dtype].itemsize
            print(f'("{kernel}", {size}): {{{dim}: {best(kernel, call[kernel])}}},', flush=True)


if __name__ == "__main__":
    main()
