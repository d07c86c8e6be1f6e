"""For Hugging Face's transformers: `register` gives it attention implementations, `fuse_norms` replaces norm steps."""

import importlib
from typing import Any

__all__ = ["block_pivots", "fuse_norms", "register"]
_FROM = {"block_pivots": "pivots", "fuse_norms": "norms", "register": "attention"}


def __getattr__(name: str) -> Any:
    """On demand: neither half needs what the other imports."""
    if name in _FROM:
        return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
