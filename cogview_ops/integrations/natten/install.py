"""`import cogview_ops.integrations.natten.install`: code that imports `natten` finds the functions of this package.

- Where there is no NATTEN, the modules `natten` and `natten.functional` are these. Where there is one, its
  `natten.functional` gets those functions alone that it lacks.
- transformers' DiNAT can be imported and built, runs as one fused operator and trains, on CPUs too. (As transformers
  5.24 has it, it swaps the heads with an axis of the picture and runs with no NATTEN.)

Before or after the import of transformers, but before DiNAT's models are built.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from . import functional
from .fuse import forward_with_heads

_DINAT = "transformers.models.dinat.modeling_dinat"


def _provide() -> None:
    found = importlib.util.find_spec("natten")
    if found is not None and found.origin is not None:  # a folder of that name is no NATTEN
        import natten.functional as theirs
    else:
        package, theirs = ModuleType("natten", __doc__), ModuleType("natten.functional", functional.__doc__)
        package.__path__, package.functional = [], theirs  # type: ignore[attr-defined]
        for module in (package, theirs):
            module.__spec__ = ModuleSpec(module.__name__, None, is_package=module is package)
            sys.modules[module.__name__] = module
        package.na1d, package.na2d = functional.na1d, functional.na2d  # type: ignore[attr-defined]
    for name in functional.__all__:
        if not hasattr(theirs, name):
            setattr(theirs, name, getattr(functional, name))


def _mend_dinat(dinat: Any) -> None:
    dinat.natten2dqkrpb, dinat.natten2dav = functional.natten2dqkrpb, functional.natten2dav
    dinat.NeighborhoodAttention.forward = forward_with_heads


class _WhenImported:
    """A finder of one module, DiNAT's, which is mended when it has been loaded."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _DINAT:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_mend(module: ModuleType) -> None:
                load(module)
                _mend_dinat(module)

            spec.loader.exec_module = load_and_mend  # type: ignore[method-assign]
        return spec


_provide()
if "transformers" in sys.modules:
    sys.modules["transformers"].utils.import_utils.is_natten_available.cache_clear()
if _DINAT in sys.modules:
    _mend_dinat(sys.modules[_DINAT])
else:
    sys.meta_path.insert(0, _WhenImported)  # type: ignore[arg-type]
