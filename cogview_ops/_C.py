"""The compiled library beside this file: loads it, by which its operators are registered, and says what it is.

It has no Python in it, and C++ programs load the same file. Its name tells the operators' namespace and, where it has a
CUDA part, the CUDA that torch must have: lib<namespace>.so or lib<namespace>_cu13.so. kernel-builder's name for one is
<namespace>.abi3.so.
"""

import ctypes
import os
import re
import struct
from pathlib import Path

import torch


def _find(folder: Path) -> tuple[str, Path]:
    """Namespace and path of the library for this torch; with a CUDA part if there are both."""
    major = (torch.version.cuda or "").partition(".")[0]
    name = re.compile(r"(?:lib)?(\w+?)(?:_cu(\d+))?(?:\.abi3)?\.so")
    named = [(name.fullmatch(path.name), path) for path in folder.glob("*.so")]
    found = [(match[1], match[2], path) for match, path in named if match]
    here = [x for x in found if x[1] and x[1] == major] or [x for x in found if x[1] is None]
    if len(here) > 1:
        raise ImportError(f"several libraries in {folder}, keep one: {', '.join(sorted(x[2].name for x in here))}")
    if not here and found:
        names = ", ".join(sorted(x[2].name for x in found))
        raise ImportError(f"torch {torch.__version__} has {f'CUDA {major}' if major else 'no CUDA'}, there is {names}")
    if not here:
        raise ImportError(f"there is no lib*.so in {folder}")
    [(namespace, _, path)] = here
    return namespace, path


def _is_whole(path: Path) -> bool:
    """Whether the file reaches as far as its header says: loading half a file would end the process."""
    with open(path, "rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return True  # not for us to tell
    (sections,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return path.stat().st_size >= sections + size * count


def _is_loaded(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _load() -> ctypes.CDLL:
    if not _is_whole(PATH):
        raise ImportError(f"{PATH} is not whole: install it again")
    taken = any(name.startswith(f"{NAMESPACE}::") for name in torch._C._dispatch_get_all_op_names())
    if taken and not _is_loaded(PATH):
        again = "another build of one of them, with COGVIEW_OPS_NAMESPACE, has operators of its own"
        raise RuntimeError(f"{PATH}: another library has operators of the namespace {NAMESPACE}; {again}")
    try:
        torch.ops.load_library(PATH)
        library = ctypes.CDLL(str(PATH))
        for name in _FACTS:
            getattr(library, f"cogview_ops_{name}").restype = ctypes.c_char_p
    except OSError as error:
        raise ImportError(str(error.__cause__ or error)) from error
    except AttributeError as error:
        raise ImportError(f"{PATH} is not the library of this version: {error}") from error
    namespace = library.cogview_ops_namespace().decode()
    if namespace != NAMESPACE:
        raise ImportError(f"{PATH} was built with COGVIEW_OPS_NAMESPACE={namespace} and has been renamed")
    return library


_FACTS = "namespace", "compiler", "torch_version", "cuda_archs", "no_cuda", "supported_cpu", "active_cpu", "force_cpu"
NAMESPACE, PATH = _find(Path(__file__).parent)
_LIBRARY = _load()


def _ask(name: str, *args: bytes | None) -> str:
    said: str = getattr(_LIBRARY, f"cogview_ops_{name}")(*args).decode()
    if said.startswith("!"):
        raise RuntimeError(said[1:])
    return said


def compiler() -> str:
    """Compiler and version that this was built with."""
    return _ask("compiler")


def torch_version() -> str:
    """torch that this was built against."""
    return _ask("torch_version")


def cuda_archs() -> str:
    """CUDA architectures, empty without CUDA."""
    return _ask("cuda_archs")


def no_cuda() -> str:
    """Why this has no CUDA part, empty where it has."""
    return _ask("no_cuda")


def supported_cpu() -> list[str]:
    """Instruction sets of this build that this processor has."""
    return _ask("supported_cpu").split()


def active_cpu() -> str:
    """The one in use."""
    return _ask("active_cpu")


def force_cpu(name: str | None) -> None:
    """Use another instruction set from now on; None: the default."""
    _ask("force_cpu", name if name is None else name.encode())
