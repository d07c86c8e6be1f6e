// What 2D local attention is asked to do, the same for every device.
#pragma once

#include "attention.h"

namespace cogview {

struct Grid {
  int64_t h = 0, w = 0;
};

struct Window {
  Grid grid, kernel, dilation{1, 1};
  bool raster_causal, shift;  // shift: at the edges the window moves inward; else it is cut
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
  Prefix prefix;
  Coarse coarse;
};

}  // namespace cogview
