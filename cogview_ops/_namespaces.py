"""Names under which torch knows the operators: compiled ones, Triton's, and CUDA C++'s whose derivative is Triton's.

The compiled library tells the first (_C.py), so that several builds of this package can be in one process.
"""

try:
    from . import _C

    build_error: str | None = None
except ImportError as error:  # usable without it: impl="reference"
    _C = None  # type: ignore[assignment]
    build_error = str(error)

COMPILED = _C.NAMESPACE if _C else "cogview_ops"
TRITON, MIXED = f"{COMPILED}_triton", f"{COMPILED}_mixed"
ALL = (COMPILED, TRITON, MIXED)
