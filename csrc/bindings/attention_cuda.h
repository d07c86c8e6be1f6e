// What the CUDA bindings of attention share: their kernels read and write 16 bytes at once.
#pragma once

#include "attention.h"
#include "cuda.h"

namespace cogview {

inline bool in_packs(const Tensor& x) {
  bool whole = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) whole = whole && (x.size(d) <= 1 || x.stride(d) % 8 == 0);
  return whole;
}

// x, or a copy where its rows are not aligned: a graph does not know where tensors begin.
inline Tensor packed(const Tensor& x) {
  if (in_packs(x)) return x;
  Tensor copy = empty_rows(x);
  return torch::stable::copy_(copy, x);
}

struct CudaAttention {
  static void check_device(const Tensor& x, const Tensor& q, const char* name) { check_same_cuda(x, q, name); }
  static void check(const Tensor& x, const Tensor& q, const char* name) {
    check_same_cuda(x, q, name);
    const ScalarType type = q.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": expected bfloat16 or float16");
    STD_TORCH_CHECK(in_packs(x), name, ": expected rows aligned to 16 bytes");
  }
  static Tensor packed(const Tensor& x) { return cogview::packed(x); }
  static std::optional<Tensor> packed(const std::optional<Tensor>& x) {
    return x ? std::optional<Tensor>(cogview::packed(*x)) : std::nullopt;
  }
  static Tensor readable(const std::optional<Tensor>& dout, const Tensor& out) {
    return cogview::packed(cogview::readable(dout, out));
  }
};

}  // namespace cogview
