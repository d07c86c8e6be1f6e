// What a product of few rows with a weight is asked to do.
#pragma once

#include "dtype.h"
#include "rows.h"

namespace cogview {

struct LinearArgs {
  Dtype dtype;
  int64_t in, out;  // columns of x and of y
  const void* x;
  Rows x_rows;
  const void* weight;     // [out, in], with `scale` int8
  int64_t weight_stride;  // between its rows, whose elements lie beside each other
  int64_t element_bytes;  // of the weight
  const void* scale;      // [out], accumulators: of the rows of an int8 weight, or null
  const void* bias;       // [out], or null
  void* y;                // [rows, out], contiguous
};

}  // namespace cogview
