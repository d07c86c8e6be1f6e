"""setuptools' build hooks for pip and uv, and one sentence where there is no setuptools."""

import os
import sys

try:
    from setuptools.build_meta import *  # noqa: F403
except ImportError:
    pip = "uv pip" if os.environ.get("UV") else "pip"
    sys.exit(
        f"cogview-ops cannot be built: there is no setuptools: {pip} install 'setuptools>=77' ninja, "
        f"then {pip} install --no-build-isolation ."
    )
