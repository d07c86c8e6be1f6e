"""`python scripts/hub.py`: cogview_ops for the Hub of kernels, into build/hub, out of the sources that are here.

build/hub is a source repository of kernel-builder (build.toml, flake.nix, torch-ext), and build/hub/build has the
variant of this machine, built by setup.py: what `kernels.get_local_kernel("build/hub")` loads. Its operators have a
namespace of their own, which ends with a hash of all sources; so it can be beside an installed cogview_ops.

kernel-builder gives flags to a file, not to a use of it, and carries only files that build.toml names. So kernels of
the CPU are there once for each instruction set, and sections name their headers. They are those of the machine that
runs this: build.toml cannot tell processors apart.
"""

import base64
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "hub"
NAME, MODULE = "cogview-ops", "cogview_ops"
VERSION = 0  # of the Hub's: what may still change is 0
LEFT_OUT = "integrations", "bench"  # they import what is neither torch nor ours
PUBLIC = ["layers", "modules", "pairs", "patterns", "reference"]  # beside the operators
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FOR_OLD_KERNELS = '''\
"""For a `kernels` that looks for the package in a folder of its name: it is the folder above."""

import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
__all__ = sys.modules["{id}"].__all__
globals().update({{name: getattr(sys.modules["{id}"], name) for name in __all__}})
'''


def described() -> dict[str, Any]:
    """What setup.py defines and finds here; nothing is built."""
    with mock.patch("setuptools.setup") as setup, mock.patch("sys.argv", ["setup.py"]):
        found = runpy.run_path(str(ROOT / "setup.py"))
    has_cuda = re.search(r"_cu\d+$", setup.call_args.kwargs["ext_modules"][0].name)
    return found | {"cuda": found["torch"].version.cuda if has_cuda else ""}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_package(folder: Path) -> None:
    """The Python part: imports in it are relative (tests/test_layering.py)."""
    for path in sorted((ROOT / MODULE).rglob("*.py")):
        relative = path.relative_to(ROOT / MODULE)
        if relative.parts[0] not in LEFT_OUT:
            write(folder / relative, path.read_text())
    with (folder / "__init__.py").open("a") as file:
        file.write(f"\nfrom . import layers as layers  # noqa: E402\n\n__all__ += {json.dumps(PUBLIC)}\n")


def sections(setup: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """build.toml but for [general]. Sections of the backend cpu are not part of cuda's library: kernels are in both."""
    sources, archs = setup["sources"], setup["CUDA_ARCHS"]
    headers = [*sources("csrc", "*.h"), *sources("csrc/cpu", "*.h"), *sources("csrc/bindings", "*.h")]
    bindings = [s for s in sources("csrc/bindings", "*.cpp") if not s.endswith("_cuda.cpp")]
    once = {"cxx-flags": [*setup["CXX_FLAGS"], "--include=facts.h"], "include": ["torch-ext"]}
    ours = [f"torch-ext/{name}" for name in ("torch_binding.cpp", "facts.h", "schemas.inc")]
    found: dict[str, dict[str, Any]] = {
        "torch": {"src": [*ours, *bindings, *setup["ONCE"], *headers], **once},
        "torch.stable-abi": dict.fromkeys(("cpu", "cuda"), ".".join(map(str, stable_abi()))),
    }
    for isa, flags in setup["instruction_sets"]().items():
        copies = [f"csrc/{isa}/{Path(s).name}" for s in kernels(setup)]
        flags = [*setup["CXX_FLAGS"], "-fno-exceptions", f"-DCOGVIEW_ISA={isa}", *flags]
        part = {"depends": ["torch"], "src": [*copies, *headers], "include": ["csrc/cpu"], "cxx-flags": flags}
        found |= {f"kernel.{backend}_{isa}": {"backend": backend, **part} for backend in ("cpu", "cuda")}
    cuda = {"backend": "cuda", "depends": ["torch"], "cuda-capabilities": archs.split(";")}
    device = [*sources("csrc/cuda", "**/*.cu"), *sources("csrc/cuda", "**/*.h"), *sources("csrc/cuda", "**/*.cuh")]
    nvcc = ["-O3", *(["-DCOGVIEW_SM_90A"] if "9.0a" in archs else [])]
    found["kernel.cuda"] = {**cuda, "src": [*device, *headers], "cuda-flags": nvcc}
    found["kernel.cuda_bindings"] = {
        **cuda,
        "src": [*sources("csrc/bindings", "*_cuda.cpp"), *sources("csrc/cuda", "*.h"), *headers],
        **once,
    }
    return found


def kernels(setup: dict[str, Any]) -> list[str]:
    return [s for s in setup["sources"]("csrc/cpu", "*.cpp") if s not in setup["ONCE"]]


def stable_abi() -> tuple[int, int]:
    """Version of torch's stable ABI that the bindings are for."""
    [number] = re.findall(r"define TORCH_TARGET_VERSION (0x\w+?)ULL", (ROOT / "csrc/bindings/common.h").read_text())
    return int(number, 16) >> 56, int(number, 16) >> 48 & 255


def write_sources(setup: dict[str, Any]) -> None:
    """The source repository."""
    shutil.copytree(ROOT / "scripts/hub_files", OUT, dirs_exist_ok=True)
    shutil.copytree(ROOT / "csrc", OUT / "csrc")
    shutil.copy(ROOT / "LICENSE", OUT)
    facts = OUT / "torch-ext/facts.h"
    write(facts, facts.read_text().replace("ARCHITECTURES", setup["CUDA_ARCHS"]))
    for source in kernels(setup):
        for isa in setup["instruction_sets"]():
            write(OUT / "csrc" / isa / Path(source).name, (OUT / source).read_text())
        (OUT / source).unlink()
    write_package(OUT / "torch-ext" / MODULE)
    setup["write_schemas"](OUT / "torch-ext")
    general = {"name": NAME, "version": VERSION, "edition": 5, "license": PROJECT["license"]}
    general |= {"backends": ["cpu", "cuda"], "upstream": PROJECT["urls"]["Repository"]}
    tables = {"general": general, **sections(setup)}
    lines = [[f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())] for name, table in tables.items()]
    write(OUT / "build.toml", "\n".join("\n".join(table) + "\n" for table in lines))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def build_variant(id: str, cuda: str) -> Path:
    """The variant of this machine, compiled by setup.py with id as the operators' namespace, for this CUDA or ""."""
    variables = os.environ | {"COGVIEW_OPS_NAMESPACE": id, "COGVIEW_OPS_CUDA": "1" if cuda else "0"}
    with tempfile.TemporaryDirectory() as lib:
        command = [sys.executable, "setup.py", "-q", "build", "--build-base", lib, "--build-lib", lib]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        [library] = Path(lib, MODULE).glob("lib*.so")
        backend = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
        system = f"{platform.machine()}-{platform.system().lower()}"
        variant = OUT / "build" / f"torch-stable-abi{''.join(map(str, stable_abi()))}-{backend}-{system}"
        shutil.copytree(OUT / "torch-ext" / MODULE, variant)
        shutil.copy(library, variant)
    write(variant / MODULE / "__init__.py", FOR_OLD_KERNELS.format(id=id))
    kind: dict[str, Any] = {"type": "cpu"}
    if cuda:
        kind = {"type": "cuda", "archs": re.split("[; ]+", os.environ["TORCH_CUDA_ARCH_LIST"])}  # setup.py has set it
    hashes = {path: hashlib.sha256(path.read_bytes()).digest() for path in files(variant)}
    metadata = {
        "name": NAME,
        "id": id,
        "version": VERSION,
        "license": PROJECT["license"],
        "upstream": PROJECT["urls"]["Repository"],
        "python-depends": [],
        "backend": kind,
        "digest": {
            "algorithm": "sha256",
            "files": {str(path.relative_to(variant)): base64.b64encode(x).decode() for path, x in hashes.items()},
        },
    }
    write(variant / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    setup = described()
    write_sources(setup)
    contents = hashlib.sha1()
    for path in files(OUT):
        contents.update(f"{path.relative_to(OUT)}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    print(f"build/hub: {len(files(OUT))} sources for kernel-builder")
    id = f"_{MODULE}_{'cuda' if setup['cuda'] else 'cpu'}_{contents.hexdigest()[:10]}"
    variant = build_variant(id, setup["cuda"])
    size = sum(path.stat().st_size for path in files(variant)) / 1e6
    print(f"{variant.relative_to(ROOT)}: {len(files(variant))} files, {size:.1f} MB")


if __name__ == "__main__":
    main()
