"""Turns a schema and Python functions into torch operators; the same for every operator and namespace."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import _dispatch, _flops, _namespaces

_libraries: dict[str, torch.library.Library] = {}
# named, since torch 2.11 cannot trace torch.amp.is_autocast_available
_WITHOUT_AUTOCAST = frozenset(("meta", "lazy", "vulkan"))


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    namespace: str = _namespaces.COMPILED,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define `namespace::name` with its fake kernel, vmap rule and derivative.

    Without `backward` the operator raises when it is differentiated (the backward operators do: a missing rule
    would give wrong second derivatives with no more than a warning). The kernels themselves are registered by
    the compiled extension or by the Triton module.
    """
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    op = f"{namespace}::{name}"
    if torch._C._dispatch_has_kernel(op):
        _check_same(op, schema)
    else:
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if namespace == _namespaces.COMPILED:
        _dispatch.record(name)
    torch.library.register_fake(op, fake, lib=library)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"{name} cannot be differentiated; impl='reference' can")

    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=library)
    call = getattr(getattr(torch.ops, namespace), name)
    torch.library.register_vmap(op, _loop_over_batch(call, fake), lib=library)
    _dispatch.record_functions(namespace, name, *_functions(namespace, name, fake, backward, setup_context))
    _flops.register(namespace, name)


def _check_same(op: str, schema: str) -> None:
    """The library has the schemas of the Python that it was built from."""
    namespace, _, name = op.partition("::")
    there = getattr(getattr(torch.ops, namespace), name).default._schema
    if there != torch._C.parse_schema(op + schema):
        raise RuntimeError(f"the compiled library is not of this Python code: {there}; build it again")


def _functions(
    namespace: str, name: str, fake: Any, backward: Any, setup_context: Any
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """An operator as autograd function: as torch.func takes it, and as it is cheap to record, by 100 us."""
    kernel = partial(_dispatch.below_autograd, namespace, name)
    setup_context = setup_context or (lambda ctx, inputs, output: None)

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{name} has no forward-mode derivative; impl='reference' has")

    vmap = _loop_over_batch(partial(_dispatch.run, namespace, name), fake)
    transformed = {"forward": kernel, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    recorded = {"forward": forward, "backward": backward}
    return _function(name, transformed), _function(name, recorded)


def _function(name: str, methods: dict[str, Any]) -> type[torch.autograd.Function]:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


def implement(name: str, kernel: Callable[..., Any], devices: tuple[str, ...]) -> None:
    """Make a Python function the kernel of `<namespace>_triton::name` on some devices."""
    for device in devices:
        _libraries[_namespaces.TRITON].impl(name, kernel, device.upper())
    _dispatch.record_triton(name, devices)


def mix(name: str, define_forward: Callable[[str, str], None]) -> None:
    """Define `<namespace>_mixed::name`, the CUDA C++ kernel whose derivative is Triton's."""
    define_forward(_namespaces.MIXED, _namespaces.TRITON)
    compiled = getattr(getattr(torch.ops, _namespaces.COMPILED), name)
    _libraries[_namespaces.MIXED].impl(name, compiled, "CUDA")


def _loop_over_batch(call: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """vmap as a loop of calls, stacked: the kernels have batch dimensions of their own for what must be fast."""

    def nothing(args: Any, in_dims: Any) -> Any:
        """Of no calls: the shapes of one, and zero gradients for what went in."""
        one = [
            x.new_empty(x.shape[:dim] + x.shape[dim + 1 :]) if isinstance(dim, int) else x
            for x, dim in zip(args, in_dims, strict=True)
        ]
        floating = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        zero = torch.cat([x.flatten()[:0].float() for x in floating]).sum()
        return tree_map(lambda out: out.new_empty(0, *out.shape) + zero.to(out.dtype), fake(*one))

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        results = []
        for i in range(info.batch_size):
            # a list of ints has a list of None
            picked = [
                arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)
            ]
            results.append(call(*picked))
        if not results:
            stacked = nothing(args, in_dims)
        elif isinstance(results[0], torch.Tensor):
            stacked = torch.stack(results)
        else:
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, tree_map(lambda x: 0, stacked)

    return rule


def empty_rows(x: torch.Tensor) -> torch.Tensor:
    """`torch.empty_like(x)` with a contiguous last dimension, also where x's rows overlap. For fake kernels."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 or out.shape[-1] == 1 else x.new_empty(x.shape)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the kernels accumulate a dtype in, and keep its statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistic(x: torch.Tensor) -> torch.Tensor:
    """One number for each row of x. For fake kernels."""
    return x.new_empty(x.shape[:-1], dtype=wide(x.dtype))


def empty_attention(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of an attention."""
    return empty_rows(query), statistic(query)


def empty_decode(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    """out of a local attention decode."""
    return empty_rows(query)


def autocasts() -> bool:
    """Whether there may be autocast anywhere."""
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The user's autocast dtype for a float32 or lower tensor; None without autocast, and of anything else."""
    if not autocasts():
        return None
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return None
    kind = x.device.type
    if kind in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(*operands: Any) -> tuple[Any, ...]:
    """Under autocast, tensors in its dtype, as SDPA takes them; what it leaves alone stays, for the checks to see."""
    if not autocasts():
        return operands
    dtypes = [autocast_dtype(x) for x in operands]
    return tuple(x if dtype is None else x.to(dtype) for x, dtype in zip(operands, dtypes, strict=True))


def cat_tokens(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Parts `[B, H, S_i, D]` of a sequence, joined; tokens before heads in memory where `like` has them so."""
    if like.stride(1) < like.stride(2):
        return torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)
    return torch.cat(parts, 2)
