// 2D local attention on CPU, joint with prefix keys and a coarser grid.
#pragma once

#include "attention.h"

namespace cogview {

struct Grid {
  int64_t h = 0, w = 0;
};

struct LocalArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, seqlen_q, head_dim, prefix_len;
  Grid grid, kernel, coarse_grid, coarse_kernel, ratio;  // ratio: fine cells per coarse cell
  Grid query_tile, coarse_tile;                          // at most 64 cells each
  bool raster_causal;
  double prefix_bias, coarse_bias, scale;
  Tensor4 q, k, v, out, dout, dq, dk, dv;
  Tensor4 prefix_k, prefix_v, prefix_dk, prefix_dv;  // null without
  Tensor4 coarse_k, coarse_v, coarse_dk, coarse_dv;
  const bool* prefix_mask;   // [B, prefix_len], contiguous, or null
  Indices cache_seqlens;     // decode only: query row t stands at raster index cache_seqlens[b] - seqlen_q + t
  void *lse, *dlse, *delta;  // [B, H, seqlen_q]; lse null in decode, dlse may be
  Scratch scratch;

  static int64_t tiles(Grid grid, Grid tile) {
    return tile.h ? ((grid.h + tile.h - 1) / tile.h) * ((grid.w + tile.w - 1) / tile.w) : 0;
  }
  int64_t query_tiles() const { return tiles(grid, query_tile); }
  int64_t decode_tiles() const { return (seqlen_q + 63) / 64; }
  int64_t prefix_tiles() const { return (prefix_len + 63) / 64; }
  int64_t key_tiles() const { return query_tiles() + tiles(coarse_grid, coarse_tile) + prefix_tiles(); }
};

COGVIEW_DECLARE_KERNEL(local_2d_fwd, LocalArgs)         // items: batch x heads x query_tiles
COGVIEW_DECLARE_KERNEL(local_2d_decode, LocalArgs)      // batch x heads x decode_tiles
COGVIEW_DECLARE_KERNEL(local_2d_grad_query, LocalArgs)  // batch x heads x query_tiles; also writes delta
COGVIEW_DECLARE_KERNEL(local_2d_grad_key, LocalArgs)    // batch x kv_heads x key_tiles: prefix, coarse, local

}  // namespace cogview
