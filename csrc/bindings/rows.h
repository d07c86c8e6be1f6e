// A tensor seen as rows along its last dimension.
#pragma once

#include "../rows.h"
#include "common.h"

namespace cogview {

// Of a tensor whose last dimension has any stride.
inline Rows leading_rows(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.dim() <= kMaxRowDims, "expected 1 to ", kMaxRowDims, " dimensions, got ", x.dim());
  Rows rows;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 1) continue;
    rows.count *= size;
    if (rows.ndim && rows.strides[rows.ndim - 1] == size * stride) {
      rows.sizes[rows.ndim - 1] *= size;
      rows.strides[rows.ndim - 1] = stride;
    } else {
      rows.sizes[rows.ndim] = size;
      rows.strides[rows.ndim++] = stride;
    }
  }
  return rows;
}

inline Rows rows_of(const Tensor& x) {
  const Rows rows = leading_rows(x);
  STD_TORCH_CHECK(x.stride(-1) == 1 || x.size(-1) <= 1 || x.numel() == 0, "expected a contiguous last dimension");
  return rows;
}

// Gradients can come with a stride-0 last dimension (from `.sum()`): copied then, taken as they are otherwise.
inline Tensor rows_contiguous(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : torch::stable::contiguous(x);
}

// Whether results of this size are better written around the caches: they would not stay there until they are read.
inline bool beyond_cache(const Tensor& out) { return out.numel() * out.element_size() > int64_t(1) << 23; }

// Rows a thread takes at a time: about 32 thousand elements.
inline int64_t row_grain(int64_t cols) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(cols, 1)); }

}  // namespace cogview
