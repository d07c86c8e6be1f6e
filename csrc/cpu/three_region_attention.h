// Three-region block-sparse attention on CPU, on the tile engine.
#pragma once

#include "../three_region_attention.h"
#include "attention.h"

namespace cogview {

struct ThreeRegionPlan {
  ThreeRegionAttention problem;
  int64_t query_group, key_group;  // tiles of a work item, at most 16
  void* delta;                     // [B, H, seqlen_q]
  void* dq_sums;                   // [B, H, query_tiles, dq_tile_size] accumulators
  void *pivot_dk, *pivot_dv;       // [B, kv_heads, pivot_chunks, num_pivots, head_dim] accumulators
  // The backward is a sequence of launches in which no two items add to the same dq: pivots by chunks of queries, then
  // every colors-th group of key tiles. All three depend on the shape alone, so results do not depend on threads.
  int64_t pivot_chunks, colors, color;
  int64_t decode_heads;  // of a work item; times seqlen_q at most 64
  Scratch scratch;

  COGVIEW_INLINE int64_t query_tiles() const { return ceil_div(problem.seqlen_q, kTile); }
  COGVIEW_INLINE int64_t key_tiles() const { return ceil_div(problem.seqlen_k, kTile); }
};

// The whole of it, planned and run.
void three_region_fwd(const ThreeRegionAttention& problem, const Host& host);
void three_region_bwd(const ThreeRegionAttention& problem, const Host& host);
void three_region_decode(const ThreeRegionAttention& problem, const Host& host);

COGVIEW_DECLARE_KERNEL(three_region_tiles_fwd, ThreeRegionPlan)   // items: batch x heads x groups of query_tiles
COGVIEW_DECLARE_KERNEL(three_region_prepare, ThreeRegionPlan)     // batch x heads x query_tiles: delta, dq_sums = 0
COGVIEW_DECLARE_KERNEL(three_region_grad_pivot, ThreeRegionPlan)  // batch x kv_heads x pivot_chunks
COGVIEW_DECLARE_KERNEL(three_region_grad_key, ThreeRegionPlan)    // batch x kv_heads x groups of key_tiles of a color
COGVIEW_DECLARE_KERNEL(three_region_finish, ThreeRegionPlan)      // batch x heads x query_tiles: dq
COGVIEW_DECLARE_KERNEL(three_region_rows, ThreeRegionPlan)        // batch x kv_heads x parts of their heads

}  // namespace cogview
