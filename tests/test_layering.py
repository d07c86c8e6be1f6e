"""Who may import whom: patterns <- reference, triton <- operators <- modules <- cogview <- benchmarks, tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cogview_ops

ROOT = Path(__file__).parents[1]
OPERATORS = (
    "pb_relax_softmax",
    "sandwich_layer_norm",
    "three_region_attention",
    "local_attention_2d",
    "merge_attentions",
    "sample_pivots",
)
COMPOSITIONS = ("dalle_attention", "cogview2_attention", "pb_relax_attention")
# what each module of cogview_ops may import from the package
ALLOWED: dict[str, set[str]] = {
    "patterns": set(),
    "_local_options": set(),
    "_checks": {"_local_options"},
    "_dispatch": {"_C", "triton"},  # the latter on demand
    "_registration": {"_dispatch"},
    "reference": {"patterns", "_local_options"},
    **{op: {"_checks", "_dispatch", "_registration", "reference", "_local_options"} for op in OPERATORS},
    **{op: {*OPERATORS, "_checks", "_registration", "reference", "patterns"} for op in COMPOSITIONS},
    "kv_cache": {"_checks"},
    "attention_modules": {*OPERATORS, "kv_cache", "", "_checks"},
    "modules": {*OPERATORS, "kv_cache", "attention_modules"},
    "info": {"", "_dispatch"},
    "__init__": {*OPERATORS, *COMPOSITIONS, "modules"},
}
TRITON = {"patterns", "_checks", "_dispatch", "_local_options", "_registration", *OPERATORS}  # never the reference


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports: `from .a import b` in package p is p.a.b."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def own(names: set[str]) -> set[str]:
    """First name below cogview_ops; "" for the package itself."""
    parts = [name.split(".") for name in names]
    return {p[1] if len(p) > 1 else "" for p in parts if p[0] == "cogview_ops"}


@pytest.mark.parametrize("path", modules("cogview_ops"), ids=lambda p: str(p.relative_to(ROOT)))
def test_inside_cogview_ops(path: Path) -> None:
    relative = path.relative_to(ROOT / "cogview_ops")
    allowed = {*TRITON, "triton"} if relative.parts[0] == "triton" else ALLOWED[relative.stem]
    assert own(imports(path)) <= allowed, f"{relative} may import {sorted(allowed)} only"


@pytest.mark.parametrize("package", ["cogview_ops", "cogview", "benchmarks", "tests"])
def test_between_packages(package: str) -> None:
    order = ["cogview_ops", "cogview", "benchmarks", "tests"]
    above = set(order[order.index(package) + 1 :])
    for path in modules(package):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & above, f"{path.relative_to(ROOT)} imports {sorted(used & above)}"
        if package == "cogview_ops":
            assert not used & {"triton"} or path.parent.name == "triton", f"{path.name} imports triton eagerly"


def test_cogview_uses_public_names_only() -> None:
    public = {*cogview_ops.__all__, "__version__", "modules", "info"}
    for path in [*modules("cogview"), *(ROOT / "benchmarks").rglob("*.py")]:
        used = own(imports(path)) - {""}
        extra = {"_dispatch", "patterns", "reference"} if "benchmarks" in path.parts else set()
        assert used <= public | extra, f"{path.relative_to(ROOT)} imports {sorted(used - public)}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cogview_ops":
                assert not node.attr.startswith("_") or node.attr == "__version__", f"{path.name}: {node.attr}"


def test_kernels_know_nothing_of_torch() -> None:
    for folder in ("cpu", "cuda"):
        for path in (ROOT / "csrc" / folder).glob("*"):
            for line in path.read_text().splitlines():
                banned = ("torch", "ATen", "c10", "pybind11", "Python.h", "bindings")
                assert not (line.startswith("#include") and any(b in line for b in banned)), f"{path.name}: {line}"


def test_bindings_use_the_stable_abi() -> None:
    for path in (ROOT / "csrc" / "bindings").glob("*"):
        for line in path.read_text().splitlines():
            if line.startswith("#include") and any(b in line for b in ("torch/", "ATen", "c10")):
                assert "torch/csrc/stable/" in line or "torch/headeronly/" in line, f"{path.name}: {line}"


def test_one_stem_per_operator() -> None:
    """The same file stem names an operator everywhere."""
    for op in ("pb_relax_softmax", "sandwich_layer_norm", "three_region_attention", "local_attention_2d"):
        for file in (f"cogview_ops/{op}.py", f"csrc/cpu/{op}.cpp", f"csrc/bindings/{op}.cpp", f"tests/test_{op}.py"):
            assert (ROOT / file).exists(), file


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("triton", "matplotlib", "PIL", "rich", "cogview")
    code = f"import sys, cogview_ops; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
