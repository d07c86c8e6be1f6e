"""Which implementation of an operator runs, and why another cannot.

"cpp" and "cuda" are kernels of one compiled namespace (torch picks by device), "triton" is a namespace of its
own, "reference" is plain torch. "auto" is the compiled or Triton kernel of the tensor's device and never the
reference: a slow formula that nobody asked for is worse than an error. Of attention on a GPU, which has both, it is
the one that was faster on that chip (_measured.py): of forward and backward, or the forward of CUDA C++ with the
backward of Triton, for which there is a third namespace.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _checks, _manifest, _measured, _sharding
from ._namespaces import _C, COMPILED, MIXED, TRITON, build_error

IMPLS = ("auto", "reference", "cpp", "cuda", "triton")

_WHOLE = (Tensor, torch.nn.Parameter)  # others may be a part of what is distributed
_WITH_CUDA = {name for operator in _manifest.KERNELS if operator.cuda for name in operator.registered}
_WITH_TRITON = {name for operator in _manifest.KERNELS if operator.triton for name in operator.registered}
_compiled: set[tuple[str, str]] = set()  # (operator, "cpp" or "cuda"), filled as operators are defined
_transformed: dict[tuple[str, str], Any] = {}  # operators as autograd functions that torch.func takes, filled likewise
_recorded: dict[tuple[str, str], Any] = {}  # as those that are cheaper
_triton: dict[str, tuple[str, ...]] = {}  # devices of an operator's Triton kernel, filled by `_load_triton`


def record(op: str) -> None:
    """Note which compiled kernels a newly defined operator has."""
    for impl, key in (("cpp", "CPU"), ("cuda", "CUDA")):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{COMPILED}::{op}", key):
            _compiled.add((op, impl))


def record_functions(
    namespace: str, op: str, transformed: type[torch.autograd.Function], recorded: type[torch.autograd.Function]
) -> None:
    """Note what records an operator for its derivative."""
    _transformed[namespace, op], _recorded[namespace, op] = transformed.apply, recorded.apply


def record_triton(op: str, devices: tuple[str, ...]) -> None:
    """Note on which devices an operator's Triton kernel runs."""
    _triton[op] = devices


def _load_triton() -> str | None:
    """Register the Triton kernels, on first use: Triton is optional and slow to import. None, or why they are not."""
    try:
        from . import triton as triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); `pip install 'triton>=3.6'`"
    return None


def no_cuda_part() -> str | None:
    """None where this build has its CUDA part, else why not and what makes one."""
    if _C is None or _C.cuda_archs():
        return None
    why = f"this build has no CUDA part ({_C.no_cuda()})"
    return f"{why}; `COGVIEW_OPS_CUDA=1 pip install .` in the folder of its sources makes one, or says what that takes"


def reason_unavailable(op: str, impl: str) -> str | None:
    """None where `impl` of `op` can run here, else one sentence why not."""
    if impl == "reference":
        return None
    if impl == "triton":
        missing = _load_triton() if op in _WITH_TRITON else None
        return missing or (None if op in _triton else "there is no Triton kernel of this operator")
    if _C is None:
        how = "build it with `pip install .` in the folder of its sources"
        return f"the compiled extension is missing ({build_error}); {how}"
    if (op, impl) in _compiled:
        return None
    if impl == "cuda" and op in _WITH_CUDA:
        return no_cuda_part() or "this build has no CUDA kernel of this operator"
    return f"there is no {'CPU' if impl == 'cpp' else 'CUDA'} kernel of this operator"


def select(op: str, impl: str, x: Tensor, limits: Callable[[], str | None] | None = None) -> str | None:
    """Namespace that implements `op` for x's device, or None for the reference. `limits` says why the CUDA C++ kernel
    cannot take a call: for operators of which there is a Triton kernel as well."""
    if impl == "reference":
        return None
    if impl not in IMPLS:
        raise ValueError(f"impl: expected {' or '.join(map(repr, IMPLS))}, got {impl!r}")
    device, cuda_first, limit = x.device.type, (True, True), None
    if limits is not None and device != "cpu":
        cuda_first = _measured.cuda_first(op, x.device, int(x.shape[-1]))
        if impl == "cuda" or (impl == "auto" and (cuda_first[0] or _load_triton())):
            limit = limits()
    # a graph would ask again whether what it has found itself is known; and limits are of any number
    compiling = torch.compiler.is_compiling()
    namespace = (_namespace if compiling or limit else _known_namespace)(op, impl, device, cuda_first, limit)
    if not compiling and type(x) is not Tensor:
        _sharding.register()  # with what the choice has loaded
    return namespace


def _namespace(op: str, impl: str, device: str, cuda_first: tuple[bool, bool], limit: str | None) -> str:
    if impl == "auto":
        on_gpu = ("cuda", "triton") if cuda_first[0] else ("triton", "cuda")
        candidates = {"cpu": ("cpp",), "meta": ("cpp",), "cuda": on_gpu}.get(device, ("triton",))
    else:
        wanted = {"cpp": ("cpu", "meta"), "cuda": ("cuda", "meta")}.get(impl, ("cpu", "cuda", "xpu", "meta"))
        if device not in wanted:
            raise ValueError(f"impl: {impl!r} runs on {' or '.join(wanted[:-1])} tensors, got a {device} tensor")
        candidates = (impl,)
    reasons = []
    for name in candidates:
        reason = reason_unavailable(op, name) or (limit if name == "cuda" else None)
        if reason is None and name == "triton" and device not in (*_triton[op], "meta"):
            reason = f"its Triton kernel runs on {' or '.join(_triton[op])} (on cpu with TRITON_INTERPRET=1)"
        if reason is None and name == "triton":
            return TRITON
        if reason is None:
            mixed = impl == "auto" and cuda_first == (True, False) and not reason_unavailable(op, "triton")
            return MIXED if mixed else COMPILED
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"{op} cannot run on a {device} tensor: {'; '.join(reasons)}. impl='reference' can.")


_known_namespace = cache(_namespace)


def run(namespace: str, name: str, *args: Any, values: Callable[[], None] | None = None) -> Any:
    """Call an operator where `select` found it. `values` raises if what tensors hold is wrong: it is asked before other
    kernels than those for CPUs, and where those refuse, to say why.

    Derivatives are recorded by autograd functions: torch.func takes nothing else, and what is registered with the
    operators takes 150 us. That is for who calls them directly: graphs, traces, __torch_function__."""
    if torch.compiler.is_compiling():
        return getattr(getattr(torch.ops, namespace), name)(*args)
    _checks.no_forward_mode(name.removesuffix("_fwd"), *args)
    looks_itself = namespace == COMPILED and type(args[0]) in _WHOLE and args[0].is_cpu
    if values and not looks_itself:
        values()
    try:
        if torch._C._get_tracing_state() or torch.overrides.has_torch_function(args):
            return getattr(getattr(torch.ops, namespace), name)(*args)
        if torch._C._are_functorch_transforms_active():
            return _transformed[namespace, name](*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _recorded[namespace, name](*args)
        return below_autograd(namespace, name, *args)
    except RuntimeError:
        if values:
            values()
        raise


def below_autograd(namespace: str, name: str, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(getattr(torch.ops, namespace), name).default(*args)
