"""Triton kernels, in the namespace `cogview_ops_triton`. Imported on demand (`_dispatch`): Triton is optional."""

from . import three_region_attention as three_region_attention
