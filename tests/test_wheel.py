"""The wheel in clean environments, each with another torch, on every Python that is here: installed, tried, removed.

`make wheel` makes it; `make test-all` makes the environments, which are only looked at: new ones see their torch.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import show_packages

import cogview_ops

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.environ.get("COGVIEW_TESTS") != "all", reason="takes minutes: COGVIEW_TESTS=all")
MAKEFILE = (ROOT / "Makefile").read_text()
OTHERS = re.findall(r"^(?:OLDEST|NEWER) := (.*?)(?:  #.*)?$", MAKEFILE, re.M)
WITH = {"here": Path(sys.executable), **{x: ROOT / x / "bin/python" for line in OTHERS for x in line.split()}}
# of the operators' tests those that hang on torch's own interfaces
TESTS = ("test_operators", "test_calls", "test_compile", "test_transforms", "test_sharding", "test_checkpointing")
HIDDEN = r"cogview|__editable__|pip|distutils-precedence"


def ran(folder: Path, *command: str | Path) -> str:
    """What it printed, in a folder that is none of the sources."""
    ours = {name: x for name, x in os.environ.items() if not re.match("PYTHON|COGVIEW|VIRTUAL_ENV", name)}
    done = subprocess.run([*map(str, command)], cwd=folder, env=ours, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=WITH)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new environment that sees the torch of another one, and has the wheel."""
    other = WITH[request.param]
    if not other.exists():
        pytest.skip(f"there is no {other.parents[1]}: make test-all")
    folder = tmp_path_factory.mktemp("clean")
    base = ran(folder, other, "-c", "import sys; print(sys._base_executable)").strip()
    ran(folder, base, "-m", "venv", folder / "venv")
    new = folder / "venv" / "bin" / "python"
    sites = [Path(ran(folder, x, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
             for x in (other, new)]  # fmt: skip
    show_packages(sites[0], folder / "seen", sites[1], HIDDEN)
    install(new, folder, for_cuda=False)
    return new


def install(python: Path, folder: Path, for_cuda: bool) -> None:
    wheels = list((ROOT / "dist").glob(f"{'cu*/' * for_cuda}cogview_ops-{cogview_ops.__version__}*-py3-none-*.whl"))
    if for_cuda and not wheels:
        pytest.skip("there is no wheel for CUDA: make wheel-cuda")
    assert len(wheels) == 1, "make wheel"
    ran(folder, python, "-m", "pip", "-q", "install", "--no-index", "--no-deps", "--force-reinstall", wheels[0])


def test_operators_are_right(python: Path, tmp_path: Path) -> None:
    """As the report finds them, and by the tests."""
    report = ran(tmp_path, python, "-m", "cogview_ops.info", "--report")
    assert "All right: outputs and gradients are the formula's" in report
    where = ran(tmp_path, python, "-c", "import cogview_ops; print(cogview_ops._dispatch._C.PATH)")
    assert str(python.parents[1]) in where
    tests = [ROOT / "tests" / "operators" / f"{name}.py" for name in TESTS]
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "-q", "-n", "2", "-k", "not triton and not cuda"]
    told = ran(tmp_path, python, "-P", "-m", "pytest", *options, *tests)
    assert int(re.findall(r"(\d+) passed", told)[0]) > 1000


def test_it_is_of_these_sources(python: Path, tmp_path: Path) -> None:
    where = Path(ran(tmp_path, python, "-c", "import cogview_ops; print(cogview_ops.__path__[0])").strip()).parent
    for path in [*ROOT.glob("cogview/**/*.py"), *ROOT.glob("cogview_ops/**/*.py")]:
        assert (where / path.relative_to(ROOT)).read_text() == path.read_text(), "make wheel"


def test_commands_run_or_say_what_is_missing(python: Path, tmp_path: Path) -> None:
    timed = ran(tmp_path, python, "-m", "cogview_ops.bench", "layer_norm", "--shape", "64x64", "--seconds", "0.1")
    assert "F.layer_norm" in timed
    told = subprocess.run([python.parent / "cogview", "info"], cwd=tmp_path, capture_output=True, text=True)
    assert "cogview-4b" in told.stdout or "cogview needs" in told.stderr


def test_wheel_for_cuda_loads_or_says_why_not(python: Path, tmp_path: Path) -> None:
    install(python, tmp_path, for_cuda=True)
    told = ran(tmp_path, python, "-m", "cogview_ops.info").splitlines()[1]
    cuda = ran(tmp_path, python, "-c", "import torch; print(torch.version.cuda)").strip()
    assert told.startswith("extension: g++" if cuda.startswith("13.") else "extension: missing (torch ")
    assert "there is libcogview_ops_cu13.so" in told or cuda.startswith("13.")


def test_nothing_stays_when_it_is_removed(python: Path, tmp_path: Path) -> None:
    site = Path(ran(tmp_path, python, "-c", "import cogview_ops; print(cogview_ops.__path__[0])").strip()).parent
    ran(tmp_path, python, "-m", "pip", "-q", "uninstall", "-y", "cogview-ops")
    assert not list(site.glob("cogview*"))
