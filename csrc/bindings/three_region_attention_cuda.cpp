#include "../cuda/three_region_attention.h"

#include "attention_cuda.h"
#include "three_region_attention.h"

namespace cogview {
namespace {

using Optional = std::optional<Tensor>;

void check_kernels(const ThreeRegionAttention& a) {
  STD_TORCH_CHECK(a.dtype == Dtype::bf16 || a.dtype == Dtype::f16, "query: expected bfloat16 or float16");
  bool known = false;
  for (const int dim : cuda::kThreeRegionHeadDims) known |= a.head_dim == dim;
  STD_TORCH_CHECK(known, "query: expected a head_dim of 32, 64, 96 or 128, got ", a.head_dim);
  STD_TORCH_CHECK(a.seqlen_k <= cuda::kThreeRegionTokens, "key: too many tokens");
  STD_TORCH_CHECK(a.num_pivots <= cuda::kThreeRegionTokens, "pivots: too many");
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots, int64_t dims) {
  STD_TORCH_CHECK(q.is_cuda(), "query: expected on the device of key");
  check_same_cuda(k, q, "key"), check_same_cuda(v, q, "value"), check_same_cuda(pivots, q, "pivots");
  STD_TORCH_CHECK(q.dim() == dims && k.dim() == dims && v.dim() == dims, "query, key, value: expected ", dims,
                  " dimensions");
}

// Of packed sequences; what they hold is for the kernels not to trust.
Tensor checked_cu_seqlens(const Tensor& x, const Tensor& q) {
  const Tensor cu_seqlens = shaped_cu_seqlens(x, q);
  check_same_cuda(cu_seqlens, q, "cu_seqlens");
  STD_TORCH_CHECK(cu_seqlens.size(0) <= cuda::kThreeRegionSequences, "cu_seqlens: too many sequences");
  return cu_seqlens;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const ThreeRegionOptions& how) {
  check_inputs(q, k, v, how.pivots, how.cu_seqlens ? 3 : 4);
  return three_region_forward(packed(q), packed(k), packed(v), how, [&](const ThreeRegionAttention& a) {
    check_kernels(a);
    run_cuda(q, [&](cudaStream_t stream) { return cuda::three_region_attention_fwd(a, stream); });
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Optional& dout_in, const Optional& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const ThreeRegionOptions& how) {
  check_inputs(q, k, v, how.pivots, how.cu_seqlens ? 3 : 4);
  check_same_cuda(out, q, "out"), check_same_cuda(lse, q, "lse");
  if (dout_in) check_same_cuda(*dout_in, q, "dout");
  if (dlse) check_same_cuda(*dlse, q, "dlse");
  STD_TORCH_CHECK(out.dim() == q.dim(), "out: expected ", q.dim(), " dimensions");
  const Tensor dout = CudaAttention::readable(dout_in, out);
  return three_region_backward(
      dout, dlse, packed(q), packed(k), packed(v), packed(out), lse, how, [&](const ThreeRegionAttention& a) {
        check_kernels(a);
        cuda::ThreeRegionScratch scratch;
        const auto floats = [&](int64_t count) { return torch::stable::new_empty(q, {count}, ScalarType::Float); };
        const Tensor stats = floats(2 * a.batch * a.heads * a.seqlen_q);
        run_cuda(q, [&](cudaStream_t stream) {
          scratch.splits = cuda::three_region_splits(a);
          const int64_t rows = scratch.splits ? cuda::three_region_part_rows(a) : 0;
          const Tensor parts = floats(2 * scratch.splits * a.batch * a.kv_heads * rows * a.head_dim);
          scratch.stats = static_cast<float*>(stats.mutable_data_ptr());
          scratch.parts = static_cast<float*>(parts.mutable_data_ptr());
          return cuda::three_region_attention_bwd(a, scratch, stream);
        });
      });
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in,
                               int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = shaped_pivots(pivots_in, q, k);
  return forward(q, k, v, {pivots, nullptr, 0, block_size, window_blocks, pivot_bias, scale});
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Optional& dout, const Optional& dlse, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& pivots_in,
                                       int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = shaped_pivots(pivots_in, q, k);
  return backward(dout, dlse, q, k, v, out, lse, {pivots, nullptr, 0, block_size, window_blocks, pivot_bias, scale});
}

std::tuple<Tensor, Tensor> varlen_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in,
                                      const Tensor& cu_seqlens_in, int64_t max_seqlen, int64_t block_size,
                                      int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor cu_seqlens = checked_cu_seqlens(cu_seqlens_in, q);
  const Tensor pivots = shaped_packed_pivots(pivots_in, cu_seqlens);
  return forward(q, k, v, {pivots, &cu_seqlens, max_seqlen, block_size, window_blocks, pivot_bias, scale});
}

std::tuple<Tensor, Tensor, Tensor> varlen_bwd(const Optional& dout, const Optional& dlse, const Tensor& q,
                                              const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                              const Tensor& pivots_in, const Tensor& cu_seqlens_in, int64_t max_seqlen,
                                              int64_t block_size, int64_t window_blocks, double pivot_bias,
                                              double scale) {
  const Tensor cu_seqlens = checked_cu_seqlens(cu_seqlens_in, q);
  const Tensor pivots = shaped_packed_pivots(pivots_in, cu_seqlens);
  return backward(dout, dlse, q, k, v, out, lse,
                  {pivots, &cu_seqlens, max_seqlen, block_size, window_blocks, pivot_bias, scale});
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CUDA, m) {
  m.impl("three_region_attention_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("three_region_attention_bwd", TORCH_BOX(&cogview::bwd));
  m.impl("three_region_attention_varlen_fwd", TORCH_BOX(&cogview::varlen_fwd));
  m.impl("three_region_attention_varlen_bwd", TORCH_BOX(&cogview::varlen_bwd));
}
