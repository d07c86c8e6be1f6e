// What every binding needs: dtypes and tensors.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000ULL  // the LibTorch stable ABI of 2.11

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../dtype.h"

namespace cogview {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16");
  }
}

// What statistics and sums of x are kept in.
inline ScalarType stat_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// As it is where it can be: torch takes 2 us to return its argument.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// `empty_like` with a contiguous last dimension, also where x's rows overlap.
inline Tensor empty_rows(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  return out.stride(-1) == 1 || out.size(-1) == 1 ? out : torch::stable::new_empty(x, x.sizes());
}

inline void check_same_shape(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.sizes().equals(like.sizes()), name, ": shape does not match");
}

}  // namespace cogview
