// What the bindings of 2D local attention share: arguments as the kernels see them, and the calls. A Call has
//   forward(LocalAttention, query), backward(LocalAttention, query): run the kernels
//   readable(dout, out), packed(x): dout and other tensors as these can read them
//   check(tensor, query, name): what else they ask of tensors
#pragma once

#include "../local_attention_2d.h"
#include "attention.h"

namespace cogview {

using Optional = std::optional<Tensor>;
using Pair = std::vector<int64_t>;

inline Grid grid_of(const Pair& x, const char* name) {
  STD_TORCH_CHECK(x.size() == 2, name, ": expected two ints");
  return {x[0], x[1]};
}

// A window that sees the whole grid from every cell is as good as any larger one.
inline Grid whole_at_most(Grid window, Grid grid) {
  return {std::min(window.h, 2 * grid.h - 1), std::min(window.w, 2 * grid.w - 1)};
}

inline Window window_of(const Tensor& k, const Pair& grid, const Pair& kernel, const Pair& dilation, bool raster_causal,
                        bool shift) {
  const int64_t most = k.dim() == 4 ? k.size(2) : 0;  // so that products do not overflow
  Window w{grid_of(grid, "grid"), grid_of(kernel, "kernel_size"), grid_of(dilation, "dilation"), raster_causal, shift};
  STD_TORCH_CHECK(w.grid.h > 0 && w.grid.w > 0 && w.grid.h <= most && w.grid.w <= most,
                  "grid: expected sizes from 1 to the number of keys");
  STD_TORCH_CHECK(w.kernel.h > 0 && w.kernel.h % 2 && w.kernel.w > 0 && w.kernel.w % 2,
                  "kernel_size: expected odd sizes");
  STD_TORCH_CHECK(!(shift && raster_causal), "edge: shifted windows are not raster-causal");
  STD_TORCH_CHECK(w.dilation.h > 0 && w.dilation.w > 0, "dilation: expected sizes above 0");
  // beyond the grid they change nothing, phases stay few and windows countable
  w.kernel = whole_at_most(w.kernel, w.grid);
  w.dilation = {w.kernel.h == 1 ? 1 : std::min(w.dilation.h, w.grid.h),
                w.kernel.w == 1 ? 1 : std::min(w.dilation.w, w.grid.w)};
  STD_TORCH_CHECK(!shift || (w.kernel.h <= w.grid.h / w.dilation.h && w.kernel.w <= w.grid.w / w.dilation.w),
                  "kernel_size: expected a dilated window inside the grid");
  return w;
}

inline LocalAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Window& window) {
  LocalAttention a{};
  describe(&a, q, k, v, window.grid.h * window.grid.w, scale);
  a.window = window;
  return a;
}

inline Prefix prefix_of(const Attention& a, const Tensor& q, const Optional& k, const Optional& v, const Optional& mask,
                        double bias) {
  Prefix p{};
  STD_TORCH_CHECK(k.has_value() == v.has_value(), "prefix_value: expected with prefix_key");
  if (!k) return p;
  p.k = key_view(*k, "prefix_key", q, a.kv_heads, -1);
  p.len = k->size(2), p.bias = bias;
  p.v = key_view(*v, "prefix_value", q, a.kv_heads, p.len);
  if (!mask) return p;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == q.size(0) &&
                      mask->size(1) == p.len && mask->is_contiguous(),
                  "prefix_mask: expected a contiguous bool [B, P]");
  p.mask = static_cast<const bool*>(mask->const_data_ptr());
  return p;
}

inline Coarse coarse_of(const LocalAttention& a, const Tensor& q, const Optional& k, const Optional& v,
                        const Pair& grid, const Pair& kernel, double bias) {
  Coarse c{};
  STD_TORCH_CHECK(k.has_value() == v.has_value(), "coarse_value: expected with coarse_key");
  if (!k) return c;
  c.grid = grid_of(grid, "coarse_grid"), c.kernel = grid_of(kernel, "coarse_kernel_size"), c.bias = bias;
  STD_TORCH_CHECK(c.grid.h > 0 && c.grid.w > 0 && a.window.grid.h % c.grid.h == 0 && a.window.grid.w % c.grid.w == 0,
                  "coarse_grid: does not divide grid");
  STD_TORCH_CHECK(c.kernel.h > 0 && c.kernel.w > 0, "coarse_kernel_size: expected sizes above 0");
  c.kernel = whole_at_most(c.kernel, c.grid);
  c.k = key_view(*k, "coarse_key", q, a.kv_heads, c.grid.h * c.grid.w);
  c.v = key_view(*v, "coarse_value", q, a.kv_heads, c.grid.h * c.grid.w);
  return c;
}

template <class Call>
void check_keys(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& prefix_k, const Optional& prefix_v,
                const Optional& coarse_k, const Optional& coarse_v, const Optional& mask) {
  Call::check(q, q, "query"), Call::check(k, q, "key"), Call::check(v, q, "value");
  if (prefix_k) Call::check(*prefix_k, q, "prefix_key");
  if (prefix_v) Call::check(*prefix_v, q, "prefix_value");
  if (coarse_k) Call::check(*coarse_k, q, "coarse_key");
  if (coarse_v) Call::check(*coarse_v, q, "coarse_value");
  if (mask) Call::check_device(*mask, q, "prefix_mask");
}

template <class Call>
std::tuple<Tensor, Tensor> local_attention_2d_fwd(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                  const Optional& prefix_k_in, const Optional& prefix_v_in,
                                                  const Optional& coarse_k_in, const Optional& coarse_v_in,
                                                  const Optional& mask_in, Pair grid, Pair kernel, Pair dilation,
                                                  bool raster_causal, bool shift, double prefix_bias, Pair coarse_grid,
                                                  Pair coarse_kernel, double coarse_bias, double scale) {
  const Tensor &q = Call::packed(q_in), &k = Call::packed(k_in), &v = Call::packed(v_in);
  const Optional &prefix_k = Call::packed(prefix_k_in), &prefix_v = Call::packed(prefix_v_in);
  const Optional &coarse_k = Call::packed(coarse_k_in), &coarse_v = Call::packed(coarse_v_in);
  Tensor out = empty_rows(q), lse = stat_like(q);
  if (q.numel() == 0) return {out, lse};
  const Optional mask = as_contiguous(mask_in);
  check_keys<Call>(q, k, v, prefix_k, prefix_v, coarse_k, coarse_v, mask);
  LocalAttention a = describe(q, k, v, scale, window_of(k, grid, kernel, dilation, raster_causal, shift));
  a.prefix = prefix_of(a, q, prefix_k, prefix_v, mask, prefix_bias);
  a.coarse = coarse_of(a, q, coarse_k, coarse_v, coarse_grid, coarse_kernel, coarse_bias);
  STD_TORCH_CHECK(a.seqlen_q == k.size(2), "query: expected one token per cell");
  a.out = view(out), a.lse = lse.mutable_data_ptr();
  Call::forward(a, q);
  return {out, lse};
}

inline Tensor grad_like(const Optional& x, const Tensor& q) {
  return x ? empty_rows(*x) : torch::stable::new_empty(q, {0});
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_attention_2d_bwd(
    const Optional& dout_in, const Optional& dlse_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Optional& prefix_k_in, const Optional& prefix_v_in, const Optional& coarse_k_in, const Optional& coarse_v_in,
    const Optional& mask_in, const Tensor& out, const Tensor& lse_in, Pair grid, Pair kernel, Pair dilation,
    bool raster_causal, bool shift, double prefix_bias, Pair coarse_grid, Pair coarse_kernel, double coarse_bias,
    double scale) {
  const Tensor &q = Call::packed(q_in), &k = Call::packed(k_in), &v = Call::packed(v_in);
  const Optional &prefix_k = Call::packed(prefix_k_in), &prefix_v = Call::packed(prefix_v_in);
  const Optional &coarse_k = Call::packed(coarse_k_in), &coarse_v = Call::packed(coarse_v_in);
  Tensor dq = empty_rows(q), dk = empty_rows(k), dv = empty_rows(v);
  Tensor prefix_dk = grad_like(prefix_k, q), prefix_dv = grad_like(prefix_v, q);
  Tensor coarse_dk = grad_like(coarse_k, q), coarse_dv = grad_like(coarse_v, q);
  if (q.numel() == 0) {
    for (Tensor* g : {&dk, &dv, &prefix_dk, &prefix_dv, &coarse_dk, &coarse_dv}) torch::stable::zero_(*g);
    return {dq, dk, dv, prefix_dk, prefix_dv, coarse_dk, coarse_dv};
  }
  const Optional mask = as_contiguous(mask_in), dlse = as_contiguous(dlse_in);
  check_keys<Call>(q, k, v, prefix_k, prefix_v, coarse_k, coarse_v, mask);
  const Tensor lse = as_contiguous(lse_in), dout = Call::readable(dout_in, out);
  Call::check(out, q, "out"), Call::check(dout, q, "dout"), Call::check_device(lse, q, "lse");
  if (dlse) Call::check_device(*dlse, q, "dlse");
  LocalAttention a = describe(q, k, v, scale, window_of(k, grid, kernel, dilation, raster_causal, shift));
  a.prefix = prefix_of(a, q, prefix_k, prefix_v, mask, prefix_bias);
  a.coarse = coarse_of(a, q, coarse_k, coarse_v, coarse_grid, coarse_kernel, coarse_bias);
  STD_TORCH_CHECK(a.seqlen_q == k.size(2), "query: expected one token per cell");
  describe_backward(&a, q, out, lse, dout, dlse ? &*dlse : nullptr, dq, dk, dv);
  if (prefix_k) a.prefix.dk = view(prefix_dk), a.prefix.dv = view(prefix_dv);
  if (coarse_k) a.coarse.dk = view(coarse_dk), a.coarse.dv = view(coarse_dv);
  Call::backward(a, q);
  return {dq, dk, dv, prefix_dk, prefix_dv, coarse_dk, coarse_dv};
}

}  // namespace cogview
