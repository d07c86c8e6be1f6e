"""Shared libraries of C++ that tests need, kept under build/ until a source, a flag or the compiler changes."""

import fcntl
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

COMPILER = os.environ.get("CXX", "g++").split()


class Object(NamedTuple):
    source: Path
    flags: list[str]
    others: tuple[Path, ...] = ()  # what it includes beside what its includes in quotes name


def reached(files: list[Path]) -> list[Path]:
    """The files and what they include of ours, in order."""
    seen: set[Path] = set()
    todo = list(files)
    while todo:
        path = todo.pop().resolve()
        if path not in seen:
            seen.add(path)
            todo += [path.parent / name for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)]
    return sorted(seen)


def run(*command: str) -> None:
    done = subprocess.run([*COMPILER, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def version() -> str:
    return subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def compiled(x: Object, folder: Path) -> Path:
    """The object file: in the folder, or beside a changed copy in it that it is compiled from, as its source or one of
    the others, so that no object of a copy is where the product's are."""
    texts = [path.read_bytes() for path in reached([x.source, *x.others])]
    state = repr([version(), torch.__version__, x, texts])
    folder = next((path.parent for path in (x.source, *x.others) if folder in path.parents), folder)
    target = folder / f"{x.source.stem}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            run(*x.flags, "-c", str(x.source), "-o", f"{unfinished}/x.o")
            for old in set(folder.glob(f"{x.source.stem}-*.o")) - {target}:
                old.unlink(missing_ok=True)
            Path(f"{unfinished}/x.o").rename(target)
    return target


def build(folder: Path, name: str, objects: list[Object], link: list[str] | None = None) -> Path:
    """The shared library of some objects. A failing compiler is an AssertionError with its words."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one builds, the others find it built
        files = [str(path) for path in pool.map(compiled, objects, [folder] * len(objects))]
        library = folder / f"{name}-{hashlib.sha256(repr([files, link]).encode()).hexdigest()[:16]}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                run("-shared", "-Wl,-z,defs", "-o", f"{unfinished}/x.so", *files, *(link or []))
                for old in set(folder.glob(f"{name}-*.so")) - {library}:
                    old.unlink(missing_ok=True)
                Path(f"{unfinished}/x.so").rename(library)
    return library
