// What PB-relax softmax is asked to do, the same for every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "inline.h"
#include "rows.h"

namespace cogview {

struct SoftmaxArgs {
  Dtype dtype;
  int64_t rows_per_matrix, cols;  // R and K of [..., R, K]
  double alpha;
  bool causal;
  const void* scores;  // forward
  Rows scores_rows;
  const bool* mask;  // or null
  Rows mask_rows;
  int64_t mask_col_stride;  // 0 or as it comes
  const void* dout;         // backward
  Rows dout_rows;
  void* out;  // probabilities; in the backward read, and dscores written to `grad`
  Rows out_rows;
  void* grad;
  Rows grad_rows;

  // Number of leading columns that row i may see.
  COGVIEW_HOST_DEVICE int64_t visible(int64_t i) const {
    if (!causal) return cols;
    const int64_t n = i % rows_per_matrix + cols - rows_per_matrix + 1;
    return n < 0 ? 0 : n > cols ? cols : n;
  }
};

}  // namespace cogview
