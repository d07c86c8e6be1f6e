// LayerNorm, RMSNorm and the step of a transformer: which kernels run, and where.
#include "sandwich_layer_norm.h"

#include "norm_backward.cuh"
#include "norm_forward.cuh"

namespace cogview::cuda {
namespace {

// Of each tensor of a row in a thread, as many as registers allow.
constexpr int kForwardPacks = 5, kBackwardPacks = 2;

using Kernel = void (*)(LayerNormArgs, int64_t, int);

// What is not aligned is read again in each pass.
template <class T, class R, bool kBranch, bool kRms>
Kernel forward_kernel(bool aligned, bool fits) {
  if (!aligned) return forward<T, R, kPackWidth<R> == 1, 0, kBranch, kRms>;
  return fits ? forward<T, R, true, kForwardPacks, kBranch, kRms> : forward<T, R, true, 0, kBranch, kRms>;
}
template <class T, class R, bool kBranch, bool kRms>
Kernel backward_kernel(bool aligned, bool fits) {
  if (!aligned) return backward<T, R, kPackWidth<R> == 1, 0, kBranch, kRms>;
  return fits ? backward<T, R, true, kBackwardPacks, kBranch, kRms> : backward<T, R, true, 0, kBranch, kRms>;
}
template <class T, bool kBranch>
Kernel peak_kernel(bool aligned) {
  return aligned ? peaks<T, true, kBranch> : peaks<T, kPackWidth<T> == 1, kBranch>;
}

// To packs of W elements.
template <int W, class T, class R>
bool all_aligned(const LayerNormArgs& a) {
  bool yes = a.cols % W == 0;
  const auto rows = [&](const void* data, const Rows& rows, int size) { yes &= !data || aligned(data, rows, W, size); };
  rows(a.branch, a.branch_rows, sizeof(T));
  rows(a.residual, a.residual_rows, sizeof(R));
  rows(a.h, a.h_rows, sizeof(R));
  rows(a.x, a.x_rows, sizeof(T));
  rows(a.dh, a.dh_rows, sizeof(R));
  rows(a.dx, a.dx_rows, sizeof(T));
  rows(a.dresidual, a.dresidual_rows, sizeof(R));
  rows(a.dbranch, a.dbranch_rows, sizeof(T));
  for (const void* weight : {a.post.weight, a.post.bias, a.pre.weight, a.pre.bias})
    yes &= reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  return yes;
}

// Calls f with whether it is RMSNorm, as a type.
template <class F>
Kernel by_kind(const LayerNormArgs& a, F f) {
  return a.rms ? f(std::true_type()) : f(std::false_type());
}

struct BackwardLaunch : RowLaunch {
  Kernel kernel;
  cudaError_t error = cudaSuccess;

  template <class T, class R>
  BackwardLaunch(LayerNormArgs& a, int64_t rows, T, R)
      : RowLaunch(rows, a.cols, kPackWidth<R> * kBackwardPacks, kThreads) {
    constexpr int W = kPackWidth<R>;
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    constexpr size_t kOther = 4096;  // the kernel's own
    const bool aligned = all_aligned<W, T, R>(a);
    const bool branch = a.dbranch || a.drow_scale;
    const int sums = (branch ? 2 : 1) * (a.rms ? 1 : 2);
    const size_t kept = threads * size_t(sums) * kBackwardPacks * W * sizeof(Acc<T>);
    const size_t whole = threads / team * (sums + 1) * a.scratch_cols * sizeof(Acc<T>);
    fits = fits && aligned && !a.drow_scale && kept + kOther <= size_t(most);
    a.sums_in_shared = fits || whole + kOther <= size_t(most);
    shared = fits ? kept : a.sums_in_shared ? whole : 0;
    kernel = by_kind(a, [&](auto rms) {
      return branch ? backward_kernel<T, R, true, rms>(aligned, fits)
                    : backward_kernel<T, T, false, rms>(aligned, fits);
    });
    if (error == cudaSuccess && shared)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error == cudaSuccess) error = persist(kernel);
  }
};

// Calls f with a value of each of the two types.
template <class F>
cudaError_t by_dtypes(const LayerNormArgs& a, F f) {
  return by_dtype(a.dtype, [&](auto x) {
    if constexpr (sizeof x == 2)
      if (a.residual_dtype == Dtype::f32) return f(x, float{});
    return f(x, x);
  });
}

}  // namespace

cudaError_t layer_norm_peak(const LayerNormArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtype(a.dtype, [&](auto one) {
    using T = decltype(one);
    RowLaunch launch(rows, a.cols, 4 * kPackWidth<T>, kThreads);
    const bool aligned = all_aligned<kPackWidth<T>, T, T>(a);
    const Kernel kernel = a.branch ? peak_kernel<T, true>(aligned) : peak_kernel<T, false>(aligned);
    cudaError_t error = cudaMemsetAsync(a.branch ? a.post_peak : a.pre_peak, 0, sizeof(Acc<T>), stream);
    if (error == cudaSuccess) error = launch.persist(kernel);
    return error == cudaSuccess ? launch(kernel, a, rows, stream) : error;
  });
}

cudaError_t sandwich_layer_norm_fwd(const LayerNormArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtypes(a, [&](auto one, auto other) {
    using T = decltype(one);
    using R = decltype(other);
    RowLaunch launch(rows, a.cols, kForwardPacks * kPackWidth<R>, kThreads);
    const bool aligned = all_aligned<kPackWidth<R>, T, R>(a), fits = launch.fits;
    const Kernel kernel = by_kind(a, [&](auto rms) {
      return a.branch ? forward_kernel<T, R, true, rms>(aligned, fits)
                      : forward_kernel<T, std::conditional_t<rms, T, R>, false, rms>(aligned, fits);
    });
    cudaError_t error = cudaSuccess;
    if (a.relax == Relax::tensor && !a.x && a.pre_peak) error = cudaMemsetAsync(a.pre_peak, 0, sizeof(Acc<T>), stream);
    return error == cudaSuccess ? launch(kernel, a, rows, stream) : error;
  });
}

cudaError_t sandwich_layer_norm_bwd_blocks(const LayerNormArgs& args, int64_t rows, int64_t* blocks) {
  return by_dtypes(args, [&](auto one, auto other) {
    LayerNormArgs a = args;
    const BackwardLaunch launch(a, rows, one, other);
    *blocks = launch.blocks;
    return launch.error;
  });
}

cudaError_t sandwich_layer_norm_bwd(const LayerNormArgs& args, int64_t rows, cudaStream_t stream) {
  return by_dtypes(args, [&](auto one, auto other) {
    using T = decltype(one);
    LayerNormArgs a = args;
    const BackwardLaunch launch(a, rows, one, other);
    const cudaError_t error = launch.error == cudaSuccess ? launch(launch.kernel, a, rows, stream) : launch.error;
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>((a.cols + kColumns - 1) / kColumns), a.dpost_weight ? 4 : 2);
    return start(total<T>, grid, kColumns * kParts, 0, stream, a, launch.blocks);
  });
}

}  // namespace cogview::cuda
