"""Prints the PTX for compute capability 9.0 of two products as attention has them, [ROWS, D] by [ROWS, D]' and that by
[ROWS, D], by the Triton that is on the path: `python tests/triton_dot.py D...`, as a list in JSON."""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROWS = 128


@triton.jit
def dot_kernel(q, k, v, out, ROWS: tl.constexpr, D: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(q + at)
    y = tl.load(k + at)
    z = tl.load(v + at)
    s = tl.dot(x, tl.trans(y))
    tl.store(out + at, tl.dot(s.to(tl.bfloat16), z))


if __name__ == "__main__":
    signature = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "out": "*fp32", "ROWS": "constexpr", "D": "constexpr"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    target, options = GPUTarget("cuda", 90, 32), {"num_warps": 4}
    sources = [ASTSource(dot_kernel, signature, {(4,): ROWS, (5,): int(dim)}, attributes) for dim in sys.argv[1:]]
    print(json.dumps([triton.compile(source, target=target, options=options).asm["ptx"] for source in sources]))
