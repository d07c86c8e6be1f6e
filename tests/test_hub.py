"""What scripts/hub.py makes for the Hub of kernels: kernel-builder's source repository is complete, and under
COGVIEW_TESTS=all compiles as kernel-builder would do it, the built variant loads by `kernels`, and so do its layers.

kernel-builder itself runs in Nix; what is checked here is what it reads: its own parser of build.toml is in `kernels`.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from common import python
from snippets import snippets
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
EVERYTHING = os.environ.get("COGVIEW_TESTS") == "all"
all_of_them = pytest.mark.skipif(not EVERYTHING, reason="compiles some minutes, and needs kernels: COGVIEW_TESTS=all")


def hub(code: str) -> None:
    done = python("-c", f"import sys; from pathlib import Path; sys.path.insert(0, 'scripts'); import hub; {code}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub(f"hub.OUT = Path({str(folder)!r}); hub.write_sources(hub.described())")
    return folder


def parts(sources: Path, backend: str) -> list[dict[str, Any]]:
    """[torch] and the sections that are compiled for a backend."""
    read = tomllib.loads((sources / "build.toml").read_text())
    return [read["torch"], *(x for x in read["kernel"].values() if x["backend"] == backend)]


# --- the sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_build_toml_names_all_that_is_read(sources: Path, backend: str) -> None:
    """kernel-builder sees no other files, and compiles each file that it sees with the flags of one section."""
    compiled: list[str] = []
    for part in parts(sources, backend):
        listed = {os.path.normpath(name) for name in part["src"]}
        assert all((sources / name).is_file() for name in listed)
        compiled += [name for name in part["src"] if name.endswith((".cpp", ".cu"))]
        for name in listed:
            folders = [Path(name).parent, *part.get("include", [])]
            for included in re.findall(r'^#include "(.*?)"', (sources / name).read_text(), re.M):
                found = {os.path.normpath(Path(folder, included)) for folder in folders}
                assert found & listed or included == "registration.h", f"{name} includes {included}"
    assert len(compiled) == len(set(compiled))
    there = {str(path.relative_to(sources)) for kind in ("*.cpp", "*.cu") for path in sources.rglob(kind)}
    others = {name for name in there if name.endswith((".cu", "_cuda.cpp"))} if backend == "cpu" else set()
    assert set(compiled) == there - others


def test_kernels_are_there_for_every_instruction_set(sources: Path) -> None:
    names = {"x86_64": ["baseline", "avx2", "avx512", "avx512bf16", "amx"]}.get(os.uname().machine, ["baseline"])
    kernels = {path.name for path in (ROOT / "csrc/cpu").glob("*.cpp")} - {"isa.cpp"}
    for name in names:
        there = {path.name for path in (sources / "csrc" / name).iterdir()}
        assert there == {kernel for kernel in kernels if not kernel.endswith("_plan.cpp")}
        [part] = [part for part in parts(sources, "cpu") if f"-DCOGVIEW_ISA={name}" in part["cxx-flags"]]
        assert any(flag.startswith("-m") for flag in part["cxx-flags"]) == (name != "baseline")


def test_the_package_has_its_layers_and_nothing_that_imports_others(sources: Path) -> None:
    package = sources / "torch-ext" / "cogview_ops"
    assert not (package / "integrations").exists()
    assert not (package / "bench").exists()
    outside = set(sys.stdlib_module_names) | {"torch"}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            allowed = outside | ({"triton"} if path.parent.name == "triton" else set())
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_its_loader_takes_both_names_of_a_library(sources: Path, tmp_path: Path) -> None:
    text = (sources / "torch-ext/cogview_ops/_C.py").read_text()
    names: dict[str, Any] = {}
    exec(text[: text.index("def _load")], names)
    for name, namespace in {"lib_ours_1a.so": "_ours_1a", "_theirs_2b.abi3.so": "_theirs_2b"}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        assert names["_find"](folder) == (namespace, folder / name)


# --- what is built ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> Path:
    """build/hub, as `make hub` leaves it."""
    pytest.importorskip("kernels")
    hub("hub.main()")
    return ROOT / "build" / "hub"


def ran(code: str) -> None:
    done = python("-c", code, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


RUN = """
from importlib import util
from pathlib import Path
import torch
import cogview_ops
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

def check(repo, variant):
    # what is loaded of a folder gives what the installed package gives
    ops = get_local_kernel(Path(repo))
    assert ops is not cogview_ops and ops._dispatch._C.PATH.is_relative_to(variant)
    assert ops.__name__ == ops._namespaces.COMPILED == Metadata.read_from_file(variant + "/metadata.json").id
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 96, 32, requires_grad=True) for _ in range(3))
    pivots = torch.arange(8)[None]
    x, w = torch.randn(5, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    for inputs, call in (
        ((q, k, v), lambda m, **o: m.three_region_attention(q, k, v, pivots, block_size=16, window_blocks=2, **o)),
        ((x, w), lambda m, **o: m.rms_norm(x, w, **o)),
    ):
        outs = call(ops, impl="cpp"), call(cogview_ops, impl="cpp"), call(cogview_ops, impl="reference")
        grads = [torch.autograd.grad(y.square().sum(), inputs) for y in outs]
        assert torch.equal(outs[0], outs[1])
        for mine, yours in zip([outs[0], *grads[0]], [outs[2], *grads[2]]):
            torch.testing.assert_close(mine, yours, atol=1e-4, rtol=1e-4)
    return ops
"""


@all_of_them
def test_the_variant_loads_beside_the_installed_package(built: Path) -> None:
    [variant] = map(str, (built / "build").iterdir())
    ran(f"""{RUN}
ops = check({str(built)!r}, {variant!r})
assert not [name for name in ops.__all__ if not hasattr(ops, name)] and "layers" in ops.__all__
Build.open({str(built)!r})
said = Metadata.read_from_file({variant!r} + "/metadata.json").digest
said.validate(Digest.hash_variant(DigestAlgorithm.SHA256, {variant!r}))
spec = util.spec_from_file_location("old", {variant!r} + "/cogview_ops/__init__.py")
old = util.module_from_spec(spec)
spec.loader.exec_module(old)
assert old.__all__ == ops.__all__ and old.rms_norm is ops.rms_norm
""")


@all_of_them
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_library_runs_on_old_systems(built: Path) -> None:
    """manylinux_2_28, as the Hub asks."""
    [library] = (built / "build").glob("*/lib*.so")
    table = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True, check=True
    ).stdout
    for name, highest in {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}.items():
        versions = {tuple(map(int, x.split("."))) for x in re.findall(rf"@{name}_([\d.]+)", table)}
        assert max(versions, default=(0,)) <= highest, name


@all_of_them
def test_layers_take_the_place_of_a_models(built: Path) -> None:
    ran(f"""
from pathlib import Path
import torch
from torch import nn
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

@use_kernel_forward_from_hub("RMSNorm")
class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(dim)), 1e-5
    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)

LayerNorm = use_kernel_forward_from_hub("LayerNorm")(type("LayerNorm", (nn.LayerNorm,), {{}}))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), RMSNorm(32), nn.Linear(32, 32), LayerNorm(32))
x = torch.randn(5, 16)
def results(f):
    y = f(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]
expected = results(model)
repo = Path({str(built)!r})
names = {{"RMSNorm": "LlamaRMSNorm", "LayerNorm": "LayerNorm"}}
mapping = {{name: {{"cpu": LocalLayerRepository(repo, layer_name=layer)}} for name, layer in names.items()}}
with use_kernel_mapping(mapping, inherit_mapping=False):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
assert [model[i].forward.__func__.__module__.startswith("_cogview_ops_cpu_") for i in (1, 3)] == [True, True]
for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
    for mine, yours in zip(results(run), expected):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-4)
""")


@all_of_them
@pytest.mark.parametrize("family", ["Llama", "Gemma", "Olmo2"])
def test_layers_in_models_of_transformers(built: Path, family: str) -> None:
    """Their norms get a name by hand: transformers gives them one where it finds the `kernels` that it wants."""
    pytest.importorskip("transformers")
    ran(f"""
from pathlib import Path
import torch
import transformers
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = transformers.{family}Config(**sizes, head_dim=16, vocab_size=97)
model = transformers.{family}ForCausalLM(config)
norms = [module for module in model.modules() if type(module).__name__ == "{family}RMSNorm"]
assert len(norms) > 4
for norm in norms:
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
tokens = torch.randint(0, 97, (2, 9))
def results():
    model.zero_grad()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return [out.logits, *(p.grad.clone() for p in model.parameters())]
expected = results()
replace_kernel_forward_from_hub(type(norms[0]), "RMSNorm")
mapping = {{"RMSNorm": {{"cpu": LocalLayerRepository(Path({str(built)!r}), layer_name="{family}RMSNorm")}}}}
with use_kernel_mapping(mapping, inherit_mapping=False):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
assert all(norm.forward.__func__.__module__.startswith("_cogview_ops_cpu_") for norm in norms)
for mine, yours in zip(results(), expected):
    torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-4)
""")


@all_of_them
def test_the_page_says_how_to_load_it(built: Path) -> None:
    ran("\n".join(snippet.code for snippet in snippets(ROOT / "docs/integrations/hub.md", "py")))


# --- as kernel-builder does it ---------------------------------------------------------------------------------------

REGISTRATION = """
#include <Python.h>
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define REGISTER_EXTENSION(name)                                                            \\
  PyMODINIT_FUNC JOIN(PyInit_, name)() {                                                    \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, TEXT(name), nullptr, 0, nullptr};   \\
    return PyModule_Create(&module);                                                        \\
  }
"""


@all_of_them
def test_the_sources_compile_with_the_flags_that_build_toml_gives(sources: Path, built: Path, tmp_path: Path) -> None:
    """The files that it names, and what kernel-builder adds: its definitions, and a header that makes a module."""
    id = "_cogview_ops_cpu_as_kernel_builder"
    for name in {name for part in parts(sources, "cpu") for name in part["src"]}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources / name, tmp_path / name)
    (tmp_path / "torch-ext/registration.h").write_text(REGISTRATION)
    folders = [*cpp_extension.include_paths("cpu"), sysconfig.get_paths()["include"]]
    defined = [f"-DTORCH_EXTENSION_NAME={id}", "-DTORCH_TARGET_VERSION=0x20b000000000000", "-DCPU_KERNEL"]
    compiler = [os.environ.get("CXX", "c++"), "-std=gnu++20", "-fPIC", *defined, *(f"-I{x}" for x in folders)]
    jobs = []
    for part in parts(sources, "cpu"):
        own = [*(f"-I{folder}" for folder in part["include"]), *part["cxx-flags"]]
        for name in (name for name in part["src"] if name.endswith(".cpp")):
            jobs.append([*compiler, *own, "-c", name, "-o", f"{name}.o"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda job: subprocess.run(job, cwd=tmp_path, capture_output=True, text=True), jobs):
            assert done.returncode == 0, done.stderr
            assert "redefined" not in done.stderr
    [variant] = (built / "build").iterdir()
    package = tmp_path / "build" / variant.name
    shutil.copytree(sources / "torch-ext/cogview_ops", package)
    metadata = {**json.loads((variant / "metadata.json").read_text()), "id": id, "digest": None}
    (package / "metadata.json").write_text(json.dumps(metadata))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths("cpu")] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    link = [compiler[0], "-shared", *(job[-1] for job in jobs), "-o", str(package / f"{id}.abi3.so"), *libraries]
    assert subprocess.run(link, cwd=tmp_path).returncode == 0
    ran(f"""{RUN}
ops = check({str(tmp_path)!r}, {str(package)!r})
assert ops.__name__ == {id!r}
assert ops._dispatch._C.torch_version() == {torch.__version__.partition("+")[0]!r}
""")
