"""What users write, for type checkers in their strict modes; `test_types.py` runs it as well."""

from typing import assert_type

import torch
from torch import Tensor

import cogview_ops
from cogview_ops import (
    layer_norm,
    local_attention_2d,
    merge_attentions,
    pb_relax_attention,
    pb_relax_softmax,
    sample_pivots,
    sandwich_layer_norm,
    three_region_attention,
    three_region_attention_decode,
    three_region_attention_varlen,
)
from cogview_ops.modules import KVCache, LocalAttention2d, PBRelaxLayerNorm, SandwichLayerNorm, ThreeRegionAttention

q, k, v = torch.randn(3, 1, 4, 64, 16).unbind()
position = torch.arange(64)[None]
pivots = sample_pivots(position < 16, position >= 16, num_pivots=24)
assert_type(three_region_attention(q, k, v, pivots, block_size=16, window_blocks=2), Tensor)
out, lse = three_region_attention(q, k, v, pivots, return_lse=True)
packed, ends = q[0].transpose(0, 1), torch.tensor([0, 24, 64])
some = sample_pivots(position[0] < 4, position[0] >= 4, 8, cu_seqlens=ends)
assert_type(three_region_attention_varlen(packed, packed, packed, some, ends, max_seqlen=40), Tensor)
rows, _ = three_region_attention_varlen(packed, packed, packed, some, ends, block_size=16, return_lse=True)
flag = bool(pivots.numel())
assert_type(three_region_attention(q, k, v, pivots, return_lse=flag), Tensor | tuple[Tensor, Tensor])
near, near_lse = local_attention_2d(q, k, v, grid=(8, 8), kernel_size=(3, 3), return_lse=True)
assert_type(local_attention_2d(q, k, v, grid=(8, 8), kernel_size=(3, 3), scale=0.5), Tensor)
merged, merged_lse = merge_attentions([near, out], [near_lse, lse])
weighted, weights = pb_relax_attention(q, k, merged, causal=True, return_weights=True)
assert_type(pb_relax_attention(q, k, v, alpha=8), Tensor)
length = torch.tensor([64])
assert_type(three_region_attention_decode(q[:, :, -1:], k, v, pivots, length, cache_leftpad=length - 9), Tensor)
last, _ = three_region_attention_decode(q[:, :, -1:], k, v, pivots, length, block_size=16, return_lse=True)
print(pb_relax_softmax(weights, alpha=8.0).sum(), weighted.shape, merged_lse.shape, last.shape, rows.shape)
h, x = sandwich_layer_norm(q, k, *torch.ones(4, 16).unbind())
print(layer_norm(h, x[0, 0, 0], x[0, 0, 1]).shape, cogview_ops.modules.PBRelaxSoftmax(2.0))
attention, local = ThreeRegionAttention(64, 4, block_size=16), LocalAttention2d(64, 4, grid=(8, 8), kernel_size=(3, 3))
norm, step = PBRelaxLayerNorm(64), SandwichLayerNorm(64, dropout_p=0.1)
cache: KVCache = attention.make_cache(1, 64)
with torch.no_grad():
    tokens = attention(norm(torch.randn(1, 64, 64)), pivots, cache)
prefix_key, prefix_value = local.keys_values(tokens)
h, x = step(local(tokens, prefix_key=prefix_key, prefix_value=prefix_value), tokens)
