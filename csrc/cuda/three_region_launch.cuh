// Three-region attention's kernels and their launches, of a batch or, kPacked, of packed sequences:
// three_region_attention.cu and instances/three_region_varlen.cu compile one each.
#pragma once

#include "three_region_attention.h"

#include <algorithm>
#include <climits>
#include <type_traits>

#include "launch.cuh"
#include "pack.cuh"
#include "three_region_forward.cuh"
#include "three_region_grad_key.cuh"
#include "three_region_grad_query.cuh"

namespace cogview::cuda {
namespace {

template <class T, int D, bool kPacked>
__global__ void __launch_bounds__(ForwardShape<D>::kThreads, ForwardShape<D>::kBlocks)
    forward(const __grid_constant__ ThreeRegionAttention a, const __grid_constant__ Logits logits,
            const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionForward<T, D, kPacked>::run(a, logits, programs);)
}

template <class T, int D, bool kPacked>
__global__ void __launch_bounds__(GradQueryShape<D>::kThreads, GradQueryShape<D>::kBlocks)
    grad_query(const __grid_constant__ ThreeRegionAttention a, float* stats, const __grid_constant__ Logits logits,
               const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionGradQuery<T, D, kPacked>::run(a, stats, logits, programs);)
}

template <class T, int D, bool kPacked>
__global__ void __launch_bounds__(KeyPassShape<D>::kThreads, KeyPassShape<D>::kBlocks)
    grad_pivot(const __grid_constant__ ThreeRegionAttention a, const __grid_constant__ ThreeRegionScratch scratch,
               const __grid_constant__ Logits logits, const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionGradKey<T, D, kPacked>::pivots(a, scratch, logits, programs);)
}

template <class T, int D, bool kPacked>
__global__ void __launch_bounds__(KeyPassShape<D>::kThreads, KeyPassShape<D>::kBlocks)
    grad_window(const __grid_constant__ ThreeRegionAttention a, const __grid_constant__ ThreeRegionScratch scratch,
                const __grid_constant__ Logits logits, const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionGradKey<T, D, kPacked>::window(a, scratch, logits, programs);)
}

constexpr int64_t kSectionBytes = 1 << 25;  // keys and values of heads worked on at a time: half of an H100's L2 cache
constexpr int kMaxSplits = 8;
static_assert(kBlockRows == KeyPassShape<128>::kRows && kBlockRows == KeyPassShape<64>::kRows);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Programs that own kBlockRows rows of each head of queries, or of keys.
Programs programs_of(const ThreeRegionAttention& a, int64_t rows, bool of_queries) {
  const int64_t group = a.heads / a.kv_heads, each = of_queries ? group : 1, heads = a.batch * a.kv_heads * each;
  const int64_t pairs = std::max<int64_t>(1, kSectionBytes / (4 * a.seqlen_k * a.head_dim));
  return {static_cast<int>(ceil_div(rows, kBlockRows)), static_cast<int>(heads),
          static_cast<int>(std::min(heads, pairs * each)), static_cast<int>(group)};
}

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel* kernel, const Programs& programs, int splits, int threads, int shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  const int64_t blocks = int64_t(programs.tiles) * programs.heads;
  if (blocks > INT_MAX || int64_t(programs.tiles) * kBlockRows > INT_MAX) return cudaErrorInvalidConfiguration;
  int capability = 0;
  cudaError_t error = compute_capability(&capability);
  if (error == cudaSuccess && capability < 80) error = cudaErrorNotSupported;
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  return start(kernel, dim3(static_cast<unsigned>(blocks), splits), threads, shared, stream, arguments..., programs);
}

template <class Shaped>
cudaError_t of_head_dim(const ThreeRegionAttention& a, Shaped shaped) {
  if (a.seqlen_k > kThreeRegionTokens || a.num_pivots > kThreeRegionTokens) return cudaErrorInvalidValue;
#ifdef COGVIEW_ONE_HEAD_DIM  // for quick looks and tests, as COGVIEW_ONE_DTYPE
  constexpr int one = COGVIEW_ONE_HEAD_DIM;
  return a.head_dim == one ? shaped(std::integral_constant<int, one>{}) : cudaErrorInvalidValue;
#else
  switch (a.head_dim) {
    case 32:
      return shaped(std::integral_constant<int, 32>{});
    case 64:
      return shaped(std::integral_constant<int, 64>{});
    case 96:
      return shaped(std::integral_constant<int, 96>{});
    case 128:
      return shaped(std::integral_constant<int, 128>{});
  }
  return cudaErrorInvalidValue;
#endif
}

// f(T{}, head_dim) for the problem's.
template <class F>
cudaError_t by_shape(const ThreeRegionAttention& a, F f) {
  return by_narrow_dtype(a.dtype, [&](auto one) { return of_head_dim(a, [&](auto dim) { return f(one, dim); }); });
}

template <bool kPacked>
cudaError_t run_fwd(const ThreeRegionAttention& a, cudaStream_t stream) {
  return by_shape(a, [&](auto one, auto dim) {
    using Pass = ThreeRegionForward<decltype(one), dim, kPacked>;
    const Programs programs = programs_of(a, token_rows<kPacked>(a), true);
    return launch(forward<decltype(one), dim, kPacked>, programs, 1, Pass::Shape::kThreads, Pass::Layout::kBytes,
                  stream, a, Logits(a.scale, a.pivot_bias));
  });
}

template <bool kPacked>
cudaError_t run_bwd(const ThreeRegionAttention& a, const ThreeRegionScratch& scratch, cudaStream_t stream) {
  return by_shape(a, [&](auto one, auto dim) {
    using T = decltype(one);
    using OfQueries = ThreeRegionGradQuery<T, dim, kPacked>;
    using OfKeys = KeyPass<T, dim, kPacked>;
    constexpr int threads = OfKeys::Shape::kThreads, shared = OfKeys::Layout::kBytes;
    const int64_t rows = token_rows<kPacked>(a);
    const Logits logits(a.scale, a.pivot_bias);
    cudaError_t error = launch(grad_query<T, dim, kPacked>, programs_of(a, rows, true), 1, OfQueries::Shape::kThreads,
                               OfQueries::Layout::kBytes, stream, a, scratch.stats, logits);
    if (error == cudaSuccess && scratch.splits)
      error = launch(grad_pivot<T, dim, kPacked>, programs_of(a, part_rows<kPacked>(a), false), scratch.splits, threads,
                     shared, stream, a, scratch, logits);
    if (error == cudaSuccess)
      error = launch(grad_window<T, dim, kPacked>, programs_of(a, rows, false), 1, threads, shared, stream, a, scratch,
                     logits);
    return error;
  });
}

}  // namespace
}  // namespace cogview::cuda
