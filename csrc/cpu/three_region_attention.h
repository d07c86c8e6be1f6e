// Three-region block-sparse attention on CPU, on the tile engine.
#pragma once

#include "../three_region_attention.h"
#include "attention.h"

namespace cogview {

// One of a batch, or of those that are packed: where its rows are, and how many. Positions count from its first key.
struct Sequence {
  int64_t b, first_query, first_key;  // in the tensors
  int64_t queries, keys;
  int64_t offset;        // position of its first query
  int64_t pivots;        // how many of them its queries see
  int64_t tiles_before;  // of queries, in the sequences before it
  // Chunks of queries, by which gradients of pivots are summed up; rows of such sums in the sequences before it.
  int64_t chunks, sums_before;

  COGVIEW_INLINE int64_t tiles() const { return ceil_div(queries, kTile); }
};

// What a work item takes of a head: the number-th rows of a sequence, [begin, end).
struct Piece {
  int64_t sequence, number, begin, end;
};

struct ThreeRegionPlan {
  ThreeRegionAttention problem;
  const Sequence* sequences;
  const Piece* pieces;        // of queries or keys, as a launch takes them: those with most work first
  void* delta;                // [B, H, seqlen_q]
  void* dq_sums;              // [sequences, H, tiles, dq_tile_size] accumulators
  void *pivot_dk, *pivot_dv;  // [sequences, kv_heads, chunks, pivots, head_dim] accumulators
  int64_t key_group;          // tiles of keys, and of pivots, that share packed queries, at most 16
  int64_t decode_heads;       // of a work item; times seqlen_q at most 64
  Scratch scratch;
};

// First key of the window of the query at position i.
COGVIEW_INLINE int64_t window_start(const ThreeRegionAttention& a, int64_t i) {
  const int64_t start = (i / a.block_size - a.window_blocks + 1) * a.block_size;
  return start < 0 ? 0 : start;
}

// The whole of it, planned and run.
void three_region_fwd(const ThreeRegionAttention& problem, const Host& host);
void three_region_bwd(const ThreeRegionAttention& problem, const Host& host);
void three_region_decode(const ThreeRegionAttention& problem, const Host& host);

COGVIEW_DECLARE_KERNEL(three_region_tiles_fwd, ThreeRegionPlan)   // items: pieces of queries x heads
COGVIEW_DECLARE_KERNEL(three_region_prepare, ThreeRegionPlan)     // pieces of queries x heads: delta, dq_sums = 0
COGVIEW_DECLARE_KERNEL(three_region_grad_pivot, ThreeRegionPlan)  // chunks of queries x kv_heads
COGVIEW_DECLARE_KERNEL(three_region_grad_key, ThreeRegionPlan)    // pieces of keys, of a color, x kv_heads
COGVIEW_DECLARE_KERNEL(three_region_finish, ThreeRegionPlan)      // pieces of queries x heads: dq
COGVIEW_DECLARE_KERNEL(three_region_rows, ThreeRegionPlan)        // batch x kv_heads x parts of their heads

}  // namespace cogview
