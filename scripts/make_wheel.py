"""`python scripts/make_wheel.py`: wheel and source distribution into dist/; with a CUDA part a wheel into dist/cu130/.

The library serves every Python, and this torch and later ones. The wheel is for manylinux_2_28 wherever it is built:
the sources avoid what newer systems have (csrc/bindings/library.cpp), and auditwheel, which refuses anything else, puts
the tag on it. With a CUDA part (COGVIEW_OPS_CUDA, setup.py) its version ends with +cu130, as torch's.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PLATFORM = "manylinux_2_28"
MEGABYTES = {"sdist": 20, "": 12, "+cu": 40}  # compressed, at most


def ran(*command: str, **variables: str) -> None:
    """What it says is shown where it fails."""
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, **told)
    if done.returncode:
        sys.exit(done.stdout)


def label(built: Path) -> str:
    """Of the version: "+cu130" where there is a CUDA part, else ""."""
    if not list(built.glob("cogview_ops/lib*_cu*.so")):
        return ""
    asked = [sys.executable, "-c", "import torch; print(torch.version.cuda)"]
    return "+cu" + subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().replace(".", "")


def sources() -> set[str]:
    """What a wheel has beside the library and its own description: the packages as they are here."""
    found = {path.relative_to(ROOT) for name in ("cogview", "cogview_ops") for path in (ROOT / name).rglob("*")}
    return {str(x) for x in found if (ROOT / x).is_file() and x.suffix != ".so" and "__pycache__" not in x.parts}


def check_wheel(wheel: Path, kind: str) -> str:
    """One line about a wheel that holds what it should; else the program ends."""
    with zipfile.ZipFile(wheel) as archive:
        files = {file.filename: file.file_size for file in archive.infolist() if not file.is_dir()}
    modules = {name for name in files if not re.match(r"cogview_ops/lib\w+\.so$|[^/]+\.dist-info/", name)}
    libraries = [name for name in files if name.endswith(".so")]
    if len(libraries) != 1 or modules != sources():
        sys.exit(f"{wheel.name}: libraries {libraries}, other files than the sources: {sorted(modules ^ sources())}")
    return f"{size(wheel, kind)}, {sum(files.values()) / 1e6:.1f} MB installed, {len(files)} files"


def check_sdist(path: Path) -> str:
    """The same of the source distribution, which has tests, site and results too."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = sources() | {"setup.py", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "mkdocs.yml"}
    if not needed <= names or any(name.endswith(".so") for name in names):
        sys.exit(f"{path.name}: lacks {sorted(needed - names)}, or has what was built")
    return f"{size(path, 'sdist')}, {len(names)} files and folders"


def size(path: Path, kind: str) -> str:
    bytes = path.stat().st_size
    if bytes > MEGABYTES[kind] * 10**6:
        sys.exit(f"{path.name}: {bytes / 1e6:.1f} MB, expected {MEGABYTES[kind]} at most")
    return f"{path.name}: {bytes / 1e6:.1f} MB"


def make(work: Path) -> None:
    """In a new folder: a module that is gone would be packed from what was built before."""
    setup = [sys.executable, "setup.py", "-q"]
    build = ["build", "--build-base", str(work), "--build-lib", str(work / "lib")]
    ran(*setup, *build)
    version = label(work / "lib")
    if not version:
        ran(*setup, "sdist", "--dist-dir", str(work))
        [sdist] = work.glob("*.tar.gz")
        print(f"dist/{check_sdist(sdist)}")
        shutil.move(sdist, DIST / sdist.name)
    (work / "label.cfg").write_text(f"[egg_info]\ntag_build = {version}\n")
    wheel = ["bdist_wheel", "--skip-build", "--dist-dir", str(work)]
    ran(*setup, *build, *wheel, DIST_EXTRA_CONFIG=str(work / "label.cfg"))  # setuptools' own
    [built] = work.glob("*.whl")
    libraries = [word for name in ("libtorch*.so", "libc10*.so", "libcudart.so.*") for word in ("--exclude", name)]
    platform = ["--plat", f"{PLATFORM}_{os.uname().machine}", "--only-plat"]
    repair = [sys.executable, "-m", "auditwheel", "repair", *platform, "--strip", *libraries]
    ran(*repair, "--wheel-dir", str(work / "tagged"), str(built))
    [tagged] = (work / "tagged").glob("*.whl")
    folder = DIST / version.removeprefix("+")  # pip takes one of those for CPUs and for CUDA, not both
    print(f"{folder.relative_to(ROOT)}/{check_wheel(tagged, '+cu' if version else '')}")
    folder.mkdir(exist_ok=True)
    shutil.move(tagged, folder / tagged.name)


if __name__ == "__main__":
    DIST.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        make(Path(work))
