// What an attention is asked to do, the same for every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "inline.h"

namespace cogview {

// [B, H, S, D] by strides in elements, the last one 1.
struct Tensor4 {
  void* data = nullptr;
  int64_t stride[3] = {};
  template <class T>
  COGVIEW_HOST_DEVICE T* at(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * stride[0] + h * stride[1];
  }
};

struct Indices {
  const void* data = nullptr;
  bool wide = false;  // int64 or int32
  COGVIEW_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Attention {
  Dtype dtype;
  int64_t batch, heads, kv_heads, seqlen_q, head_dim;
  double scale;
  Tensor4 q, k, v, out;
  void* lse;                 // [B, H, seqlen_q], float, or double for double; null in local attention's decode
  Tensor4 dout, dq, dk, dv;  // of the backward
  void* dlse;                // as lse, or null
  Indices cache_seqlens;     // decode only: query row t stands at cache_seqlens[b] - seqlen_q + t
};

}  // namespace cogview
