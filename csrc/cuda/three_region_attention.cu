// Three-region block-sparse attention: forward, and a backward of three kernels one after another.
//
// Memory. Rows of 32 to 128 elements of 16 bits lie at any offsets that are multiples of 16 bytes. Pivots are read as
// they are, and rows only where they name one.
//   forward        reads q once, k and v rows that its queries see once a block of 128 queries; writes out and lse.
//   grad_query     reads q, out, dout, lse, dlse once, k and v as the forward; writes dq, and stats for the others.
//   grad_pivot     reads k and v of pivots once a split, q, dout and stats of the queries that see them once a block of
//                  128 pivots; writes sums in float32 to parts.
//   grad_window    reads k, v and parts once, q, dout and stats once a block of 128 keys; writes dk and dv.
// Packed sequences are the same, each with blocks of its own: three_region_place.cuh.
#include "three_region_attention.h"

#include "three_region_hopper.h"
#include "three_region_launch.cuh"

namespace cogview::cuda {
namespace {

// Packed sequences as the kernels see them: samples a token apart.
ThreeRegionAttention packed(ThreeRegionAttention a) {
  for (Tensor4* x : {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv}) x->stride[0] = x->stride[2];
  a.max_seqlen = std::max<int64_t>(1, std::min(a.max_seqlen, a.seqlen_k));
  return a;
}

}  // namespace

int64_t three_region_part_rows(const ThreeRegionAttention& a) {
  return a.cu_seqlens.data ? part_rows<true>(a) : part_rows<false>(a);
}

int three_region_splits(const ThreeRegionAttention& a) {
  const int64_t longest = a.cu_seqlens.data ? std::min(a.max_seqlen, a.seqlen_k) : a.seqlen_k;
  const int64_t rows = three_region_part_rows(a);
  if (rows == 0 || (longest - 1) / a.block_size < a.window_blocks) return 0;
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  const int64_t programs = ceil_div(rows, kBlockRows) * a.batch * a.kv_heads;
  const int64_t tiles = ceil_div(a.seqlen_q, KeyPassShape<64>::kTile);
  return static_cast<int>(std::max<int64_t>(1, std::min({int64_t(kMaxSplits), tiles, 2 * processors / programs})));
}

cudaError_t three_region_attention_fwd(const ThreeRegionAttention& a, cudaStream_t stream) {
  if (a.cu_seqlens.data && !a.sequences) return cudaSuccess;
  const ThreeRegionAttention problem = a.cu_seqlens.data ? packed(a) : a;
#ifdef COGVIEW_SM_90A
  int capability = 0;
  if (compute_capability(&capability) == cudaSuccess && capability == 90 && three_region_hopper_takes(problem))
    return three_region_hopper_fwd(problem, stream);
#endif
  return a.cu_seqlens.data ? three_region_varlen_fwd(problem, stream) : run_fwd<false>(problem, stream);
}

cudaError_t three_region_attention_bwd(const ThreeRegionAttention& a, const ThreeRegionScratch& scratch,
                                       cudaStream_t stream) {
  if (a.cu_seqlens.data) return a.sequences ? three_region_varlen_bwd(packed(a), scratch, stream) : cudaSuccess;
  return run_bwd<false>(a, scratch, stream);
}

}  // namespace cogview::cuda
