"""Who may import whom: patterns <- reference, triton <- operators <- modules <- cogview <- benchmarks, tests.

And where who adds an operator has to put it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cogview_ops
from cogview_ops._manifest import OPERATORS

ROOT = Path(__file__).parents[1]


def files(*made_of: str) -> list[str]:
    """The files of the operators that are made of this, by their stems."""
    chosen = (getattr(cogview_ops, x.name).__module__ for x in OPERATORS.values() if x.made_of in made_of)
    return sorted({module.rpartition(".")[2] for module in chosen})


BASIC, COMPOSITIONS = files("kernels", "torch"), files("operators")
OPERATOR = {
    "_checks",
    "_cuda_limits",
    "_dispatch",
    "_local_options",
    "_namespaces",
    "_norm_operators",
    "_norms",
    "_registration",
    "_remembered",
    "_sharding",
    "_three_region_operators",
    "patterns",
    "reference",
}
# what each module of cogview_ops may import from the package
ALLOWED: dict[str, set[str]] = {
    "patterns": set(),
    "pairs": {"patterns"},
    "_local_options": set(),
    "_checks": {"_local_options"},
    "_C": set(),
    "_namespaces": {"_C"},
    "_sharding": {"_namespaces"},
    "_cuda_limits": set(),
    "_measured": set(),
    "_dispatch": {"triton", "_checks", "_manifest", "_measured", "_namespaces", "_sharding"},  # triton on demand
    "_remembered": set(),
    "_flops": {"_local_options", "pairs"},
    "_registration": {"_dispatch", "_flops", "_namespaces"},
    "_three_region_operators": {"_dispatch", "_registration", "_sharding"},
    "reference": {"patterns", "_local_options"},
    "_manifest": set(),
    "_environment": set(),
    "_norm_operators": {"_dispatch", "_namespaces", "_registration", "_sharding"},
    "_norms": {"_checks", "_dispatch", "_namespaces", "_registration", "_remembered", "_sharding", "reference"},
    **dict.fromkeys(BASIC, OPERATOR),
    **{op: {*BASIC, "_checks", "_registration", "reference", "patterns"} for op in COMPOSITIONS},
    "kv_cache": {"_checks", "_registration"},
    "attention_modules": {*BASIC, "kv_cache", "", "_checks", "_registration"},
    "modules": {*BASIC, "_checks", "kv_cache", "attention_modules"},
    "layers": {*BASIC, "_checks"},
    "checkpointing": {"_manifest", "_namespaces"},
    "_selftest": {"_dispatch", "_manifest"},
    "_report": {"__version__", "_dispatch", "_environment", "_manifest", "_selftest"},
    "info": {"__version__", "_dispatch", "_manifest", "_report"},
    "__init__": {
        *BASIC,
        *COMPOSITIONS,
        "_sharding",
        "modules",
        "pairs",
        "patterns",
        "reference",
        "checkpointing",
        "info",
        "layers",
        "triton",
    },  # the last four on demand
}
# of other people's models; nothing imports them
PUBLIC = set(cogview_ops.__all__)
INTEGRATIONS = {*PUBLIC, "_checks", "_dispatch", "_registration", "integrations"}
# of benchmarks, which users have as well; nothing in the package imports them
BENCH = {*PUBLIC, "__version__", "bench", "_dispatch", "_manifest", "_report", "modules", "patterns"}
TRITON = {
    "patterns",
    "_checks",
    "_dispatch",
    "_local_options",
    "_namespaces",
    "_norm_operators",
    "_registration",
    "_three_region_operators",
    *BASIC,
}  # never the reference


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
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


def own(names: set[str]) -> set[str]:
    """First name below cogview_ops; "" for the package itself."""
    parts = [name.split(".") for name in names]
    return {p[1] if len(p) > 1 else "" for p in parts if p[0] == "cogview_ops"}


@pytest.mark.parametrize("path", modules("cogview_ops"), ids=lambda p: str(p.relative_to(ROOT)))
def test_inside_cogview_ops(path: Path) -> None:
    relative = path.relative_to(ROOT / "cogview_ops")
    folders = {"triton": {*TRITON, "triton"}, "integrations": INTEGRATIONS, "bench": BENCH}
    allowed = folders[relative.parts[0]] if len(relative.parts) > 1 else ALLOWED[relative.stem]
    assert own(imports(path)) <= allowed, f"{relative} may import {sorted(allowed)} only"


@pytest.mark.parametrize("package", ["cogview_ops", "cogview", "benchmarks"])
def test_between_packages(package: str) -> None:
    order = ["cogview_ops", "cogview", "benchmarks", "tests"]
    above = set(order[order.index(package) + 1 :])
    for path in modules(package):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & above, f"{path.relative_to(ROOT)} imports {sorted(used & above)}"
        if package == "cogview_ops":
            assert not used & {"triton"} or path.parent.name == "triton", f"{path.name} imports triton eagerly"


def layers_of_cogview() -> list[set[str]]:
    """CONTRIBUTING's picture: the modules and folders of each line, top line first."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("each line imports from the lines below it only:\n\n")[2]
    lines = text.partition("\n\n")[0].splitlines()
    names = [line.split()[:1] + re.findall(r"· ([a-z]+/?)", line) for line in lines]
    return [{name.rstrip("/") for name in found} for found in names]


def test_cogview_is_what_its_picture_says() -> None:
    layers = layers_of_cogview()
    assert len(layers) > 5
    here = {path.relative_to(ROOT / "cogview").parts[0].removesuffix(".py") for path in modules("cogview")}
    assert set().union(*layers) == here - {"__init__"}
    level = {name: i for i, names in enumerate(layers) for name in names}
    for path in modules("cogview"):
        own = path.relative_to(ROOT / "cogview").parts[0].removesuffix(".py")
        for parts in (name.split(".") for name in imports(path)):
            if own != "__init__" and parts[0] == "cogview" and parts[1] != own:
                assert level[own] < level[parts[1]], f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"


def test_cogview_imports_absolutely() -> None:
    for path in modules("cogview"):
        relative = [node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "level", 0)]
        assert not relative, f"{path.relative_to(ROOT)}, line {relative[0].lineno}"


def test_cogview_ops_imports_relatively() -> None:
    """On the Hub of kernels it has another name (scripts/hub.py). matplotlib is loaded for plots alone."""
    for path in modules("cogview_ops"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [x.name for x in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            used = {name.split(".")[0] for name in names}
            assert "cogview_ops" not in used, f"{path.name}, line {node.lineno}"
            assert "matplotlib" not in used or path.stem in ("figures", "plot_style", "roofs"), path.name
    code = "import sys, cogview_ops.bench.__main__; print([m for m in ('matplotlib', 'triton') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", modules("cogview/recipes"), ids=lambda p: p.stem)
def test_recipes_know_no_shards_no_loop_and_no_command_line(path: Path) -> None:
    known = {name.split(".")[1] for name in imports(path) if name.startswith("cogview.")}
    assert known <= {"config", "sequence", "bilingual", "lopar", "loss", "parts", "recipes"}


@pytest.mark.parametrize("name", ["loop", "task", "optimizer", "schedule", "checkpoint", "log", "interrupts"])
def test_the_loop_knows_no_model(name: str) -> None:
    known = {
        ".".join(name.split(".")[1:3])
        for name in imports(ROOT / "cogview" / "train" / f"{name}.py")
        if "cogview." in name
    }
    assert not [used for used in known if used.startswith(("recipes", "parts", "sequence", "loss", "tokenizers"))]


def test_the_stack_knows_no_tokens() -> None:
    known = {name for name in imports(ROOT / "cogview" / "parts" / "stack.py") if name.startswith("cogview.")}
    assert known == {
        "cogview.config.ModelConfig",
        "cogview.config.Recompute",
        "cogview.parts.attend.Attention",
        "cogview.parts.attend.chosen",
        "cogview.sequence.Context",
        "cogview.parts.linear.Linear",
    }


def test_cogview_uses_public_names_only() -> None:
    public = {*cogview_ops.__all__, "__version__", "modules", "info", "checkpointing", "pairs", "patterns"}
    for path in [*modules("cogview"), *(ROOT / "benchmarks").rglob("*.py")]:
        used = own(imports(path)) - {""}
        inner = {"_dispatch", "_registration", "bench", "patterns", "reference", "triton"}
        extra = inner if "benchmarks" in path.parts else set()
        assert used <= public | extra, f"{path.relative_to(ROOT)} imports {sorted(used - public)}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cogview_ops":
                assert not node.attr.startswith("_") or node.attr == "__version__", f"{path.name}: {node.attr}"


def test_kernels_know_nothing_of_torch() -> None:
    for folder in ("cpu", "cuda"):
        banned = ("torch", "ATen", "c10", "pybind11", "Python.h", "bindings")
        for path, line in includes(f"csrc/{folder}"):
            assert not any(b in line for b in banned), f"{path.name}: {line}"


def test_bindings_use_the_stable_abi() -> None:
    lines = [x for x in includes("csrc/bindings") if any(b in x[1] for b in ("torch/", "ATen", "c10"))]
    assert lines
    for path, line in lines:
        assert "torch/csrc/stable/" in line or "torch/headeronly/" in line, f"{path.name}: {line}"


def includes(folder: str) -> list[tuple[Path, str]]:
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    found = [(path, line) for path in paths for line in path.read_text().splitlines() if line.startswith("#include")]
    assert found, folder
    return found


@pytest.mark.parametrize("stem", sorted({*files("kernels")} - {"sandwich_rms_norm"}))
def test_one_stem_per_operator(stem: str) -> None:
    """The same file stem names an operator everywhere; the kernels of both kinds of norm are of one source."""
    triton = [("cogview_ops/triton", f"{stem}.py")] if stem not in OPERATORS or OPERATORS[stem].triton else []
    for folder, file in (
        *triton,
        ("cogview_ops", f"{stem}.py"),
        ("csrc/cpu", f"{stem}.cpp"),
        ("csrc/bindings", f"{stem}.cpp"),
        ("tests/operators", f"test_{stem}.py"),
    ):
        assert (ROOT / folder / file).exists(), f"{folder}/{file}"


def test_public_names_are_those_of_the_manifest() -> None:
    assert list(OPERATORS) == cogview_ops.__all__ == sorted(OPERATORS)


def test_tests_of_operators_have_a_folder() -> None:
    """tests/operators is what runs under sanitizers, on GPUs and on the oldest torch, which have no more than this."""
    names = {f"cogview_ops.{name}" for name in OPERATORS}
    tested: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        used = imports(path)
        more = {name.split(".")[0] for name in used} & {"cogview", "benchmarks"}
        if path.parent.name == "operators":
            tested |= used
            assert not more, f"{path.name} is of more than operators: {sorted(more)}"
        elif used & names:
            assert more, f"{path.name} belongs into tests/operators"
    assert names <= tested


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("triton", "matplotlib", "PIL", "rich", "cogview", "cogview_ops.integrations", "cogview_ops.bench")
    code = f"import sys, cogview_ops; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
