"""`python -m cogview_ops.info`: versions, the build, and which implementation of each operator runs here."""

import platform

import torch

import cogview_ops

from . import _dispatch, _manifest


def main() -> None:
    print(f"cogview_ops {cogview_ops.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if _dispatch._C is None:
        print(f"extension: missing ({_dispatch.build_error})")
    else:
        build = _dispatch._C
        print(f"extension: {build.compiler()}, built against torch {build.torch_version()}")
        print(f"CPU: {build.active_cpu()} in use, of {', '.join(build.supported_cpu())}")
        print(f"CUDA: {_dispatch.no_cuda_part() or build.cuda_archs()}")
    for operator in _manifest.KERNELS:
        print(f"\n{operator.name}")
        for impl in _dispatch.IMPLS[1:]:
            print(f"  {impl:<10} {_dispatch.reason_unavailable(operator.forward, impl) or 'available'}")


if __name__ == "__main__":
    main()
