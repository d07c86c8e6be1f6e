"""`python scripts/make_wheel.py`: the wheel and the source distribution into dist/, for the torch that this Python has.

The library serves every Python, and this torch and later ones. The wheel is for manylinux_2_28 wherever it is built:
the sources avoid what newer systems have (csrc/bindings/library.cpp), and auditwheel, which refuses anything else, puts
the tag on it. With a CUDA part (COGVIEW_OPS_CUDA, setup.py) its version ends with +cu130, as torch's.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PLATFORM = "manylinux_2_28"
MEGABYTES = {"": 12, "+cu": 40}  # compressed, at most
# what a wheel may hold: the packages as they are in the sources, one library, who made it
ALLOWED = (
    r"(cogview|cogview_ops)/.*\.(py|pyi|typed)|cogview/(assets|human)/[^/]+|cogview_ops/lib\w+\.so|[^/]+\.dist-info/.+"
)


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


def check(wheel: Path) -> str:
    """One line about a wheel that holds what it should; else the program ends."""
    size = wheel.stat().st_size
    with zipfile.ZipFile(wheel) as archive:
        files = [file for file in archive.infolist() if not file.is_dir()]
    names, unpacked = [file.filename for file in files], sum(file.file_size for file in files)
    strange = [name for name in names if not re.fullmatch(ALLOWED, name)]
    sources = {str(path.relative_to(ROOT)) for p in ("cogview", "cogview_ops") for path in (ROOT / p).rglob("*.py")}
    missing, libraries = sources - set(names), [name for name in names if name.endswith(".so")]
    limit = next(megabytes for kind, megabytes in reversed(MEGABYTES.items()) if kind in wheel.name) * 10**6
    if strange or missing or len(libraries) != 1 or size > limit:
        found = f"strange {strange}, missing {sorted(missing)}, libraries {libraries}, {size} of {limit} bytes"
        sys.exit(f"{wheel.name}: {found}")
    return f"{wheel.name}: {size / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB installed, {len(names)} files"


def make(work: Path) -> None:
    """In a new folder: a module that is gone would be packed from what was built before."""
    setup = [sys.executable, "setup.py", "-q"]
    build = ["build", "--build-base", str(work), "--build-lib", str(work / "lib")]
    ran(*setup, *build)
    version = label(work / "lib")
    if not version:
        ran(*setup, "sdist", "--dist-dir", str(DIST))
    (work / "label.cfg").write_text(f"[egg_info]\ntag_build = {version}\n")
    wheel = ["bdist_wheel", "--skip-build", "--dist-dir", str(work)]
    ran(*setup, *build, *wheel, DIST_EXTRA_CONFIG=str(work / "label.cfg"))  # setuptools' own
    [built] = work.glob("*.whl")
    libraries = [word for name in ("libtorch*.so", "libc10*.so", "libcudart.so.*") for word in ("--exclude", name)]
    platform = ["--plat", f"{PLATFORM}_{os.uname().machine}", "--only-plat"]
    repair = [sys.executable, "-m", "auditwheel", "repair", *platform, "--strip", *libraries]
    ran(*repair, "--wheel-dir", str(work / "tagged"), str(built))
    [tagged] = (work / "tagged").glob("*.whl")
    print(f"dist/{check(tagged)}")
    shutil.move(tagged, DIST / tagged.name)


if __name__ == "__main__":
    DIST.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        make(Path(work))
