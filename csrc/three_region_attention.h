// What three-region block-sparse attention is asked to do, the same for every device. With
// w(i) = max(0, (i / block_size - window_blocks + 1) * block_size), the first key of query i's window, query i sees key
// j iff j <= i and (w(i) <= j or j is a pivot).
#pragma once

#include "attention.h"

namespace cogview {

struct ThreeRegionAttention : Attention {
  int64_t seqlen_k, block_size, window_blocks, num_pivots;
  double pivot_bias;
  Indices pivots;  // [B, num_pivots], contiguous, ascending, padding at the back
};

}  // namespace cogview
