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
  static void forward(const LocalAttention& a, const Tensor& q) { local_fwd(a, TorchHost(q)); }
  static void backward(const LocalAttention& a, const Tensor& q) { local_bwd(a, TorchHost(q)); }
};

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& prefix_k, const Optional& prefix_v,
              const Optional& coarse_k, const Optional& coarse_v, const Optional& mask_in, const Tensor& seqlens_in,
              Pair grid, Pair kernel, Pair dilation, double prefix_bias, Pair coarse_grid, Pair coarse_kernel,
              double coarse_bias, double scale) {
  const Tensor seqlens = checked_seqlens(seqlens_in, q, k);
  Tensor out = empty_rows(q);
  if (q.numel() == 0) return out;
  const Optional mask = as_contiguous(mask_in);
  LocalAttention a = describe(q, k, v, scale, window_of(k, grid, kernel, dilation, true, false));
  a.prefix = prefix_of(a, q, prefix_k, prefix_v, mask, prefix_bias);
  a.coarse = coarse_of(a, q, coarse_k, coarse_v, coarse_grid, coarse_kernel, coarse_bias);
  describe_decode(&a, seqlens, out);
  local_decode(a, TorchHost(q));
  return out;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("local_attention_2d_fwd", TORCH_BOX(&cogview::local_attention_2d_fwd<cogview::CpuCall>));
  m.impl("local_attention_2d_bwd", TORCH_BOX(&cogview::local_attention_2d_bwd<cogview::CpuCall>));
  m.impl("local_attention_2d_decode", TORCH_BOX(&cogview::decode));
}
