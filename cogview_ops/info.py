"""`python -m cogview_ops.info`: versions, the build, and which implementation of each operator runs here.

With `--report` what an issue has to tell of a machine, as Markdown, and whether the operators are right on it.
"""

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

from . import __version__, _dispatch, _manifest, _report


def lines() -> Iterator[str]:
    yield f"cogview_ops {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    if _dispatch._C is None:
        yield f"extension: missing ({_dispatch.build_error})"
    else:
        build = _dispatch._C
        yield f"extension: {build.compiler()}, built against torch {build.torch_version()}"
        yield f"library: {build.PATH}"
        yield f"CPU: {build.active_cpu()} in use, of {', '.join(build.supported_cpu())}"
        yield f"CUDA: {_dispatch.no_cuda_part() or build.cuda_archs()}"
    for operator in _manifest.KERNELS:
        yield f"\n{operator.name}"
        for impl in _dispatch.IMPLS[1:]:
            yield f"  {impl:<10} {_dispatch.reason_unavailable(operator.forward, impl) or 'available'}"


def main(arguments: Sequence[str] = ()) -> None:
    """Prints it. `arguments`: of the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.info",
        description="Versions, the build, and which implementation of each operator runs here, or why it does not.",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="Markdown for an issue: the machine, what is installed, and a tiny call of each operator against its "
        "formula; no names of users or folders",
    )
    for line in _report.lines() if parser.parse_args(arguments).report else lines():
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
