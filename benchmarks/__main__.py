"""`python -m benchmarks [--op NAME] [--dtype bf16]`: time the cases, write results/<device>.json, print the table."""

import argparse
import sys
from pathlib import Path

import pytest

from cogview_ops.bench.machine import keep_freed_pages
from cogview_ops.bench.measure import DTYPES

from . import report
from .cases import CASES, select


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=sorted({c.op for c in CASES}), help="one operator (default: all)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="one dtype (default: all)")
    parser.add_argument("--seconds", type=float, default=2, help="of timing for each case (default: %(default)s)")
    options = parser.parse_args()
    try:
        chosen = select(CASES, options.op, options.dtype)
    except LookupError as error:
        parser.error(str(error))
    keep_freed_pages()
    tests = [f"{Path(__file__).parent / 'test_bench.py'}::test_case[{case}]" for case in chosen]
    quiet = ["-o", "addopts=", "-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "--benchmark-quiet"]
    status = pytest.main([*quiet, f"--benchmark-max-time={options.seconds}", *tests])
    print("\n" + report.tables())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
