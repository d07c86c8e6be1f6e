"""NATTEN's functions on the operators of this package: forward and backward, on CPUs too.

`na1d` and `na2d` are those of NATTEN 0.21; `functional` has the pair of scores and products that NATTEN dropped with
0.20, on which DiNAT of transformers and others are built. `import cogview_ops.integrations.natten.install` gives both
to code that imports `natten`; `fuse(model)` makes one call of such a pair. Definition: arXiv 2204.07143, 2209.15001.
"""

from ._na import na1d, na2d
from .fuse import fuse

__all__ = ["fuse", "na1d", "na2d"]
