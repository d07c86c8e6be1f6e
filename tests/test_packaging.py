"""Every way to install ends in the package, or in one sentence that names the command that does.

The sentences are tried here as pip, uv and build call the hooks. COGVIEW_TESTS=all tries the ways themselves, with a
package index: the environments see this one's torch, and all but one compile nothing, to be done in minutes.
"""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path
from unittest import mock

import conftest
import pytest
import setuptools

ROOT = Path(__file__).parents[1]
HERE = Path(sysconfig.get_paths()["purelib"])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUPTOOLS = ("setuptools", "_distutils_hack", *(path.name for path in HERE.glob("setuptools-*.dist-info")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since builds write into it."""
    folder = tmp_path_factory.mktemp("cogview") / "sources"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.so", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def environment(folder: Path, *packages: str, torch: bool = False) -> Path:
    """Python of a new virtual environment with some of the packages that are here, or all of them."""
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for package in packages:
        (site / package).symlink_to(HERE / package)
    if torch:
        (site / "here.pth").write_text(f"{HERE}\n")
    return folder / "bin" / "python"


def ran(folder: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a shell's environment in which nothing says what is here."""
    ours = ("PYTHON", "COGVIEW", "VIRTUAL_ENV", "CONDA", "CC", "CXX", "UV", "MAKE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [*map(str, command)], cwd=folder, env={**kept, **variables}, capture_output=True, text=True, timeout=1200
    )


def hook(python: Path, sources: Path, name: str, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a front end calls, without the front end."""
    code = f"import sys; sys.path.insert(0, 'scripts'); import build_backend; build_backend.{name}({str(out)!r})"
    return ran(sources, python, "-c", code, **variables)


# --- the sentences ---------------------------------------------------------------------------------------------------


def test_a_source_distribution_needs_no_torch(sources: Path, tmp_path: Path) -> None:
    """And has all that there is."""
    files = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    made = hook(environment(tmp_path / "venv", *SETUPTOOLS), sources, "build_sdist", tmp_path)
    assert made.returncode == 0, made.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {path for path in files if not re.search(r"\.egg-info|__pycache__", path)} <= inside


NO_TORCH = "there is no torch in {prefix}: pip install 'torch>=2.11', then pip install ."
ISOLATED = "it is isolated from your torch: {pip} install 'setuptools>=77' ninja, then {then}"


@pytest.mark.parametrize(
    ("where", "variables", "sentence"),
    [
        ("venv", {}, NO_TORCH),
        ("venv", {"UV": "/bin/uv"}, NO_TORCH.replace("pip", "uv pip")),
        (
            "builds-v0/.tmpX",
            {"UV": "/bin/uv"},
            ISOLATED.format(pip="uv pip", then="uv pip install --no-build-isolation ."),
        ),
        ("build-env-x", {}, ISOLATED.format(pip="pip", then="python -m build --no-isolation")),
    ],
    ids=["pip", "uv", "uv-isolated", "build"],
)
def test_without_torch(where: str, variables: dict[str, str], sentence: str, sources: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / where, *SETUPTOOLS)
    for name in ("prepare_metadata_for_build_wheel", "build_wheel"):
        failed = hook(python, sources, name, tmp_path, **variables)
        said = sentence.format(prefix=tmp_path / where)
        assert (failed.returncode, failed.stderr) == (1, f"cogview-ops cannot be built: {said}\n")


@pytest.mark.parametrize(
    ("package", "source", "sentence"),
    [
        (None, "", "there is no setuptools: {tools}"),
        ("setuptools", "__version__ = '65.5.0'", "setuptools is 65.5.0, 77 or newer is needed: {tools}"),
        ("torch", "__version__ = '2.6.0+cu124'", "torch is 2.6.0+cu124: pip install 'torch>=2.11', then pip install ."),
        (
            "torch",
            "raise OSError('libcudart.so.12: cannot open')",
            "your torch cannot be imported (libcudart.so.12: cannot open): pip install --force-reinstall 'torch>=2.11'",
        ),
    ],
    ids=["no-setuptools", "old-setuptools", "old-torch", "broken-torch"],
)
def test_packages_to_build_with(package: str | None, source: str, sentence: str, sources: Path, tmp_path: Path) -> None:
    tools = "pip install 'setuptools>=77' ninja, then pip install --no-build-isolation ."
    python = environment(tmp_path / "venv", *(SETUPTOOLS if package == "torch" else ()))
    if package:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(source)
    code = "" if package else "sys.path.insert(0, 'scripts'); import build_backend;"
    code = f"import sys; {code} import runpy; sys.argv = ['setup.py', 'bdist_wheel']; runpy.run_path('setup.py')"
    failed = ran(sources, python, "-c", code, PYTHONPATH=str(tmp_path))
    assert failed.stderr == f"cogview-ops cannot be built: {sentence.format(tools=tools)}\n"


def compiler(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


NEED = r"\ng\+\+ 11, .* are needed: apt install g\+\+ python3-dev, or CXX=/path/to/g\+\+ pip install \."


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (None, r"/\S+/c\+\+: No such file or directory" + NEED),
        (["echo c++: error: unrecognized option -mamx-bf16 >&2", "exit 1"], r"c\+\+: error: .* -mamx-bf16" + NEED),
        (["exit 0"], r"Error compiling objects\nThe first 'error:' above says why; .* MAX_JOBS=1 pip install \."),
    ],
    ids=["none", "old", "killed"],
)
def test_compiler(lines: list[str] | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cxx = compiler(tmp_path / "c++", *lines) if lines else str(tmp_path / "c++")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    with mock.patch.dict(os.environ, {"CXX": cxx, "COGVIEW_OPS_CUDA": "0", "UV": ""}):
        build = runpy.run_path(str(ROOT / "setup.py"))["Build"]
        monkeypatch.setattr(build.__base__, "run", mock.Mock(side_effect=RuntimeError("Error compiling objects")))
        with pytest.raises(SystemExit, match=f"^cogview-ops cannot be built: {sentence}$"):
            build(setuptools.Distribution()).run()


# --- what is installed -----------------------------------------------------------------------------------------------


def imported(*folders: str) -> set[str]:
    trees = [ast.parse(path.read_text()) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"cogview", "cogview_ops"}


MODULES = {"pillow": "PIL"}


def test_base_needs_torch_alone_and_every_extra_is_used() -> None:
    named = {
        extra: {MODULES.get(name, name) for name in (re.split(r"[\[>=;]", line)[0] for line in lines)}
        for extra, lines in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
    }
    assert named[""] == {"torch"}
    assert set(named) == {"", "triton", "cogview", "dev"}
    assert imported("cogview_ops") == {"torch", "triton"}
    assert imported("cogview") | {"tensorboard"} == named["cogview"] | {"torch"}  # tensorboard is torch's to import


HIDE = """
import sys
from importlib.machinery import PathFinder
class Hide:
    def find_spec(name, *_):
        return None if name.partition(".")[0] in {hidden} else PathFinder.find_spec(name, *_)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
"""


def test_without_the_extra_operators_run_and_cogview_says_what_it_needs() -> None:
    extra = imported("cogview") - {"torch"} | {"tensorboard"}
    code = HIDE.replace("{hidden}", repr(extra)) + "import torch, cogview_ops\n"
    code += "print(cogview_ops.pb_relax_softmax(torch.zeros(1, 4)).tolist())\nimport cogview.model"
    failed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert failed.stdout == "[[0.25, 0.25, 0.25, 0.25]]\n"
    names = ", ".join(sorted(extra - {"tensorboard"}, key=str.lower))
    command = "`pip install '.[cogview]'` in the folder of its sources installs what is missing"
    assert failed.stderr.splitlines()[-1] == f"ImportError: cogview needs {names} on top of cogview_ops: {command}"


def test_misspelt_wish_for_all_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGVIEW_TESTS", "al")
    with pytest.raises(pytest.UsageError, match="COGVIEW_TESTS: expected all or nothing, got 'al'"):
        conftest.pytest_configure()
