// 2D local attention on CPU, joint with prefix keys and a coarser grid: its two engines' plans and kernels.
//
// On vectors (lanes) the work is strips of at most 16 queries; on the tile unit queries and keys are packed in patches,
// rectangles of at most 64 cells.
#pragma once

#include "local_grid.h"

namespace cogview {

// The part of a bias table that is used, and where the parts of its gradient are summed up.
struct BiasPlan {
  Span y, x;              // of distances
  int64_t slots = 0;      // parts of the sum of a sample and a head
  void* parts = nullptr;  // [B, H, slots, y, x] accumulators
  // On tiles: a vector is of these cells, of keys or of queries.
  Grid cells;
  bool of_keys = false;
  void* values = nullptr;  // [H, lanes(cells)] accumulators, which all work items read

  COGVIEW_INLINE int64_t size() const { return y.size() * x.size(); }
  // Accumulators that take the vectors of local_bias.h, one for each distance from a rectangle of cells that one of
  // them has in reach, and one behind them.
  COGVIEW_INLINE int64_t lanes(Grid cells) const {
    return ((y.size() + cells.h - 1) * (x.size() + cells.w - 1) + 1) * kBiasLanes;
  }
  // Those for the table with as much around it as lanes go through.
  COGVIEW_INLINE int64_t padded(Grid cells) const {
    return (y.size() + 2 * cells.h - 2) * (x.size() + 2 * cells.w - 2 + kBiasLanes);
  }
};
struct LocalBiasPlan {
  LocalAttention problem;
  BiasPlan bias;
  Scratch scratch;
};

// Strips of 16 cells, bands of a phase's strips, chunks of all bands of a head.
struct LocalLanePlan {
  LocalAttention problem;
  Grid strip;
  BiasPlan bias;
  int64_t bands, chunks;
  void* shared_sums;  // [B, kv_heads, chunks, 2, shared_keys, padded head_dim] accumulators
  Scratch scratch;
};

struct LocalTilePlan {
  LocalAttention problem;
  Patches queries, keys, coarse;
  BiasPlan bias;
  void* delta;                    // [B, H, seqlen_q]
  void* dq_sums;                  // [B, H, query_patches, dq_tile_size] accumulators
  int64_t prefix_chunks;          // of queries, in the backward of the prefix
  void *prefix_dks, *prefix_dvs;  // [B, kv_heads, prefix_chunks, prefix.len, head_dim] accumulators
  Scratch scratch;

  COGVIEW_INLINE int64_t patches_of_phase() const {
    const Grid grid = phase_grid(problem.window);
    return queries.y.count(grid.h) * queries.x.count(grid.w);
  }
  COGVIEW_INLINE int64_t query_patches() const { return phases(problem.window) * patches_of_phase(); }
};

struct LocalDecodePlan {
  LocalAttention problem;
  int64_t heads;  // of a work item, at most 8
  Scratch scratch;
};

// Prefix and coarse keys, which all phases share.
COGVIEW_INLINE int64_t shared_keys(const LocalAttention& a) { return a.prefix.len + a.coarse.grid.h * a.coarse.grid.w; }
COGVIEW_INLINE int64_t prefix_tiles(const LocalAttention& a) { return ceil_div(a.prefix.len, kTile); }

// The whole of it, planned and run.
void local_fwd(const LocalAttention& problem, const Host& host);
void local_bwd(const LocalAttention& problem, const Host& host);
void local_decode(const LocalAttention& problem, const Host& host);

// Whether a dtype is for the tile unit; if not, how much scratch a thread needs.
COGVIEW_DECLARE(bool local_on_tiles(Dtype dtype, bool backward))
COGVIEW_DECLARE(int64_t local_lanes_scratch(const LocalLanePlan& plan, bool backward))
COGVIEW_DECLARE_KERNEL(local_lanes_fwd, LocalLanePlan)     // items: batch x kv_heads x chunks
COGVIEW_DECLARE_KERNEL(local_lanes_bwd, LocalLanePlan)     // batch x kv_heads x chunks
COGVIEW_DECLARE_KERNEL(local_lanes_finish, LocalLanePlan)  // batch x kv_heads x shared keys

COGVIEW_DECLARE_KERNEL(local_tiles_bias, LocalTilePlan)           // heads: bias.values
COGVIEW_DECLARE_KERNEL(local_tiles_fwd, LocalTilePlan)            // batch x heads x phases x groups of query patches
COGVIEW_DECLARE_KERNEL(local_tiles_prepare, LocalTilePlan)        // batch x heads x query_patches: delta, dq_sums = 0
COGVIEW_DECLARE_KERNEL(local_tiles_grad_prefix, LocalTilePlan)    // batch x kv_heads x prefix_chunks
COGVIEW_DECLARE_KERNEL(local_tiles_finish_prefix, LocalTilePlan)  // batch x kv_heads x prefix_tiles
COGVIEW_DECLARE_KERNEL(local_tiles_grad_coarse, LocalTilePlan)  // batch x kv_heads x groups of coarse patches, a color
COGVIEW_DECLARE_KERNEL(local_tiles_grad_key, LocalTilePlan)  // batch x kv_heads x phases x groups of patches, a color
COGVIEW_DECLARE_KERNEL(local_tiles_finish, LocalTilePlan)    // batch x heads x query_patches: dq

COGVIEW_DECLARE_KERNEL(local_finish_bias, LocalBiasPlan)     // heads: the gradient of their table
COGVIEW_DECLARE_KERNEL(local_lanes_decode, LocalDecodePlan)  // batch x parts of the heads x seqlen_q

}  // namespace cogview
