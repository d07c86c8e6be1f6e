#include "three_region_attention.h"

#include "../cpu/three_region_attention.h"
#include "host.h"

namespace cogview {
namespace {

using Optional = std::optional<Tensor>;

// Kernels rely on what they hold: rows of indices of keys, strictly ascending, then -1.
Tensor checked_pivots(const Tensor& x, const Tensor& q, const Tensor& k) {
  const Tensor pivots = shaped_pivots(x, q, k);
  const Indices in = indices(pivots, "pivots");
  const int64_t count = pivots.size(1), keys = k.size(2);
  for (int64_t i = 0; i < pivots.numel(); ++i) {
    const bool padding = in[i] == -1, first = i % count == 0;
    STD_TORCH_CHECK(padding || (in[i] >= 0 && in[i] < keys && (first || (in[i - 1] >= 0 && in[i - 1] < in[i]))),
                    "pivots: expected indices of keys, strictly ascending, then -1");
  }
  return pivots;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in,
                               int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = checked_pivots(pivots_in, q, k);
  return three_region_forward(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale,
                              [&](const ThreeRegionAttention& a) { three_region_fwd(a, TorchHost(q)); });
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Optional& dout_in, const Optional& dlse, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& pivots_in,
                                       int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = checked_pivots(pivots_in, q, k), dout = readable(dout_in, out);
  return three_region_backward(dout, dlse, q, k, v, out, lse, pivots, block_size, window_blocks, pivot_bias, scale,
                               [&](const ThreeRegionAttention& a) { three_region_bwd(a, TorchHost(q)); });
}

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in, const Tensor& seqlens_in,
              int64_t block_size, int64_t window_blocks, double pivot_bias, double scale, const Optional& leftpad) {
  STD_TORCH_CHECK(!leftpad, "cache_leftpad: no CPU kernel yet");
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
