// What every binding needs: dtypes, tensor access and the parallel loop over work items.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000ULL  // the LibTorch stable ABI of 2.11

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/dtype.h"
#include "../cpu/isa.h"

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

// `empty_like` with a contiguous last dimension, also where x's rows overlap.
inline Tensor empty_rows(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  return out.stride(-1) == 1 || out.size(-1) == 1 ? out : torch::stable::new_empty(x, x.sizes());
}

inline void check_same_shape(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.sizes().equals(like.sizes()), name, ": shape does not match");
}

inline int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// Runs `kernel(args, begin, end, slot)` over all items. Threads take the next `grain` items when they are free, so
// uneven items balance; which thread does what is not fixed, so items must be independent.
template <class Args>
void run_items(void (*kernel)(const Args&, int64_t, int64_t, int), const Args& args, int64_t items, int64_t grain = 1) {
  if (items == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t slots = std::min<int64_t>(num_threads(), (items + grain - 1) / grain);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot)
      for (int64_t begin; (begin = next.fetch_add(grain)) < items;)
        kernel(args, begin, std::min(begin + grain, items), static_cast<int>(slot));
  });
}

// Runs `kernel` with one fixed slice of the items per slot, for partial sums that must repeat bit for bit.
template <class Args>
void run_slices(void (*kernel)(const Args&, int64_t, int64_t, int), const Args& args, int64_t items, int64_t slots) {
  if (items == 0) return;
  torch::stable::parallel_for(0, slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot)
      kernel(args, items * slot / slots, items * (slot + 1) / slots, static_cast<int>(slot));
  });
}

}  // namespace cogview
