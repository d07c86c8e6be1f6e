// What 2D local attention is asked to do, the same for every device.
#pragma once

#include "attention.h"

namespace cogview {

struct Grid {
  int64_t h = 0, w = 0;
};

struct Window {
  Grid grid, kernel, dilation{1, 1};  // kernel.h = 0: without a local set
  bool raster_causal, shift;          // shift: at the edges the window moves inward; else it is cut
};

// What is added to the scaled scores of the local set, by relative position; tables of accumulators, contiguous. A key
// dy rows and dx columns of its sub-image behind the query: entry (size.h / 2 + dy, size.w / 2 + dx) of its head.
struct Bias {
  const void* table = nullptr;  // [H, size.h, size.w], or null
  void* grad = nullptr;         // likewise, of the backward
  Grid size;
};

struct Prefix {
  int64_t len = 0;  // 0: without
  double bias;
  const bool* mask;  // [B, len], contiguous, or null
  Tensor4 k, v, dk, dv;
};

struct Coarse {
  Grid grid, kernel;  // grid.h = 0: without
  double bias;
  Tensor4 k, v, dk, dv;
};

struct LocalAttention : Attention {  // cache_seqlens count cells in raster order
  Window window;
  Bias bias;
  const bool* key_mask = nullptr;  // [B, cells] of the local set, contiguous, or null
  Indices query_index;             // decode only: [B, seqlen_q] cells of the queries; without, they are the last ones
  Prefix prefix;
  Coarse coarse;
};

}  // namespace cogview
