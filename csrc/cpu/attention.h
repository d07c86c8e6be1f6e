// What the attention operators' kernels are told about their tensors.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace cogview {

// [B, H, S, D] by strides in elements, the last one 1.
struct Tensor4 {
  void* data = nullptr;
  int64_t stride[3] = {};
  template <class T>
  T* at(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * stride[0] + h * stride[1];
  }
};

struct Indices {
  const void* data = nullptr;
  bool wide = false;  // int64 or int32
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Each thread's own piece of one allocation.
struct Scratch {
  char* data = nullptr;
  int64_t bytes = 0;
  char* of(int slot) const { return data + slot * bytes; }
};

// Bytes of scratch that the tile engine needs for a thread.
COGVIEW_DECLARE(int64_t tile_scratch(Dtype dtype, int64_t head_dim))

}  // namespace cogview
