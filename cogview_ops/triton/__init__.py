"""Triton kernels, in a namespace of their own (`_namespaces`). Imported on demand (`_dispatch`): Triton is optional."""

from . import local_attention_2d as local_attention_2d
from . import pb_relax_softmax as pb_relax_softmax
from . import sandwich_layer_norm as sandwich_layer_norm
from . import three_region_attention as three_region_attention
