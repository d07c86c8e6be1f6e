"""The environment variables that this code base reads, of which the documentation makes its table. tests/test_docs.py
says which one is missing here, or is read no more."""

from typing import NamedTuple


class Variable(NamedTuple):
    name: str
    values: str
    what: str


VARIABLES: dict[str, tuple[Variable, ...]] = {  # by when they are read
    "When operators run": (
        Variable(
            "COGVIEW_OPS_CPU",
            "`baseline`, `avx2`, `avx512`, `avx512bf16`, `amx`",
            "Use this instruction set, not the best there is; `python -m cogview_ops.info` lists a processor's.",
        ),
        Variable(
            "COGVIEW_OPS_CHECK",
            "`1`",
            "Check the values of pivots and lengths on GPU tensors too, which waits for the device.",
        ),
        Variable(
            "COGVIEW_OPS_STRIPS",
            "`forward=2,8,3`",
            "How local attention in CUDA C++ cuts images; set by `python -m benchmarks.sweep`, which tries them.",
        ),
    ),
    "When the package is built": (
        Variable(
            "COGVIEW_OPS_CUDA",
            "`auto`, `0`, `1`",
            "The CUDA part: where torch has CUDA and its toolkit works (the default), never, or fail without.",
        ),
        Variable(
            "COGVIEW_OPS_NAMESPACE",
            "`cogview_ops`",
            "Where torch has the operators. Builds with others, under other names, can be in one process.",
        ),
        Variable("COGVIEW_OPS_SANITIZE", "`address,undefined`", "Build with these sanitizers, as `make asan` does."),
        Variable("TORCH_CUDA_ARCH_LIST", "`8.0+PTX;9.0a`", "GPU architectures; torch's own. This is the default."),
        Variable("MAX_JOBS", "a number", "Compilers at once; torch's own."),
        Variable("CUDA_HOME", "a folder", "The CUDA toolkit, if it is not where torch or `nvcc` of `PATH` is."),
        Variable("CUDA_PATH", "a folder", "The same, where there is no `CUDA_HOME`."),
        Variable("PYTORCH_NVCC", "a command", "In place of the toolkit's `nvcc`; torch's own."),
        Variable("CC", "a command", "The host compiler that `nvcc` calls."),
        Variable("CXX", "a command", "The C++ compiler, by default `c++`; the tests' too."),
        Variable("UV", "set by uv", "What to install is then said in uv's words."),
    ),
    "When `cogview` runs": (
        Variable("OMP_WAIT_POLICY", "`passive`, `active`", "How threads wait. Set, `cogview` leaves it as it is."),
        Variable("GOMP_SPINCOUNT", "a number", "How long they spin; `cogview` sets 2000 where neither is set."),
        Variable("WORLD_SIZE", "set by torchrun", "Number of processes."),
        Variable("RANK", "set by torchrun", "Number of this one."),
        Variable("LOCAL_RANK", "set by torchrun", "Its number on this machine, and that of its GPU."),
        Variable("LOCAL_WORLD_SIZE", "set by torchrun", "Number of processes on this machine."),
        Variable("TORCHELASTIC_RESTART_COUNT", "set by torchrun", "How often it has started them anew."),
        Variable("XDG_CACHE_HOME", "a folder", "Where indices of tar shards are kept, by default `~/.cache`."),
        Variable("GRADIO_TEMP_DIR", "set by `cogview page`", "Where gradio keeps what is uploaded."),
    ),
    "In tests and benchmarks": (
        Variable("COGVIEW_TESTS", "`all`", "Run what takes minutes too; `make test-all` sets it."),
        Variable("CUDA_EMULATOR_SEED", "a number", "Another schedule of the emulated CUDA kernels; 1 by default."),
        Variable("TRITON_INTERPRET", "`1`", "Triton kernels run on CPU tensors; the tests set it without a GPU."),
        Variable("TRITON_CACHE_DIR", "a folder", "Where Triton keeps what it has compiled."),
        Variable("TRITON_DEFAULT_FP_FUSION", "`1`", "Products fused into sums; `python -m benchmarks.sass` sets it."),
        Variable("COGVIEW_OPS_COMMIT", "a commit", "Of the code that is timed, where there is no checkout."),
    ),
}
