// What LayerNorm, RMSNorm and the fused step of a transformer are asked to do, the same for every device:
// h = residual + scale * dropout(N_post(dropout(branch))), x = N_pre(h), one of the two dropouts, each norm optional.
// A plain norm is the second half alone.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "rows.h"

namespace cogview {

enum class Relax { none, row, tensor };

// Parameters and statistics are float32, float64 where the rows are. RMSNorm has no bias and no mean.
struct Norm {
  const void *weight, *bias;  // [cols]; no weight: the step is without this norm
  void *mean, *rstd;          // [rows], in units of the norm's input; rstd may be 1 / root mean square
  void *dweight, *dbias;      // backward: sums of every block of rows, each a row of its own
};

struct NormArgs {
  bool rms;              // RMSNorm: no relax
  Dtype dtype;           // of branch, x and their gradients
  Dtype residual_dtype;  // of residual, h and their gradients: the same, or f32 beside bf16 or f16
  int64_t rows, cols;
  double eps;
  Relax relax;
  double weight_offset;
  bool round_before_weight;  // RMSNorm: to the dtype of the norm's input
  double branch_scale;
  const void* row_scale;  // [rows], as parameters: a factor beside branch_scale; null: 1
  double dropout_scale;   // of kept elements; 0: none are kept
  uint32_t dropout_threshold;
  bool dropout, dropout_after_norm;  // after: of what the post-norm gives
  // on the device, one for every rows_per_seed rows (of one: all), in which places count from 0; null without dropout
  const int64_t* seed;
  int64_t rows_per_seed;
  Norm post, pre;
  const void* branch;  // null: without the first half; or in the backward not needed
  Rows branch_rows;
  const void* residual;
  Rows residual_rows;
  void* h;  // written by the first half, read by the second; null in the backward without the second half
  Rows h_rows;
  void* x;  // null: without the second half
  Rows x_rows;

  const void *dh, *dx;  // backward; either may be null
  Rows dh_rows, dx_rows;
  void* dresidual;  // the whole gradient of h; null without dx: it is dh
  Rows dresidual_rows;
  void* dbranch;  // null: not wanted
  Rows dbranch_rows;
  void* drow_scale;  // [rows]; null: not wanted
};

}  // namespace cogview
