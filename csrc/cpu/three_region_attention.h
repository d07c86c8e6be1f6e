// Three-region block-sparse attention on CPU. With w(i) = max(0, (i / block_size - window_blocks + 1) * block_size),
// the first key of query i's window, query i sees key j iff j <= i and (w(i) <= j or j is a pivot).
#pragma once

#include "attention.h"

namespace cogview {

struct ThreeRegionArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, num_pivots;
  int64_t block_size, window_blocks;
  double pivot_bias, scale;
  int64_t query_group, key_group;  // tiles of a work item, at most 16
  int64_t decode_heads;            // of a work item; times seqlen_q at most 64
  Tensor4 q, k, v, out, dout, dq, dk, dv;
  Indices pivots;             // [B, num_pivots], contiguous
  Indices cache_seqlens;      // decode only: query row t stands at cache_seqlens[b] - seqlen_q + t
  void *lse, *dlse, *delta;   // [B, H, seqlen_q]; float, or double for double; lse null in decode, dlse may be
  void* dq_sums;              // [B, H, query_tiles, dq_tile_size] accumulators
  void *pivot_dk, *pivot_dv;  // [B, kv_heads, pivot_chunks, num_pivots, head_dim] accumulators
  // The backward is a sequence of launches in which no two items add to the same dq: pivots by chunks of queries, then
  // every colors-th group of key tiles. All three depend on the shape alone, so results do not depend on threads.
  int64_t pivot_chunks, colors, color;
  Scratch scratch;

  int64_t query_tiles() const { return (seqlen_q + 63) / 64; }
  int64_t key_tiles() const { return (seqlen_k + 63) / 64; }
  int64_t dq_tile_size() const { return (head_dim + 31) / 32 * 32 * 64; }
};

COGVIEW_DECLARE_KERNEL(three_region_fwd, ThreeRegionArgs)         // items: batch x heads x groups of query_tiles
COGVIEW_DECLARE_KERNEL(three_region_decode, ThreeRegionArgs)      // batch x kv_heads x parts of their heads
COGVIEW_DECLARE_KERNEL(three_region_prepare, ThreeRegionArgs)     // batch x heads x query_tiles: delta, dq_sums = 0
COGVIEW_DECLARE_KERNEL(three_region_grad_pivot, ThreeRegionArgs)  // batch x kv_heads x pivot_chunks
COGVIEW_DECLARE_KERNEL(three_region_grad_key, ThreeRegionArgs)    // batch x kv_heads x groups of key_tiles of a color
COGVIEW_DECLARE_KERNEL(three_region_finish, ThreeRegionArgs)      // batch x heads x query_tiles: dq

}  // namespace cogview
