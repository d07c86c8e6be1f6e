#include "three_region_attention.h"

#include "../cpu/three_region_attention.h"
#include "host.h"

namespace cogview {
namespace {

using Optional = std::optional<Tensor>;

// Kernels rely on what they hold: rows of indices below a limit, `keys(row)`, strictly ascending, then -1.
template <class Keys>
void check_pivots(const Tensor& pivots, Keys keys) {
  const Indices in = indices(pivots, "pivots");
  const int64_t count = pivots.size(1);
  for (int64_t row = 0; row < pivots.size(0); ++row) {
    const int64_t end = keys(row);
    for (int64_t i = row * count; i < (row + 1) * count; ++i) {
      const bool padding = in[i] == -1, first = i == row * count;
      STD_TORCH_CHECK(padding || (in[i] >= 0 && in[i] < end && (first || (in[i - 1] >= 0 && in[i - 1] < in[i]))),
                      "pivots: expected indices of keys, strictly ascending, then -1");
    }
  }
}
Tensor checked_pivots(const Tensor& x, const Tensor& q, const Tensor& k) {
  const Tensor pivots = shaped_pivots(x, q, k);
  check_pivots(pivots, [&](int64_t) { return k.size(2); });
  return pivots;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in,
                               int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = checked_pivots(pivots_in, q, k);
  return three_region_forward(q, k, v, {pivots, nullptr, 0, block_size, window_blocks, pivot_bias, scale},
                              [&](const ThreeRegionAttention& a) { three_region_fwd(a, TorchHost(q)); });
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Optional& dout_in, const Optional& dlse, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& pivots_in,
                                       int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = checked_pivots(pivots_in, q, k), dout = readable(dout_in, out);
  return three_region_backward(dout, dlse, q, k, v, out, lse,
                               {pivots, nullptr, 0, block_size, window_blocks, pivot_bias, scale},
                               [&](const ThreeRegionAttention& a) { three_region_bwd(a, TorchHost(q)); });
}

// Of packed sequences cu_seqlens and pivots, which the kernels rely on too.
struct Packed {
  Tensor cu_seqlens, pivots;

  Packed(const Tensor& cu_seqlens_in, const Tensor& pivots_in, const Tensor& q, int64_t max_seqlen)
      : cu_seqlens(shaped_cu_seqlens(cu_seqlens_in, q)), pivots(shaped_packed_pivots(pivots_in, cu_seqlens)) {
    const Indices ends = indices(cu_seqlens, "cu_seqlens");
    const int64_t count = pivots.size(0);
    bool right = ends[0] == 0 && ends[count] == q.size(0);
    for (int64_t n = 0; n < count; ++n) {
      right = right && ends[n] <= ends[n + 1];
      STD_TORCH_CHECK(!right || ends[n + 1] - ends[n] <= max_seqlen,
                      "max_seqlen: expected at least the longest length");
    }
    STD_TORCH_CHECK(right, "cu_seqlens: expected values that ascend from 0 to the number of tokens");
    check_pivots(pivots, [&](int64_t n) { return ends[n + 1] - ends[n]; });
  }
};

std::tuple<Tensor, Tensor> varlen_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots,
                                      const Tensor& cu_seqlens, int64_t max_seqlen, int64_t block_size,
                                      int64_t window_blocks, double pivot_bias, double scale) {
  const Packed in(cu_seqlens, pivots, q, max_seqlen);
  return three_region_forward(q, k, v,
                              {in.pivots, &in.cu_seqlens, max_seqlen, block_size, window_blocks, pivot_bias, scale},
                              [&](const ThreeRegionAttention& a) { three_region_fwd(a, TorchHost(q)); });
}

std::tuple<Tensor, Tensor, Tensor> varlen_bwd(const Optional& dout_in, const Optional& dlse, const Tensor& q,
                                              const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                              const Tensor& pivots, const Tensor& cu_seqlens, int64_t max_seqlen,
                                              int64_t block_size, int64_t window_blocks, double pivot_bias,
                                              double scale) {
  const Packed in(cu_seqlens, pivots, q, max_seqlen);
  return three_region_backward(readable(dout_in, out), dlse, q, k, v, out, lse,
                               {in.pivots, &in.cu_seqlens, max_seqlen, block_size, window_blocks, pivot_bias, scale},
                               [&](const ThreeRegionAttention& a) { three_region_bwd(a, TorchHost(q)); });
}

// Where sequences begin in a cache, before they end.
Tensor checked_leftpad(const Tensor& x, const Tensor& seqlens) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == seqlens.size(0), "cache_leftpad: shape does not match");
  const Tensor leftpad = as_contiguous(x);
  const Indices begin = indices(leftpad, "cache_leftpad"), end = indices(seqlens, "cache_seqlens");
  for (int64_t b = 0; b < leftpad.size(0); ++b)
    STD_TORCH_CHECK(begin[b] >= 0 && begin[b] <= end[b], "cache_leftpad: expected at most cache_seqlens");
  return leftpad;
}

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in,
                                  const Tensor& seqlens_in, int64_t block_size, int64_t window_blocks,
                                  double pivot_bias, double scale, const Optional& leftpad_in) {
  const Tensor pivots = checked_pivots(pivots_in, q, k), seqlens = checked_seqlens(seqlens_in, q, k, q.size(2));
  const Optional leftpad = leftpad_in ? Optional(checked_leftpad(*leftpad_in, seqlens)) : std::nullopt;
  Tensor out = empty_rows(q), lse = stat_like(q);
  if (q.numel() == 0) return {out, lse};
  ThreeRegionAttention a = describe(q, k, v, {pivots, nullptr, 0, block_size, window_blocks, pivot_bias, scale});
  describe_decode(&a, seqlens, out);
  a.lse = lse.mutable_data_ptr();
  if (leftpad) a.cache_leftpad = indices(*leftpad, "cache_leftpad");
  three_region_decode(a, TorchHost(q));
  return {out, lse};
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CPU, m) {
  m.impl("three_region_attention_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("three_region_attention_bwd", TORCH_BOX(&cogview::bwd));
  m.impl("three_region_attention_decode", TORCH_BOX(&cogview::decode));
  m.impl("three_region_attention_varlen_fwd", TORCH_BOX(&cogview::varlen_fwd));
  m.impl("three_region_attention_varlen_bwd", TORCH_BOX(&cogview::varlen_bwd));
}
