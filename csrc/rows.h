// Rows of a tensor with any strides: the leading dimensions, merged where they can be, and the way to row i.
#pragma once

#include <cstdint>

#include "inline.h"

namespace cogview {

constexpr int kMaxRowDims = 16;

struct Rows {
  int64_t count = 1;
  int ndim = 0;
  int64_t sizes[kMaxRowDims], strides[kMaxRowDims];

  // Offset, in elements, of row i.
  COGVIEW_HOST_DEVICE int64_t offset(int64_t i) const {
    int64_t at = 0;
#pragma unroll 1  // for nvcc: a 64-bit division is a page of code
    for (int d = ndim - 1; d > 0; --d) {
      at += i % sizes[d] * strides[d];
      i /= sizes[d];
    }
    return ndim ? at + i * strides[0] : 0;
  }
};

}  // namespace cogview
