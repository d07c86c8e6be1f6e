"""The compiled library as a file: no Python in it; loaded alone, by C++ programs, and twice."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import python

from cogview_ops import _dispatch
from cogview_ops._manifest import KERNELS

ROOT = Path(__file__).parents[1]
EVERYTHING = os.environ.get("COGVIEW_TESTS") == "all"
pytestmark = pytest.mark.skipif(_dispatch._C is None, reason="the compiled library is missing")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no c++")
all_of_them = pytest.mark.skipif(not EVERYTHING, reason="compiles some minutes: COGVIEW_TESTS=all")


def said(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_it_needs_of_torch_its_stable_interface_alone_and_no_python() -> None:
    table = said("readelf", "--dyn-syms", "--wide", _dispatch._C.PATH)
    undefined = re.findall(r" UND (\w+)", table)
    assert "aoti_torch_library_def" in undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    # c10's and at's are mangled names, which other versions of torch need not have
    assert not [name for name in undefined if re.search(r"^_Z.*(3c10|2at[0-9NE]|5torch)", name)]
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", said("readelf", "--dynamic", _dispatch._C.PATH)))
    of_the_system = re.compile(r"lib(stdc\+\+|m|gcc_s|c|gomp|asan|ubsan|cudart)\.so.*|ld-linux.*")
    torchs = {name for name in needed if not of_the_system.fullmatch(name)}
    assert torchs <= {"libtorch_cpu.so", "libtorch_cuda.so", "libtorch.so"}


def test_loaded_alone_it_has_every_operator_with_its_schema() -> None:
    """For a package of AOTInductor, say; `import cogview_ops` after it finds them as they are."""
    code = f"""
import torch
torch.ops.load_library({str(_dispatch._C.PATH)!r})
x = torch.randn(3, 5)
torch.testing.assert_close(torch.ops.{_dispatch.COMPILED}.pb_relax_softmax_fwd(x, None, 1.0, False), x.softmax(-1))
print(*sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("{_dispatch.COMPILED}::")))
import cogview_ops
torch.testing.assert_close(cogview_ops.pb_relax_softmax(x, alpha=1.0), x.softmax(-1))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    registered = {f"{_dispatch.COMPILED}::{name}" for operator in KERNELS for name in operator.registered}
    assert set(done.stdout.split()) == registered


def test_loaded_by_a_program_before_it_is_the_same_library() -> None:
    """As where a C++ program has Python in it."""
    path = str(_dispatch._C.PATH)
    code = f"import ctypes, torch; ctypes.CDLL({path!r}); import cogview_ops; print(cogview_ops._dispatch.build_error)"
    assert python("-c", code).stdout == "None\n"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package in another folder, without a library."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    return shutil.copytree(Path(_dispatch._C.PATH).parent, tmp_path / "cogview_ops", ignore=ignored)


@pytest.mark.parametrize("size", [0, 40, 5000, -100], ids=["empty", "header", "a part", "the end missing"])
def test_half_a_library_is_none(size: int, copied: Path) -> None:
    whole = Path(_dispatch._C.PATH).read_bytes()
    (copied / "libcogview_ops.so").write_bytes(whole[:size])
    code = "import cogview_ops; print(cogview_ops._dispatch.build_error)"
    told = python("-P", "-c", code, PYTHONPATH=str(copied.parent))
    assert told.returncode == 0, told.stderr
    assert re.search("is not whole: install it again|file too short", told.stdout)


@needs_compiler
def test_another_library_or_a_renamed_one_is_none(copied: Path) -> None:
    (copied / "other.cpp").write_text("int nothing() { return 0; }")
    subprocess.run(["c++", "-shared", "-fPIC", copied / "other.cpp", "-o", copied / "libother.so"], check=True)
    code = "import cogview_ops; print(cogview_ops._dispatch.build_error)"
    told = python("-P", "-c", code, PYTHONPATH=str(copied.parent)).stdout
    assert "libother.so is not the library of this version: " in told
    shutil.copy(_dispatch._C.PATH, copied / "libother.so")
    told = python("-P", "-c", code, PYTHONPATH=str(copied.parent)).stdout
    assert f"libother.so was built with COGVIEW_OPS_NAMESPACE={_dispatch.COMPILED} and has been renamed" in told


def test_two_copies_with_one_namespace_are_refused(tmp_path: Path) -> None:
    copy = shutil.copytree(
        Path(_dispatch._C.PATH).parent, tmp_path / "another", ignore=shutil.ignore_patterns("__pycache__")
    )
    done = python("-c", "import cogview_ops, another", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert f"{copy / _dispatch._C.PATH.name}: another library has operators of the namespace" in done.stderr
    assert "COGVIEW_OPS_NAMESPACE" in done.stderr.splitlines()[-1]


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogview_ops import _registration

    with pytest.raises(RuntimeError, match=r"not of this Python code: .*pb_relax_softmax_fwd.*; build it again"):
        _registration.define("pb_relax_softmax_fwd", "(Tensor scores) -> Tensor", lambda scores: scores)


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    def find(cuda: str | None, *files: str) -> tuple[str, str]:
        """Namespace and name of the library that a torch of this CUDA would load of these."""
        for name in files:
            (tmp_path / name).touch()
        monkeypatch.setattr(torch.version, "cuda", cuda)
        namespace, path = _dispatch._C._find(tmp_path)
        return namespace, path.name

    return find


@pytest.mark.parametrize(
    ("cuda", "files", "loaded"),
    [
        (None, ["libcogview_ops.so"], ("cogview_ops", "libcogview_ops.so")),
        (None, ["libcogview_ops.so", "libcogview_ops_cu13.so"], ("cogview_ops", "libcogview_ops.so")),
        ("13.0", ["libcogview_ops.so", "libcogview_ops_cu13.so"], ("cogview_ops", "libcogview_ops_cu13.so")),
        ("13.0", ["libcogview_ops.so"], ("cogview_ops", "libcogview_ops.so")),
        ("12.8", ["libother_cu12.so", "libother_cu13.so"], ("other", "libother_cu12.so")),
    ],
)
def test_which_library_is_loaded(cuda: str | None, files: list[str], loaded: tuple[str, str], found) -> None:
    assert found(cuda, *files) == loaded


@pytest.mark.parametrize(
    ("cuda", "files", "error"),
    [
        (None, ["libcogview_ops_cu13.so"], "torch {torch} has no CUDA, there is libcogview_ops_cu13.so"),
        ("12.8", ["libcogview_ops_cu13.so"], "torch {torch} has CUDA 12, there is libcogview_ops_cu13.so"),
        (None, ["liba.so", "libb.so"], "several libraries in {folder}, keep one: liba.so, libb.so"),
        (None, [], "there is no lib*.so in {folder}"),
    ],
)
def test_why_none_is_loaded(cuda: str | None, files: list[str], error: str, found, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=f"^{re.escape(error.format(torch=torch.__version__, folder=tmp_path))}$"):
        found(cuda, *files)


# --- what compiles ---------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Something of every kernel that can be in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
        import cogview_ops as ops

        h, y = ops.sandwich_rms_norm(x, x, self.weight, self.weight)
        q = y.unflatten(-1, (2, 16)).transpose(1, 2)
        a = ops.three_region_attention(q, q, q, pivots, block_size=4, window_blocks=2)
        b = ops.local_attention_2d(a, q, q, grid=(4, 4), kernel_size=(3, 3))
        p = ops.pb_relax_softmax(b @ b.mT, alpha=8.0, causal=True)
        return ops.layer_norm((p @ b).transpose(1, 2).flatten(2) + h, self.weight, self.weight)


@all_of_them
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no CMake or no compiler")
def test_a_program_without_python_runs_a_package_of_aot_inductor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, inputs = Layer().eval(), (torch.randn(2, 16, 32), torch.tensor([[0, 5, -1], [1, 2, 9]], dtype=torch.int32))
    with torch.no_grad():
        exported = torch.export.export(layer, inputs)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
        expected = layer(*inputs)
    torch.save(list(inputs), tmp_path / "inputs.pt")
    source, build = ROOT / "tests" / "cpp_program", tmp_path / "build"
    said("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    said("cmake", "--build", build, "--parallel")
    outputs = tmp_path / "outputs.pt"
    program = [build / "run_package", _dispatch._C.PATH, package, tmp_path / "inputs.pt", outputs]
    assert "libpython" not in said("ldd", build / "run_package")
    said(*program)
    got = torch.load(outputs, weights_only=True)
    torch.testing.assert_close(got, expected)
    without = subprocess.run(
        [*map(str, program[:1]), "/nowhere.so", *map(str, program[2:])], capture_output=True, text=True
    )
    assert without.returncode == 1
    assert "/nowhere.so: cannot open shared object file" in without.stderr


@all_of_them
def test_two_builds_with_namespaces_of_their_own_live_in_one_process(tmp_path: Path) -> None:
    """Another version of the package beside this one, under another name: neither sees the other's kernels."""
    sources = shutil.copytree(ROOT, tmp_path / "sources", ignore=shutil.ignore_patterns(".*", "build", "runs", "*.so"))
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
    asked = {**os.environ, "COGVIEW_OPS_NAMESPACE": "other_ops", "COGVIEW_OPS_CUDA": "0"}
    subprocess.run(build, cwd=sources, env=asked, capture_output=True, check=True)
    (tmp_path / "lib" / "cogview_ops").rename(tmp_path / "lib" / "other")
    code = """
import torch, cogview_ops, other
x = torch.randn(3, 5, requires_grad=True)
a, b = (package.pb_relax_softmax(x, alpha=2.0) for package in (cogview_ops, other))
assert torch.equal(a, b)
assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (a, b)))
cogview_ops._dispatch._C.force_cpu("baseline")
print(cogview_ops._dispatch._C.active_cpu(), other._dispatch._C.active_cpu(), other._dispatch._C.supported_cpu()[-1])
print(torch.compile(other.pb_relax_softmax, fullgraph=True)(x).grad_fn is not None, other._dispatch.COMPILED)
"""
    done = python("-c", code, PYTHONPATH=str(tmp_path / "lib"))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    ours, theirs, best = first.split()
    assert (ours, theirs) == ("baseline", best)
    assert second == "True other_ops"
