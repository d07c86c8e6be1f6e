// Three-region block-sparse attention: forward, and a backward of three kernels one after another.
//
// Memory. Rows of 32 to 128 elements of 16 bits lie at any offsets that are multiples of 16 bytes. Pivots are read as
// they are, and rows only where they name one.
//   forward        reads q once, k and v rows that its queries see once a block of 128 queries; writes out and lse.
//   grad_query     reads q, out, dout, lse, dlse once, k and v as the forward; writes dq, and stats for the others.
//   grad_pivot     reads k and v of pivots once a split, q, dout and stats of the queries that see them once a block of
//                  128 pivots; writes sums in float32 to parts.
//   grad_window    reads k, v and parts once, q, dout and stats once a block of 128 keys; writes dk and dv.
#include "three_region_attention.h"

#include <algorithm>
#include <climits>
#include <type_traits>

#include "launch.cuh"
#include "pack.cuh"
#include "three_region_forward.cuh"
#include "three_region_grad_key.cuh"
#include "three_region_grad_query.cuh"
#include "three_region_hopper.h"

namespace cogview::cuda {
namespace {

template <class T, int D>
__global__ void __launch_bounds__(ForwardShape<D>::kThreads, ForwardShape<D>::kBlocks)
    forward(const __grid_constant__ ThreeRegionAttention a, const __grid_constant__ Logits logits,
            const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionForward<T, D>::run(a, logits, programs);)
}

template <class T, int D>
__global__ void __launch_bounds__(GradQueryShape<D>::kThreads, GradQueryShape<D>::kBlocks)
    grad_query(const __grid_constant__ ThreeRegionAttention a, float* stats, const __grid_constant__ Logits logits,
               const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionGradQuery<T, D>::run(a, stats, logits, programs);)
}

template <class T, int D>
__global__ void __launch_bounds__(KeyPassShape<D>::kThreads, KeyPassShape<D>::kBlocks)
    grad_pivot(const __grid_constant__ ThreeRegionAttention a, const __grid_constant__ ThreeRegionScratch scratch,
               const __grid_constant__ Logits logits, const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionGradKey<T, D>::pivots(a, scratch, logits, programs);)
}

template <class T, int D>
__global__ void __launch_bounds__(KeyPassShape<D>::kThreads, KeyPassShape<D>::kBlocks)
    grad_window(const __grid_constant__ ThreeRegionAttention a, const __grid_constant__ ThreeRegionScratch scratch,
                const __grid_constant__ Logits logits, const __grid_constant__ Programs programs) {
  COGVIEW_SM_80(ThreeRegionGradKey<T, D>::window(a, scratch, logits, programs);)
}

constexpr int64_t kSectionBytes = 1 << 25;  // keys and values of heads worked on at a time: half of an H100's L2 cache
constexpr int kMaxSplits = 8;
constexpr int kBlockRows = KeyPassShape<128>::kRows;  // of every pass, whatever head_dim
static_assert(kBlockRows == KeyPassShape<64>::kRows);

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
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
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

}  // namespace

int three_region_splits(const ThreeRegionAttention& a) {
  if (a.num_pivots == 0 || (a.seqlen_k - 1) / a.block_size < a.window_blocks) return 0;
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  const int64_t programs = ceil_div(a.num_pivots, kBlockRows) * a.batch * a.kv_heads;
  const int64_t tiles = ceil_div(a.seqlen_q, KeyPassShape<64>::kTile);
  return static_cast<int>(std::max<int64_t>(1, std::min({int64_t(kMaxSplits), tiles, 2 * processors / programs})));
}

cudaError_t three_region_attention_fwd(const ThreeRegionAttention& a, cudaStream_t stream) {
#ifdef COGVIEW_SM_90A
  int capability = 0;
  if (compute_capability(&capability) == cudaSuccess && capability == 90 && three_region_hopper_takes(a))
    return three_region_hopper_fwd(a, stream);
#endif
  return by_shape(a, [&](auto one, auto dim) {
    using Pass = ThreeRegionForward<decltype(one), dim>;
    const Programs programs = programs_of(a, a.seqlen_q, true);
    return launch(forward<decltype(one), dim>, programs, 1, Pass::Shape::kThreads, Pass::Layout::kBytes, stream, a,
                  Logits(a.scale, a.pivot_bias));
  });
}

cudaError_t three_region_attention_bwd(const ThreeRegionAttention& a, const ThreeRegionScratch& scratch,
                                       cudaStream_t stream) {
  return by_shape(a, [&](auto one, auto dim) {
    using T = decltype(one);
    using OfQueries = ThreeRegionGradQuery<T, dim>;
    using OfKeys = KeyPass<T, dim>;
    constexpr int threads = OfKeys::Shape::kThreads, shared = OfKeys::Layout::kBytes;
    const Logits logits(a.scale, a.pivot_bias);
    cudaError_t error = launch(grad_query<T, dim>, programs_of(a, a.seqlen_q, true), 1, OfQueries::Shape::kThreads,
                               OfQueries::Layout::kBytes, stream, a, scratch.stats, logits);
    if (error == cudaSuccess && scratch.splits)
      error = launch(grad_pivot<T, dim>, programs_of(a, a.num_pivots, false), scratch.splits, threads, shared, stream,
                     a, scratch, logits);
    if (error == cudaSuccess)
      error = launch(grad_window<T, dim>, programs_of(a, a.seqlen_k, false), 1, threads, shared, stream, a, scratch,
                     logits);
    return error;
  });
}

}  // namespace cogview::cuda
