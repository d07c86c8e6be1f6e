// Which instances of the kernels there are, and the choice among them; a file of instances/ compiles those of one dtype
// and head_dim.
#pragma once

#include <climits>

#include "launch.cuh"
#include "local_backward.cuh"
#include "local_forward.cuh"
#include "local_grad_extra.cuh"
#include "local_grad_table.cuh"
#include "local_plan.h"

namespace cogview::cuda {

template <class Args>
cudaError_t start_strips(void (*kernel)(Args), const StripPlan& plan, int multiprocessors, const Args& args,
                         cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes);
  if (error != cudaSuccess) return error;
  const int blocks = plan.p.items < multiprocessors ? plan.p.items : multiprocessors;
  return start(kernel, dim3(static_cast<unsigned>(blocks)), plan.threads, plan.bytes, stream, args);
}

template <class T, int D, bool kCausal>
auto forward_kernel(const StripPlan& plan) -> void (*)(ForwardArgs) {
  if constexpr (has_all_rows(D, 3, kCausal ? 2 : 3, kCausal, false))
    if (plan.unit_rows > 1) return local_forward < T, D, 3, kCausal ? 2 : 3, kCausal, false, false > ;
  if (plan.extra)
    return plan.units == 3 ? local_forward<T, D, 3, 1, kCausal, true, false>
                           : local_forward<T, D, 5, 1, kCausal, true, false>;
  switch (plan.units) {
    case 2:
      return local_forward<T, D, 2, 1, kCausal, false, false>;
    case 3:
      return local_forward<T, D, 3, 1, kCausal, false, false>;
    case 4:
      return local_forward<T, D, 4, 1, kCausal, false, false>;
    default:
      return local_forward<T, D, 5, 1, kCausal, false, false>;
  }
}

template <class T, int D>
cudaError_t launch_local_forward(const StripPlan& plan, int multiprocessors, const ForwardArgs& args,
                                 cudaStream_t stream) {
  const auto kernel = [&] {
    if (plan.options)
      return plan.units == 3 ? local_forward<T, D, 3, 1, false, true, true>
                             : local_forward<T, D, 5, 1, false, true, true>;
    return plan.p.ordered ? forward_kernel<T, D, true>(plan) : forward_kernel<T, D, false>(plan);
  };
  return start_strips(kernel(), plan, multiprocessors, args, stream);
}

template <class T, int D>
cudaError_t launch_local_backward(const StripPlan& plan, int multiprocessors, const BackwardArgs& args,
                                  cudaStream_t stream) {
  const auto kernel = [&] {
    if (plan.options)
      return plan.p.y.keys ? local_backward<T, D, true, false, true> : local_backward<T, D, false, true, true>;
    if (plan.p.y.keys) return local_backward<T, D, true, false, false>;
    return plan.extra ? local_backward<T, D, false, true, false> : local_backward<T, D, false, false, false>;
  };
  return start_strips(kernel(), plan, multiprocessors, args, stream);
}

template <class T, int D, template <class> class Keys>
cudaError_t start_grad_extra(const Attention& a, const GradExtra& e, const float* stats, const Logits& logits,
                             cudaStream_t stream) {
  constexpr auto kernel = grad_extra<T, D, Keys>;
  using Pass = KeyPass<T, D>;
  constexpr int shared = Pass::Layout::kBytes;
  const int64_t blocks = Keys<typename Pass::Shape>::blocks(e) * a.batch * a.kv_heads;
  const int64_t pairs = a.batch * a.kv_heads * e.keys * a.head_dim / 2;
  if (blocks > INT_MAX || pairs > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  const auto grid = [](int64_t x, int y) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); };
  if (error == cudaSuccess)
    error = start(kernel, grid(blocks, e.splits), Pass::Shape::kThreads, shared, stream, a, e, stats, logits);
  if (error == cudaSuccess)
    error = start(add_parts<T>, grid((pairs + 255) / 256, 2), 256, 0, stream, a, e, logits.scale);
  return error;
}

template <class T, int D>
cudaError_t launch_grad_extra(const Attention& a, const GradExtra& e, const float* stats, const Logits& logits,
                              cudaStream_t stream) {
  return e.height ? start_grad_extra<T, D, CoarseKeys>(a, e, stats, logits, stream)
                  : start_grad_extra<T, D, PrefixKeys>(a, e, stats, logits, stream);
}

template <class T, int D>
cudaError_t launch_grad_table(const GradTableArgs& a, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(a.runs()) * a.units_down() * a.heads;
  const int64_t entries = static_cast<int64_t>(a.heads) * a.options.height * a.options.width;
  if (blocks > INT_MAX || entries > INT_MAX || a.tiles > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.splits));
  const cudaError_t error = start(grad_table<T, D>, grid, 32 * a.kWarps, 0, stream, a);
  if (error != cudaSuccess) return error;
  return start(add_table_parts<256>, dim3(static_cast<unsigned>((entries + 255) / 256)), 256, 0, stream, a);
}

}  // namespace cogview::cuda

#define COGVIEW_LOCAL_INSTANCES(T, D)                                                                           \
  namespace cogview::cuda {                                                                                     \
  template cudaError_t launch_local_forward<T, D>(const StripPlan&, int, const ForwardArgs&, cudaStream_t);     \
  template cudaError_t launch_local_backward<T, D>(const StripPlan&, int, const BackwardArgs&, cudaStream_t);   \
  template cudaError_t launch_grad_extra<T, D>(const Attention&, const GradExtra&, const float*, const Logits&, \
                                               cudaStream_t);                                                   \
  template cudaError_t launch_grad_table<T, D>(const GradTableArgs&, cudaStream_t);                             \
  }
