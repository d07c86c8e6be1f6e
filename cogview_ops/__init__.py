"""Fused operators for transformers on text and images.

Layout of attention tensors is that of `torch.nn.functional.scaled_dot_product_attention`: `[B, H, S, D]`.

Under `torch.compile` two graphs serve all lengths, batches and grids. Numbers that are no sizes (alpha, scale, biases,
dropout_p) are constants of a graph, as the scale of `scaled_dot_product_attention` is: a schedule compiles each value.

A value that is NaN or infinite reaches the queries that see its key, on CPUs no others. On GPUs it reaches those that
share a tile with them, up to 128, in the reference all of its head; so do, in every backward, keys, queries and output
gradients that are not finite: 0 times NaN is NaN.

Operators may be called from several Python threads at once. In a forked process, as torch's own operators, they need
`torch.set_num_threads(1)` first, which DataLoader's workers have done: OpenMP's threads do not survive a fork.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _sharding
from . import modules as modules
from . import pairs as pairs
from . import patterns as patterns
from . import reference as reference
from .cogview2_attention import cogview2_attention
from .dalle_attention import dalle_attention, dalle_attention_decode
from .linear_decode import linear_decode
from .local_attention_2d import local_attention_2d, local_attention_2d_decode
from .merge_attentions import merge_attentions
from .pb_relax_attention import pb_relax_attention
from .pb_relax_softmax import pb_relax_softmax
from .sample_pivots import sample_pivots
from .sandwich_layer_norm import layer_norm, sandwich_layer_norm
from .sandwich_rms_norm import rms_norm, sandwich_rms_norm
from .three_region_attention import (
    three_region_attention,
    three_region_attention_decode,
    three_region_attention_varlen,
)

__all__ = [
    "cogview2_attention",
    "dalle_attention",
    "dalle_attention_decode",
    "layer_norm",
    "linear_decode",
    "local_attention_2d",
    "local_attention_2d_decode",
    "merge_attentions",
    "pb_relax_attention",
    "pb_relax_softmax",
    "rms_norm",
    "sample_pivots",
    "sandwich_layer_norm",
    "sandwich_rms_norm",
    "three_region_attention",
    "three_region_attention_decode",
    "three_region_attention_varlen",
]
__version__ = "0.1.0"
_sharding.register()

if TYPE_CHECKING:
    from . import checkpointing as checkpointing
    from . import info as info
    from . import layers as layers
    from . import triton as triton
else:

    def __getattr__(name: str) -> Any:
        """Submodules that few need, that are slow to import, need Triton or are run by `python -m`: when asked for."""
        if name in ("checkpointing", "info", "layers", "triton"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
