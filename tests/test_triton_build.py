"""The Triton kernels as compiled ahead of time for GPUs, on machines without one: matrix instructions, wide accesses,
spills, what ptxas complains of, sizes.

What is compiled is what the launchers launch on meta tensors (triton_aot.py), by the Triton that is installed and by
3.6.0 where `pip install --target build/triton-3.6.0 --no-deps triton==3.6.0` has put it. A process of its own does it,
because in this one kernels are interpreted (conftest.py). COGVIEW_TESTS=all compiles every row of configs.py too, in
half an hour. `python tests/test_triton_build.py` prints what there is in all of them.
"""

import ast
import concurrent.futures
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from triton_aot import Compilation, caught, leaves

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parents[1]
OTHER = ROOT / "build" / "triton-3.6.0"
SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}  # KB that a block can have
SMALLEST = 99  # of all chips since 80: 86, 89 and 120
# forward, backward and decode for both chips, in both dtypes, at head_dim 64 and 128
ATTENTION = [
    *(("three_region", *x) for x in ((80, "bfloat16", 128), (90, "bfloat16", 64))),
    ("three_region", 90, "float16", 128),
    *(("three_region_packed", *x) for x in ((80, "float16", 128), (90, "bfloat16", 64))),
    ("local_2d", 80, "float16", 64),  # the image alone
    ("local_2d_shift", 90, "bfloat16", 64),  # dilated and shifted, with a prefix without a mask
    ("local_2d_sets", 90, "bfloat16", 64),  # with a prefix and a coarse grid
    ("local_2d_biased", 80, "float16", 64),  # with a table and a mask, decoding any cells
    ("local_2d_biased", 90, "bfloat16", 64),
    ("local_2d_cross", 90, "bfloat16", 64),  # a coarse grid alone
]
# the widest rows of which nothing spills, rows that are no power of two, several of them in a program
ROWS = [
    *(("softmax", *x) for x in ((80, "float16", 1088), (90, "bfloat16", 64), (90, "bfloat16", 16384))),
    *(("layer_norm", *x) for x in ((80, "bfloat16", 4096), (90, "float16", 2560))),
    *(("sandwich", *x) for x in ((80, "float16", 2560), (90, "bfloat16", 4096))),
    ("sandwich_tensor", 90, "bfloat16", 2560),
    ("sandwich_wide", 90, "bfloat16", 2560),  # beside a residual in float32
    ("sandwich_seeds", 90, "bfloat16", 2560),  # one for each sample
    *(("rms_norm", *x) for x in ((80, "bfloat16", 4096), (90, "float16", 2560))),
    *(("rms_both", *x) for x in ((80, "float16", 2560), (90, "bfloat16", 4096))),
    ("rms_pre", 90, "bfloat16", 4096),
    ("rms_post", 90, "bfloat16", 4096),
]
# sizes of 1, which Triton makes constants: one sample, head, token, row, column, key of a set
ONES = [("ones", 90, "float32", 1)]
WIDE = [("local_2d_sets", 90, "float64", 64)]  # all sets, which is where Triton 3.6 has had no float64
LOCAL = ("local_2d", "local_2d_shift", "local_2d_sets", "local_2d_biased", "local_2d_cross")
THREE_REGION = ("three_region", "three_region_packed")  # the latter with decode in left-padded caches
OPS = (*THREE_REGION, *LOCAL)
ALL = [
    *itertools.product(OPS, SHARED_MEMORY, ("bfloat16", "float16", "float32", "float64"), (16, 64, 128, 256)),
    *itertools.product(
        dict.fromkeys(x[0] for x in ROWS), SHARED_MEMORY, ("bfloat16", "float32"), (64, 1088, 2560, 65536)
    ),
]
# kernels of a target
KERNELS = {
    **dict.fromkeys(
        THREE_REGION,
        "rank_kernel gather_kernel forward_kernel grad_query_kernel grad_pivot_kernel grad_key_kernel "
        "decode_kernel combine_kernel",
    ),
    "local_2d": "forward_kernel grad_query_kernel grad_key_kernel decode_kernel combine_kernel",
    "local_2d_biased": "forward_kernel grad_query_kernel grad_key_kernel sum_table_kernel decode_kernel combine_kernel",
    "local_2d_cross": "forward_kernel grad_query_kernel grad_key_kernel",
    "sandwich_wide": "forward_kernel backward_kernel",
    **dict.fromkeys(
        ("local_2d_shift", "local_2d_sets"),
        "forward_kernel grad_query_kernel grad_prefix_kernel grad_key_kernel decode_kernel combine_kernel",
    ),
}
# rows that a kernel reads and writes, parameters that it reads, and gradients of them that it writes, in float32
TENSORS = {
    ("softmax", "forward_kernel"): (1, 1, 0, 0),
    ("softmax", "backward_kernel"): (2, 1, 0, 0),
    ("layer_norm", "forward_kernel"): (1, 1, 2, 0),
    ("layer_norm", "backward_kernel"): (2, 1, 1, 2),
    ("sandwich", "forward_kernel"): (2, 2, 4, 0),
    ("sandwich", "backward_kernel"): (4, 2, 2, 4),
    ("sandwich_seeds", "forward_kernel"): (2, 2, 4, 0),
    ("sandwich_seeds", "backward_kernel"): (4, 2, 2, 4),
    ("sandwich_tensor", "peak_kernel"): (1, 0, 0, 0),
    ("sandwich_tensor", "post_kernel"): (2, 1, 2, 0),
    ("sandwich_tensor", "forward_kernel"): (1, 1, 2, 0),
    ("rms_norm", "forward_kernel"): (1, 1, 1, 0),
    ("rms_norm", "backward_kernel"): (2, 1, 1, 1),
    ("rms_both", "forward_kernel"): (2, 2, 2, 0),
    ("rms_both", "backward_kernel"): (4, 2, 2, 2),
    ("rms_pre", "forward_kernel"): (2, 2, 1, 0),
    ("rms_pre", "backward_kernel"): (3, 1, 1, 1),  # branch and residual have one gradient
    ("rms_post", "post_kernel"): (2, 1, 1, 0),
    ("rms_post", "backward_kernel"): (2, 1, 1, 1),
}
# other accesses of them: statistics of every row, its largest |element| or the tensor's, and dropout's seed
NUMBERS = {"softmax": 0, "layer_norm": 2, "rms_norm": 1} | {
    **dict.fromkeys(("sandwich", "sandwich_seeds", "sandwich_tensor"), 5),
    **dict.fromkeys(("rms_both", "rms_pre", "rms_post"), 2),
}
STEPS = ("sandwich", "sandwich_seeds", "sandwich_tensor", "rms_both", "rms_pre", "rms_post")
Target = tuple[str, int, str, int]


class Kernel(NamedTuple):
    op: str
    chip: int
    dtype: str
    size: int  # head_dim, or columns of a row
    name: str
    function: str
    tabled: bool  # its sizes are of a row in configs.ANY
    elements: int  # of a tensor in a thread, where programs have whole rows
    registers: int
    spilled: int  # bytes of a thread
    complaints: list[str]  # of ptxas
    shared: int
    matrix: dict[str, int]  # instructions by opcode
    accesses: dict[str, int]  # of global memory, by opcode


def compiled(version: str, targets: list[Target]) -> list[Kernel]:
    folders = [ROOT]
    if version != "installed":
        if not (OTHER / f"triton-{version}.dist-info").exists():
            pytest.skip(f"no Triton {version}: pip install --target build/{OTHER.name} --no-deps triton=={version}")
        folders = [OTHER, ROOT]
    env = {**os.environ, "PYTHONPATH": ":".join(map(str, folders)), "TRITON_INTERPRET": "0"}
    env |= {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(ROOT / "build" / "triton-tests")}
    run = subprocess.run([sys.executable, __file__, json.dumps(targets)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    used, *rows = json.loads(run.stdout)
    assert version in ("installed", used)
    return [Kernel(*row) for row in rows]


@pytest.fixture(scope="module", params=["installed", "3.6.0"])
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    return compiled(request.param, [*ATTENTION, *ROWS, *ONES, *(WIDE if request.param == "3.6.0" else [])])


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    for target in [*ATTENTION, *ROWS]:
        names = [name for op, name in TENSORS if op == target[0]] or KERNELS[target[0]].split()
        assert {kernel.name for kernel in kernels if kernel[:4] == target} == set(names)


def test_what_is_launched_is_compiled(kernels: list[Kernel]) -> None:
    """Also by whoever adds a kernel."""
    defined, launched = set(), set()
    for path in (ROOT / "cogview_ops" / "triton").glob("*.py"):
        text = path.read_text()
        defined |= {f"{path.stem}.{name}" for name in re.findall(r"^@kernel\ndef (\w+)", text, re.MULTILINE)}
        launched |= set(re.findall(r"(?<!def )\blaunch\(\s*(\w+)", text))
    assert {name.split(".")[1] for name in defined} == launched
    assert {kernel.function for kernel in kernels} == defined


def test_nothing_returns_none() -> None:
    """Which Triton 3.6 cannot compile, and all else takes."""
    for path in (ROOT / "cogview_ops" / "triton").glob("*.py"):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.decorator_list:
                returned = [ast.unparse(x) for x in ast.walk(function) if isinstance(x, ast.Return)]
                assert "return None" not in returned, f"{path.name}: {function.name}"


def test_nothing_spills(kernels: list[Kernel], request: pytest.FixtureRequest) -> None:
    """But where a packed sequence's rows are, which is asked before and behind the loops, and beside a table."""
    beside_table = {"installed": 16, "3.6.0": 112}[request.node.callspec.params["kernels"]]
    for kernel in kernels:
        assert kernel.spilled <= {"three_region_packed": 64, "local_2d_biased": beside_table}.get(kernel.op, 0), kernel


def test_ptxas_does_not_complain(kernels: list[Kernel]) -> None:
    """For example of matrix products that wait for one another: C7510 and those after it."""
    for kernel in kernels:
        assert not kernel.complaints, kernel


def test_shared_memory_fits(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        limit = SMALLEST if kernel.tabled else SHARED_MEMORY[kernel.chip]
        assert kernel.shared <= limit * 1024, kernel


def test_matrix_instructions(kernels: list[Kernel]) -> None:
    """wgmma on Hopper, mma.sync elsewhere and for the 16 rows of a decode."""
    without = ("rank_kernel", "gather_kernel", "combine_kernel", "sum_table_kernel")
    for kernel in (x for x in kernels if x.op in OPS and x.dtype != "float64" and x.name not in without):
        opcode = "wgmma.mma_async" if kernel.chip == 90 and kernel.name != "decode_kernel" else "mma.sync"
        # s and out; with a gradient also dp, and dv or not; the loops of full tiles and of edge tiles have them each,
        # or those of the sets
        dots = {"forward_kernel": 2, "grad_query_kernel": 3, "decode_kernel": 2}.get(kernel.name, 4)
        if kernel.op in THREE_REGION:
            dots *= 1 if kernel.name == "decode_kernel" else 2
        elif kernel.op == "local_2d_sets" and kernel.name not in ("grad_prefix_kernel", "grad_key_kernel"):
            dots *= 3
        assert kernel.matrix[opcode] >= dots, kernel
        assert sum(kernel.matrix.values()) == kernel.matrix[opcode], kernel


def test_rows_move_16_bytes_at_once(kernels: list[Kernel]) -> None:
    """And once: nothing is read again."""
    for kernel in (x for x in kernels if (x.op, x.name) in TENSORS):
        packs = kernel.elements // 8
        read, written, parameters, sums = TENSORS[kernel.op, kernel.name]
        wide = {"ld": packs * (read + parameters), "st": packs * (written + 2 * sums)}
        for access, count in wide.items():
            assert kernel.accesses.get(f"{access}.global.v4.b32", 0) == count, kernel
        assert sum(kernel.accesses.values()) - sum(wide.values()) <= NUMBERS[kernel.op], kernel


@pytest.mark.skipif(os.environ.get("COGVIEW_TESTS") != "all", reason="takes half an hour: COGVIEW_TESTS=all")
@pytest.mark.parametrize("version", ["installed", "3.6.0"])
@pytest.mark.parametrize("chip", SHARED_MEMORY)
def test_every_row_of_the_tables(version: str, chip: int) -> None:
    """Fits the chip, in 16 bits but for sixteen registers; on Hopper no product waits for another."""
    dtypes, sizes = ("bfloat16", "float32", "float64"), (64, 128, 256)
    targets = list(itertools.product((*THREE_REGION, "local_2d_sets"), (chip,), dtypes, sizes))
    kernels = compiled(version, targets)
    assert {kernel[:4] for kernel in kernels} == set(targets)
    test_shared_memory_fits(kernels)
    test_ptxas_does_not_complain(kernels)
    for kernel in kernels:
        assert kernel.spilled <= 64 or kernel.dtype != "bfloat16", kernel


def calls(op: str) -> Any:
    kinds = {"ones": call_ones} | dict.fromkeys(THREE_REGION, call_three_region) | dict.fromkeys(LOCAL, call_local_2d)
    return kinds.get(op, call_rows)


def test_sizes_compile_nothing_anew() -> None:
    """Every integer that a kernel takes is a size, or is known to be worth compiling for: a stride, or what accesses
    and registers gain by. And multiples of 16 and other sizes are the same compilations."""
    code = "import json, test_triton_build as t; print(json.dumps(t.integers()))"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    sizes, integers, differ = json.loads(run.stdout)
    strides = {name for name in integers if re.search(r"[._](b|h|s|odd\d|s\d)$", name)}
    assert set(integers) - strides - set(sizes) <= {"cols", "block_size", "splits", "mask_column"}
    assert set(sizes) <= set(integers)
    assert not differ


def integers() -> tuple[tuple[str, ...], list[str], list[str]]:
    """Names that Triton shall not compile anew for, names of all integers, compilations that differ by sizes."""
    from cogview_ops.triton import pb_relax_softmax
    from cogview_ops.triton._tiles import SIZES

    names: set[str] = set()
    found = []
    for tokens in (1600, 1607):
        with caught(90) as launches:
            for op in THREE_REGION:
                call_three_region(op, torch.float16, 16, 3, 5, tokens)
            for op in ("softmax", "layer_norm", "rms_norm", *STEPS):
                call_rows(op, torch.float16, 64, tokens)
            apart = torch.empty(2, 2000, 64, dtype=torch.float16, device="meta")[:, :tokens]  # rows on two axes
            pb_relax_softmax.forward(apart, None, 32.0, True)
        found.append({launch.compilation.dump() for launch in launches})
        with caught(90) as others:
            for op in LOCAL:
                call_local_2d(op, torch.float16, 16)
            call_ones("ones", torch.float16, 1)
        for launch in (*launches, *others):
            names |= {name for name, kind, _ in leaves(launch.compilation.signature) if kind in ("i32", "i64")}
    return SIZES, sorted(names), sorted(found[0] ^ found[1])


def test_grids_are_within_the_limits() -> None:
    """Of CUDA: 65,535 in y and z, 2**31 - 1 in x. 70,000 heads of a few tokens."""
    import cogview_ops.triton as package
    from cogview_ops.triton import configs

    grids: dict[str, tuple[int, ...]] = {}

    def catch(kernel: Any, grid: tuple[int, ...], config: Any, **arguments: Any) -> None:
        grids[kernel.fn.__name__] = grid
        assert len(grid) <= 3
        assert 1 <= grid[0] < 2**31, kernel
        assert all(1 <= n <= 65535 for n in grid[1:]), (kernel, grid)

    with contextlib.ExitStack() as patches:
        for module in vars(package).values():
            if hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", catch))
        patches.enter_context(mock.patch.object(configs, "chip", return_value=90))
        for batch, heads in ((70000, 1), (1, 70000), (1, 1)):
            for op in THREE_REGION:
                call_three_region(op, torch.float16, 16, batch, heads, 300)
            for sets in ("local_2d", "local_2d_sets", "local_2d_biased"):
                call_local_2d(sets, torch.float16, 16, batch, heads, 8)
        for op in ("softmax", "layer_norm", "rms_norm", *STEPS):
            call_rows(op, torch.float16, 16, 70000 * 40)
    kinds = {"grad_pivot_kernel", "grad_prefix_kernel"}  # of another
    expected = {name for names in KERNELS.values() for name in names.split()} - kinds
    assert set(grids) == expected | {"sum_kernel", "backward_kernel", "peak_kernel"}


# --- calls on meta tensors -------------------------------------------------------------------------------------------


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def call_three_region(
    op: str, dtype: torch.dtype, head_dim: int, batch: int = 4, heads: int = 40, tokens: int = 4224, block: int = 128
) -> None:
    from cogview_ops.triton import three_region_attention

    x = torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(batch, heads, tokens, dtype=accumulated(dtype), device="meta")
    pivots = torch.empty(batch, max(tokens * 2 // 11, 1), dtype=torch.int32, device="meta")
    options = (block, min(6, tokens // block // 2 + 1), 1.6, head_dim**-0.5)
    if op == "three_region_packed":
        packed, of_packed = x.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1)
        of = pivots, torch.empty(batch + 1, dtype=torch.int32, device="meta"), tokens, *options
        three_region_attention.varlen_forward(packed, packed, packed, *of)
        three_region_attention.varlen_backward(*[packed, of_packed], *[packed] * 4, of_packed, *of)
        three_region_attention.decode(x[:, :, :1], x, x, pivots, pivots[:, 0], *options, pivots[:, 0])
        return
    three_region_attention.forward(x, x, x, pivots, *options)
    three_region_attention.backward(x, lse, x, x, x, x, lse, pivots, *options)
    three_region_attention.decode(x[:, :, :1], x, x, pivots, pivots[:, 0], *options)


def call_local_2d(
    op: str, dtype: torch.dtype, head_dim: int, batch: int = 4, heads: int = 40, side: int = 64, prefix: int = 64
) -> None:
    """CogView2's super-resolution from 32 x 32 to 64 x 64; its local part alone; that dilated and shifted, and text; or
    with a table, some keys hidden, and queries anywhere; its coarse part alone."""
    from cogview_ops.triton import local_attention_2d

    def empty(tokens: int) -> torch.Tensor:
        return torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device="meta")

    x, text, coarse = empty(side**2), empty(prefix), empty(side**2 // 4)
    lse = torch.empty(batch, heads, side**2, dtype=accumulated(dtype), device="meta")
    mask = torch.empty(batch, prefix, dtype=torch.bool, device="meta")
    key_mask = torch.empty(batch, side**2, dtype=torch.bool, device="meta")
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")
    kernel = [min(17, side - 1), 9 if side > 9 else 7]
    table = torch.empty(heads, *(2 * k - 1 for k in kernel), dtype=lse.dtype, device="meta")
    sets = {"local_2d_sets": (text, text, coarse, coarse, None, mask, None)}
    sets["local_2d_shift"] = text, text, *(None,) * 5
    sets["local_2d_biased"] = *(None,) * 4, table, None, key_mask
    sets["local_2d_cross"] = None, None, coarse, coarse, *(None,) * 3
    others = sets.get(op, (None,) * 7)
    shift, biased, cross = (op.endswith(kind) for kind in ("_shift", "_biased", "_cross"))
    window = [side, side], [0, 0] if cross else kernel, [3, 2] if shift else [1, 1]
    edges = (op in ("local_2d", "local_2d_sets"), shift or biased)
    rest = (1.2, [side // 2, side // 2], [7, 7], 0.5, head_dim**-0.5)
    keys = (None, None) if cross else (x, x)
    local_attention_2d.forward(x, *keys, *others, *window, *edges, *rest)
    local_attention_2d.backward(x, lse, x, *keys, *others, x, lse, *window, *edges, *rest)
    places = lengths, lengths[:, None] if biased else None
    if not cross:
        local_attention_2d.decode(x[:, :, :1], x, x, *others, *places, *window, not biased, biased, *rest)


def call_rows(op: str, dtype: torch.dtype, width: int, rows: int = 4096) -> None:
    """Softmax, a norm, or a step; of LayerNorm with dropout."""
    from cogview_ops.triton import pb_relax_softmax, sandwich_layer_norm

    samples = (2,) if op == "sandwich_seeds" else ()
    x = torch.empty(*samples, rows, width, dtype=dtype, device="meta")
    weight, stats = x.flatten(0, -2)[0], torch.empty(*samples, rows, device="meta")
    rms = op.startswith("rms")
    kind, bias, mean = ("rms_norm", None, None) if rms else ("layer_norm", weight, stats)
    relax = 0 if rms else sandwich_layer_norm.TENSOR if op == "sandwich_tensor" else sandwich_layer_norm.ROW
    if op == "softmax":
        pb_relax_softmax.forward(x, None, 32.0, True)
        pb_relax_softmax.backward(x, x, 32.0, True)
    elif op.endswith("_norm"):
        sandwich_layer_norm.norm_forward(kind, x, weight, bias, 1e-5, relax, float(rms), rms)
        sandwich_layer_norm.norm_backward(kind, x, x, weight, mean, stats, float(rms))
    else:
        h = x.float() if op == "sandwich_wide" else x
        post, pre = op != "rms_pre", op != "rms_post"
        weights = [w if there else None for w, there in ((weight, post), (bias, post), (weight, pre), (bias, pre))]
        drops = (0.0, False, None) if rms else (0.1, False, torch.empty(samples, dtype=torch.int64, device="meta"))
        sandwich_layer_norm.step_forward(kind, x, h, *weights, None, 1.0, 1e-5, relax, float(rms), False, *drops)
        if relax != sandwich_layer_norm.TENSOR:  # the backward does not know
            saved = x if post else None, h if pre else None, weights[0], None, weights[2], None
            moments = [m if there else None for there in (post, pre) for m in (mean, stats)]
            numbers = not post, 1.0, float(rms), *drops
            sandwich_layer_norm.step_backward(kind, h, x if pre else None, *saved, *moments, *numbers)


def call_ones(op: str, dtype: torch.dtype, one: int) -> None:
    from cogview_ops.triton import local_attention_2d, pb_relax_softmax

    for kind in THREE_REGION:
        call_three_region(kind, dtype, one, one, one, one, one)
        call_three_region(kind, dtype, one, one, one, 5, one)  # the last four see pivots
    x = torch.empty(one, one, 300, one, dtype=dtype, device="meta")
    lse, key, mask = x[..., 0], x[:, :, :1], torch.empty(one, one, dtype=torch.bool, device="meta")
    others, options = (key, key, key, key, None, mask, None), (1.0, [1, 1], [1, 1], 1.0, 1.0)
    local_attention_2d.forward(x, x, x, *others, [1, 300], [1, 3], [1, 1], False, False, *options)
    local_attention_2d.backward(x, lse, x, x, x, *others, x, lse, [1, 300], [1, 3], [1, 1], False, False, *options)
    places = torch.ones(one, device="meta").long(), None
    local_attention_2d.decode(key, key, key, *others, *places, [1, 1], [1, 1], [1, 1], True, False, *options)
    for kind in ("softmax", "layer_norm", "sandwich", "rms_norm", "rms_both"):
        call_rows(kind, dtype, one, one)
    pb_relax_softmax.forward(x, torch.empty(300, one, dtype=torch.bool, device="meta").expand_as(x), 1.0, False)


# --- the process that compiles ---------------------------------------------------------------------------------------


def build(target: Target, compilation: Compilation) -> Kernel:
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    from cogview_ops.triton import configs

    op, chip, dtype, _ = target
    assemble = CUDABackend.make_cubin

    def assemble_and_listen(self: Any, source: Any, metadata: dict[str, Any], *rest: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            binary = assemble(self, source, metadata, *rest)
        metadata["ptxas"] = log.getvalue()  # stays with the kernel in Triton's cache
        return binary

    knobs.nvidia.dump_ptxas_log = True
    with mock.patch.object(CUDABackend, "make_cubin", assemble_and_listen):
        binary = compilation.compile(chip)
    log, ptx = binary.metadata.ptxas, binary.asm["ptx"]
    usage = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*Used (\d+) registers",
        log,
        re.DOTALL,
    )
    assert usage, log
    constants = compilation.constants
    kinds = {"PIVOT": "grad_pivot_kernel", "DENSE": "grad_prefix_kernel"}
    name = next((kinds[kind] for kind in kinds if constants.get(kind)), compilation.kernel)
    name = "post_kernel" if constants.get("x", 1) is None else name  # of the two halves of a forward
    shape = constants["SHAPE"]._asdict() if "SHAPE" in constants else constants
    config = configs.Config(shape.get("M", 0), shape.get("N", 0), compilation.warps, compilation.stages)
    table = {"three_region": "", "three_region_packed": ""}.get(op, "local_" if op in LOCAL else None)
    row = None
    if table is not None and config.m and config.n:
        kernel = table + name.removesuffix("_kernel").replace("grad_prefix", "grad_key")
        row = (kernel, getattr(torch, dtype).itemsize)
        row = row if row in configs.ANY else None
    return Kernel(
        *target, name, f"{compilation.module.rpartition('.')[2]}.{compilation.kernel}",
        row is not None and row not in configs.CHIPS.get(chip, {}),
        config.m * config.n // (32 * config.warps), int(usage[4]), sum(map(int, usage.groups()[:3])),
        re.findall(r"\(C\d+\).*", log), binary.metadata.shared,
        {opcode: ptx.count(f"{opcode}.") for opcode in ("wgmma.mma_async", "mma.sync")},
        dict(Counter(re.findall(r"\b(?:ld|st)\.global\b[.\w]*", ptx))),
    )  # fmt: skip


def wanted(target: Target) -> list[tuple[Target, Compilation]]:
    """What a target launches, each once."""
    op, chip, dtype, size = target
    with caught(chip) as launches:
        calls(op)(op, getattr(torch, dtype), size)
    return [(target, x) for x in {launch.compilation.dump(): launch.compilation for launch in launches}.values()]


def main() -> None:
    import triton

    chosen = [tuple(x) for x in json.loads(sys.argv[1])] if len(sys.argv) > 1 else None
    jobs = [job for target in chosen or ALL for job in wanted(target)]
    with concurrent.futures.ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        rows = pool.map(build, *zip(*jobs, strict=True))
        if chosen:
            print(json.dumps([triton.__version__, *rows]))
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
