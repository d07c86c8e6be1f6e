// What LayerNorm and the fused step of a Sandwich-LN transformer are asked to do, the same for every device:
// h = residual + LN_post(dropout(branch)), x = LN_pre(h). Plain LayerNorm is the second half alone.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "rows.h"

namespace cogview {

enum class Relax { none, row, tensor };

// Parameters and statistics are float32, float64 where the rows are.
struct Norm {
  const void *weight, *bias;  // [cols]
  void *mean, *rstd;          // [rows], in units of the norm's input
  void *dweight, *dbias;      // backward: sums of every block of rows, each a row of its own
};

struct NormArgs {
  Dtype dtype;           // of branch, x and their gradients
  Dtype residual_dtype;  // of residual, h and their gradients: the same, or f32 beside bf16 or f16
  int64_t rows, cols;
  double eps;
  Relax relax;
  double dropout_scale;  // of kept elements; 0: none are kept
  uint32_t dropout_threshold;
  bool dropout;
  const int64_t* seed;  // one, on the device; null without dropout
  Norm post, pre;
  const void* branch;  // null: without the first half
  Rows branch_rows;
  const void* residual;
  Rows residual_rows;
  void* h;  // written by the first half, read by the second
  Rows h_rows;
  void* x;  // null: without the second half
  Rows x_rows;

  const void *dh, *dx;  // backward; either may be null
  Rows dh_rows, dx_rows;
  void* dresidual;  // the whole gradient of h
  Rows dresidual_rows;
  void* dbranch;
  Rows dbranch_rows;
};

}  // namespace cogview
