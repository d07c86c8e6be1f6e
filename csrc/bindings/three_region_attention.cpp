#include "../cpu/three_region_attention.h"

#include "attention.h"

namespace cogview {
namespace {

using Optional = std::optional<Tensor>;

// Kernels rely on what they hold: rows of indices of keys, strictly ascending, then -1.
Tensor checked_pivots(const Tensor& x, const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && x.dim() == 2 && x.size(0) == q.size(0),
                  "pivots: shape does not match");
  const Tensor pivots = as_contiguous(x);
  const Indices in = indices(pivots, "pivots");
  const int64_t count = pivots.size(1), keys = k.size(2);
  for (int64_t i = 0; i < pivots.numel(); ++i) {
    const bool padding = in[i] == -1, first = i % count == 0;
    STD_TORCH_CHECK(padding || (in[i] >= 0 && in[i] < keys && (first || (in[i - 1] >= 0 && in[i - 1] < in[i]))),
                    "pivots: expected indices of keys, strictly ascending, then -1");
  }
  return pivots;
}

ThreeRegionAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots,
                              int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  ThreeRegionAttention a{};
  describe(&a, q, k, v, -1, scale);
  a.seqlen_k = k.size(2), a.num_pivots = pivots.size(1), a.pivot_bias = pivot_bias;
  STD_TORCH_CHECK(block_size >= 1 && window_blocks >= 1, "block_size and window_blocks: expected at least 1");
  // beyond the sequence they change nothing, and products of them stay in range
  a.block_size = std::min(block_size, a.seqlen_k + 1), a.window_blocks = std::min(window_blocks, a.seqlen_k + 1);
  a.pivots = indices(pivots, "pivots");
  return a;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in,
                               int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = checked_pivots(pivots_in, q, k);
  Tensor out = empty_rows(q), lse = stat_like(q);
  if (q.numel() == 0) return {out, lse};
  ThreeRegionAttention a = describe(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale);
  STD_TORCH_CHECK(a.seqlen_q == a.seqlen_k, "key: expected as many tokens as query");
  a.out = view(out), a.lse = lse.mutable_data_ptr();
  three_region_fwd(a, TorchHost(q));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Optional& dout_in, const Optional& dlse_in, const Tensor& q,
                                       const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse_in,
                                       const Tensor& pivots_in, int64_t block_size, int64_t window_blocks,
                                       double pivot_bias, double scale) {
  Tensor dq = empty_rows(q), dk = empty_rows(k), dv = empty_rows(v);
  if (q.numel() == 0) {
    torch::stable::zero_(dk), torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  const Tensor pivots = checked_pivots(pivots_in, q, k), lse = as_contiguous(lse_in);
  const Tensor dout = readable(dout_in, out);
  const Optional dlse = as_contiguous(dlse_in);
  ThreeRegionAttention a = describe(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale);
  STD_TORCH_CHECK(a.seqlen_q == a.seqlen_k, "key: expected as many tokens as query");
  describe_backward(&a, q, out, lse, dout, dlse ? &*dlse : nullptr, dq, dk, dv);
  three_region_bwd(a, TorchHost(q));
  return {dq, dk, dv};
}

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in, const Tensor& seqlens_in,
              int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = checked_pivots(pivots_in, q, k), seqlens = checked_seqlens(seqlens_in, q, k);
  Tensor out = empty_rows(q);
  if (q.numel() == 0) return out;
  ThreeRegionAttention a = describe(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale);
  describe_decode(&a, seqlens, out);
  three_region_decode(a, TorchHost(q));
  return out;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("three_region_attention_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("three_region_attention_bwd", TORCH_BOX(&cogview::bwd));
  m.impl("three_region_attention_decode", TORCH_BOX(&cogview::decode));
}
