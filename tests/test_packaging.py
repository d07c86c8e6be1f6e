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
import torch
from common import show_packages

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


def environment(folder: Path, *packages: str) -> Path:
    """Python of a new virtual environment with some of the packages that are here."""
    venv.create(folder, symlinks=True)
    for package in packages:
        (site(folder) / package).symlink_to(HERE / package)
    return folder / "bin" / "python"


def site(folder: Path) -> Path:
    return folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


def ran(folder: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a shell's environment in which nothing says what is here."""
    ours = r"(PYTHON|COGVIEW|VIRTUAL_ENV|CONDA|MAKE).*|CC|CXX|UV|UV_INTERNAL.*"
    kept = {name: value for name, value in os.environ.items() if not re.fullmatch(ours, name)}
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


NEED = r"\ng\+\+ 11, .* is needed: apt install g\+\+, or CXX=/path/to/g\+\+ pip install \."


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
        monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
        with pytest.raises(SystemExit, match=f"^cogview-ops cannot be built: {sentence}$"):
            build_extension(monkeypatch)


def build_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the point where files would be compiled, and there it fails."""
    build = runpy.run_path(str(ROOT / "setup.py"))["Build"]
    monkeypatch.setattr(build.__base__, "run", mock.Mock(side_effect=RuntimeError("Error compiling objects")))
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
    assert set(named) == {
        "",
        "triton",
        "cogview",
        "dev",
        "int8",
        "demo",  # cogview.commands.page
        "docs",  # scripts/docs.py
        "browser",  # tests/integrations/test_page_browser.py
        "evaluation",  # cogview.evaluation.distances, on demand
        "hub",  # tests/test_hub.py
        "integrations",
        "wrappers",  # tests/operators/test_wrapped_modules.py
    }
    bench = {"matplotlib", "apex", "liger_kernel", "quack"}  # plots, and peers that are there
    assert imported("cogview_ops") == {"torch", "triton", "natten"} | named["integrations"] | bench
    assert imported("cogview") | {"tensorboard"} == named["cogview"] | named["int8"] | {
        "torch"
    }  # tensorboard is torch's to import


HIDE = """
import sys
from importlib.machinery import PathFinder
class Hide:
    def find_spec(name, *_):
        return None if name.partition(".")[0] in {hidden} else PathFinder.find_spec(name, *_)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
"""


def test_without_the_extra_operators_run_and_cogview_says_what_it_needs() -> None:
    extra = imported("cogview") - {"torch", "torchao"} | {"tensorboard"}
    code = HIDE.replace("{hidden}", repr(extra)) + "import torch, cogview_ops\n"
    code += "print(cogview_ops.pb_relax_softmax(torch.zeros(1, 4)).tolist())\nimport cogview.parts.transformer"
    failed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert failed.stdout == "[[0.25, 0.25, 0.25, 0.25]]\n"
    names = ", ".join(sorted(extra - {"tensorboard"}, key=str.lower))
    command = "`pip install '.[cogview]'` in the folder of its sources installs what is missing"
    assert failed.stderr.splitlines()[-1] == f"ImportError: cogview needs {names} on top of cogview_ops: {command}"


def test_misspelt_wish_for_all_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COGVIEW_TESTS", "al")
    with pytest.raises(pytest.UsageError, match="COGVIEW_TESTS: expected all or nothing, got 'al'"):
        conftest.pytest_configure()


# --- the ways --------------------------------------------------------------------------------------------------------

tries_all = pytest.mark.skipif(os.environ.get("COGVIEW_TESTS") != "all", reason="takes minutes: COGVIEW_TESTS=all")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with uv and build."""
    folder = tmp_path_factory.mktemp("tools") / "venv"
    venv.create(folder, symlinks=True, with_pip=True)
    got = ran(folder, "bin/python", "-m", "pip", "install", "--retries=1", "uv", "build")
    if got.returncode:
        pytest.skip(f"no package index can be reached: {got.stderr.strip().splitlines()[-1]}")
    return folder / "bin"


class Shell:
    """With an active environment that sees, if asked to, the torch that is here, and in a copy of the sources."""

    def __init__(self, folder: Path, sources: Path, tools: Path, *, torch: bool, compiler: str):
        self.bin, self.tools, self.variables = folder / "venv" / "bin", tools, {"CXX": compiler}
        self.sources = shutil.copytree(sources, folder / "sources")
        venv.create(folder / "venv", symlinks=True, with_pip=True)
        if torch:
            hidden = r"cogview|__editable__|pip|setuptools|_distutils|distutils|pkg_resources|ninja|wheel"
            show_packages(HERE, folder / "here", site(folder / "venv"), hidden)

    def __call__(self, command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.bin), str(self.tools), os.environ["PATH"]])
        active = {"PATH": path, "VIRTUAL_ENV": str(self.bin.parent), **self.variables}
        done = ran(
            folder or self.sources,
            "sh",
            "-c",
            command.replace("python -m build", f"{self.tools}/python -m build"),
            **active,
        )
        done.stdout += done.stderr
        return done

    def works(self, *commands: str) -> None:
        for command in commands:
            done = self(command)
            assert done.returncode == 0, f"{command}\n{done.stdout}"

    def fails(self, command: str, sentence: str, folder: Path | None = None) -> None:
        done = self(command, folder)
        assert done.returncode != 0
        said = " ".join(done.stdout.split())  # uv wraps lines
        assert said.count(f"cogview-ops cannot be built: {sentence}") == 1, done.stdout
        assert "Traceback" not in done.stdout
        assert len(done.stdout.splitlines()) < 50, done.stdout

    @property
    def installed(self) -> bool:
        return bool([*site(self.bin.parent).glob("cogview_ops/lib*.so"), *self.sources.glob("cogview_ops/lib*.so")])


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """A compiler of nothing."""
    nothing = 'for a; do shift; case "$a" in *.cpp) set -- "$@" -x c++ /dev/null;; *) set -- "$@" "$a";; esac; done'
    return compiler(tmp_path / "c++", nothing, 'exec c++ "$@"')


PREPARED = "pip install 'setuptools>=77' ninja"
WORKING = {
    "pip": ["pip install ."],
    "pip-not-isolated": [PREPARED, "pip install --no-build-isolation ."],
    "pip-editable": [PREPARED, "pip install --no-build-isolation -e ."],
    "pip-again-for-cuda": ["pip install .", "COGVIEW_OPS_CUDA=0 pip install ."],
    # uv does not count what a .pth file shows
    "uv": ["uv pip install 'setuptools>=77' ninja", "uv pip install --no-deps ."],
    "uv-not-isolated": [PREPARED, "uv pip install --no-deps --no-build-isolation ."],
    "sdist": ["python -m build --sdist", "pip install dist/*.tar.gz"],
}
NO_TOOLS = "{pip} install 'setuptools>=77' ninja, then {pip} install --no-build-isolation ."
FAILING = {
    "pip-no-torch": ("", "pip install .", "there is no torch in "),
    "pip-old-setuptools": ("pip install setuptools==65.5.0 wheel", "pip install --no-build-isolation .",
                           "setuptools is 65.5.0, 77 or newer is needed: " + NO_TOOLS.format(pip="pip")),
    "pip-no-setuptools": ("pip uninstall -y setuptools", "pip install --no-build-isolation .",
                          "there is no setuptools: " + NO_TOOLS.format(pip="pip")),
    "uv-no-setuptools": ("pip uninstall -y setuptools", "uv pip install --no-deps .",
                         "there is no setuptools: " + NO_TOOLS.format(pip="uv pip")),
    "uv-old-setuptools": ("pip install setuptools==65.5.0 wheel", "uv pip install --no-deps .",
                          "setuptools is 65.5.0, 77 or newer is needed: " + NO_TOOLS.format(pip="uv pip")),
    "uv-elsewhere": ("", "uv pip install --no-deps ./sources",
                     "it is isolated from your torch: " + NO_TOOLS.format(pip="uv pip")),
    "build": ("", "python -m build --wheel", ISOLATED.format(pip="pip", then="python -m build --no-isolation")),
    "pip-no-compiler": ("", "CXX=/nowhere/g++ pip install .", "/nowhere/g++: No such file or directory"),
    "pip-no-cuda": ("", "COGVIEW_OPS_CUDA=1 pip install .", "COGVIEW_OPS_CUDA=1, but "),
}  # fmt: skip


@tries_all
@pytest.mark.parametrize("way", WORKING)
def test_way_that_works(way: str, sources: Path, tools: Path, quick: str, tmp_path: Path) -> None:
    shell = Shell(tmp_path, sources, tools, torch=True, compiler=quick)
    assert not shell.installed
    shell.works(*WORKING[way])
    assert shell.installed


@tries_all
@pytest.mark.parametrize("way", FAILING)
def test_way_that_fails(way: str, sources: Path, tools: Path, quick: str, tmp_path: Path) -> None:
    if way == "pip-no-cuda" and torch.version.cuda:
        pytest.skip("this torch has CUDA")
    shell = Shell(tmp_path, sources, tools, torch=way != "pip-no-torch", compiler=quick)
    before, command, sentence = FAILING[way]
    if before:
        shell(before)
    shell.fails(command, sentence, folder=tmp_path if way == "uv-elsewhere" else None)
    assert not shell.installed
    if sentence.endswith(NO_TOOLS.format(pip="pip")):  # what it says works
        shell.works(*sentence.partition(": ")[2].split(", then "))
        assert shell.installed


@tries_all
def test_lines_of_the_readme(sources: Path, tools: Path, tmp_path: Path) -> None:
    """As they are printed, with a compiler that compiles."""
    block = re.findall(r"\n## Install\n\n((?:    .*\n)+)", (ROOT / "README.md").read_text())[0]
    shell = Shell(tmp_path, sources, tools, torch=True, compiler=os.environ.get("CXX", "c++"))
    shell.works(*block.splitlines())
    told = shell("python -P -m cogview_ops.info").stdout
    assert "in use, of baseline" in told
    assert "CUDA: " in told
