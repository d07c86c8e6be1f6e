#include "local_attention_2d.h"

#include "../cpu/local_attention_2d.h"

namespace cogview {
namespace {

struct CpuCall {
  static void check(const Tensor&, const Tensor&, const char*) {}
  static void check_device(const Tensor&, const Tensor&, const char*) {}
  static Tensor readable(const Optional& dout, const Tensor& out) { return cogview::readable(dout, out); }
  template <class X>
  static const X& packed(const X& x) {
    return x;
  }
  static void check_options(const LocalAttention&) {}
  static void forward(const LocalAttention& a, const Tensor& q) { local_fwd(a, TorchHost(q)); }
  static void backward(const LocalAttention& a, const Tensor& q) { local_bwd(a, TorchHost(q)); }
};

// Cells, each at most once.
Tensor checked_index(const Tensor& x, const Tensor& q, int64_t cells) {
  STD_TORCH_CHECK(q.dim() == 4 && x.dim() == 2 && x.size(0) == q.size(0) && x.size(1) == q.size(2),
                  "query_index: shape does not match");
  const Tensor index = as_contiguous(x);
  const Indices in = indices(index, "query_index");
  std::vector<int64_t> last(cells, -1);  // sample that a cell was last seen in
  for (int64_t n = 0; n < index.numel(); ++n) {
    const int64_t b = n / x.size(1);
    STD_TORCH_CHECK(in[n] >= 0 && in[n] < cells && last[in[n]] != b, "query_index: expected cells, each at most once");
    last[in[n]] = b;
  }
  return index;
}

Tensor decode(const Tensor& q, const Tensor& k_in, const Tensor& v_in, const Optional& prefix_k,
              const Optional& prefix_v, const Optional& coarse_k, const Optional& coarse_v, const Optional& bias_in,
              const Optional& mask_in, const Optional& key_mask_in, const Tensor& seqlens_in, const Optional& index_in,
              Pair grid, Pair kernel, Pair dilation, bool raster_causal, bool shift, double prefix_bias,
              Pair coarse_grid, Pair coarse_kernel, double coarse_bias, double scale) {
  const Tensor seqlens = checked_seqlens(seqlens_in, q, k_in, index_in ? 0 : q.size(2));
  const Optional index = index_in ? Optional(checked_index(*index_in, q, k_in.size(2))) : std::nullopt;
  Tensor out = empty_rows(q);
  if (q.numel() == 0) return out;
  const Optional k = k_in, v = v_in, bias = as_contiguous(bias_in), mask = as_contiguous(mask_in);
  const Optional key_mask = as_contiguous(key_mask_in);
  LocalAttention a = describe(
      q, {k, v, prefix_k, prefix_v, coarse_k, coarse_v, bias, mask, key_mask},
      {grid, kernel, dilation, raster_causal, shift, prefix_bias, coarse_grid, coarse_kernel, coarse_bias, scale});
  describe_decode(&a, seqlens, out);
  if (index) a.query_index = indices(*index, "query_index");
  local_decode(a, TorchHost(q));
  return out;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CPU, m) {
  m.impl("local_attention_2d_fwd", TORCH_BOX(&cogview::local_attention_2d_fwd<cogview::CpuCall>));
  m.impl("local_attention_2d_bwd", TORCH_BOX(&cogview::local_attention_2d_bwd<cogview::CpuCall>));
  m.impl("local_attention_2d_decode", TORCH_BOX(&cogview::decode));
}
