// What the bindings of 2D local attention share: arguments as the kernels see them, and the calls. A Call has
//   forward(LocalAttention, query), backward(LocalAttention, query): run the kernels
//   readable(dout, out), packed(x): dout and other tensors as these can read them
//   check(tensor, query, name): what else they ask of tensors
//   check_options(LocalAttention): what they do not have
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

// `cells`: tokens of the grid.
inline Window window_of(const Tensor& cells, const Pair& grid, const Pair& kernel, const Pair& dilation,
                        bool raster_causal, bool shift) {
  const int64_t most = cells.dim() == 4 ? cells.size(2) : 0;  // so that products do not overflow
  Window w{grid_of(grid, "grid"), grid_of(kernel, "kernel_size"), grid_of(dilation, "dilation"), raster_causal, shift};
  STD_TORCH_CHECK(w.grid.h > 0 && w.grid.w > 0 && w.grid.h <= most && w.grid.w <= most && w.grid.h * w.grid.w == most,
                  "grid: expected a token for each cell");
  if (w.kernel.h == 0 && w.kernel.w == 0) return {w.grid, {}, {1, 1}, false, false};
  STD_TORCH_CHECK(w.kernel.h > 0 && w.kernel.w > 0, "kernel_size: expected sizes above 0");
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

// Of the tensors; some may be there only in others' absence.
struct __attribute__((visibility("hidden"))) Sets {  // as torch's tensors are
  const Optional &k, &v, &prefix_k, &prefix_v, &coarse_k, &coarse_v, &bias, &prefix_mask, &key_mask;
};

inline const bool* mask_of(const Tensor& x, const Tensor& q, int64_t keys, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Bool && x.dim() == 2 && x.size(0) == q.size(0) && x.size(1) == keys &&
                      x.is_contiguous(),
                  name, ": expected a contiguous bool [B, keys]");
  return static_cast<const bool*>(x.const_data_ptr());
}

inline Prefix prefix_of(const Attention& a, const Tensor& q, const Sets& sets, double bias) {
  Prefix p{};
  STD_TORCH_CHECK(sets.prefix_k.has_value() == sets.prefix_v.has_value(), "prefix_value: expected with prefix_key");
  if (!sets.prefix_k) return p;
  p.k = key_view(*sets.prefix_k, "prefix_key", q, a.kv_heads, -1);
  p.len = sets.prefix_k->size(2), p.bias = bias;
  p.v = key_view(*sets.prefix_v, "prefix_value", q, a.kv_heads, p.len);
  if (sets.prefix_mask) p.mask = mask_of(*sets.prefix_mask, q, p.len, "prefix_mask");
  return p;
}

// `kernel`: as it was asked for.
inline Bias bias_of(const Tensor& x, const Tensor& q, const Pair& kernel) {
  const auto fits = [](int64_t size, int64_t k) { return size % 2 && size / 2 == k - 1; };
  STD_TORCH_CHECK(x.scalar_type() == stat_type(q) && x.is_contiguous() && x.dim() == 3 && x.size(0) == q.size(1) &&
                      fits(x.size(1), kernel[0]) && fits(x.size(2), kernel[1]),
                  "bias: expected a contiguous [heads, 2 * kernel_size - 1] of float32, or float64 for float64");
  return {x.const_data_ptr(), nullptr, {x.size(1), x.size(2)}};
}

inline Coarse coarse_of(const LocalAttention& a, const Tensor& q, const Sets& sets, const Pair& grid,
                        const Pair& kernel, double bias) {
  Coarse c{};
  const Optional &k = sets.coarse_k, &v = sets.coarse_v;
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

// Everything but the outputs.
struct Numbers {
  const Pair &grid, &kernel, &dilation;
  bool raster_causal, shift;
  double prefix_bias;
  const Pair &coarse_grid, &coarse_kernel;
  double coarse_bias, scale;
};
inline LocalAttention describe(const Tensor& q, const Sets& sets, const Numbers& n) {
  LocalAttention a{};
  const Optional& keys = sets.k ? sets.k : sets.coarse_k ? sets.coarse_k : sets.prefix_k;
  STD_TORCH_CHECK(keys && keys->dim() == 4, "key: expected keys of some set");
  a.window = window_of(sets.k ? *sets.k : q, n.grid, n.kernel, n.dilation, n.raster_causal, n.shift);
  STD_TORCH_CHECK(sets.k.has_value() == (a.window.kernel.h > 0) && sets.v.has_value() == sets.k.has_value(),
                  "key: expected with value and a kernel_size");
  STD_TORCH_CHECK(sets.k || (!sets.bias && !sets.key_mask), "key: expected with bias and key_mask");
  if (sets.k)
    describe(&a, q, *sets.k, *sets.v, sets.k->size(2), n.scale);
  else
    describe(&a, q, keys->size(1), n.scale);
  a.prefix = prefix_of(a, q, sets, n.prefix_bias);
  a.coarse = coarse_of(a, q, sets, n.coarse_grid, n.coarse_kernel, n.coarse_bias);
  if (sets.bias) a.bias = bias_of(*sets.bias, q, n.kernel);
  if (sets.key_mask) a.key_mask = mask_of(*sets.key_mask, q, sets.k->size(2), "key_mask");
  return a;
}

template <class Call>
void check_keys(const Tensor& q, const Sets& sets) {
  const auto check = [&](const Optional& x, const char* name) {
    if (x) Call::check(*x, q, name);
  };
  Call::check(q, q, "query"), check(sets.k, "key"), check(sets.v, "value");
  check(sets.prefix_k, "prefix_key"), check(sets.prefix_v, "prefix_value");
  check(sets.coarse_k, "coarse_key"), check(sets.coarse_v, "coarse_value");
  if (sets.bias) Call::check_device(*sets.bias, q, "bias");
  if (sets.prefix_mask) Call::check_device(*sets.prefix_mask, q, "prefix_mask");
  if (sets.key_mask) Call::check_device(*sets.key_mask, q, "key_mask");
}

template <class Call>
std::tuple<Tensor, Tensor> local_attention_2d_fwd(const Tensor& q_in, const Optional& k_in, const Optional& v_in,
                                                  const Optional& prefix_k_in, const Optional& prefix_v_in,
                                                  const Optional& coarse_k_in, const Optional& coarse_v_in,
                                                  const Optional& bias_in, const Optional& mask_in,
                                                  const Optional& key_mask_in, Pair grid, Pair kernel, Pair dilation,
                                                  bool raster_causal, bool shift, double prefix_bias, Pair coarse_grid,
                                                  Pair coarse_kernel, double coarse_bias, double scale) {
  const Tensor& q = Call::packed(q_in);
  const Optional &k = Call::packed(k_in), &v = Call::packed(v_in);
  const Optional &prefix_k = Call::packed(prefix_k_in), &prefix_v = Call::packed(prefix_v_in);
  const Optional &coarse_k = Call::packed(coarse_k_in), &coarse_v = Call::packed(coarse_v_in);
  Tensor out = empty_rows(q), lse = stat_like(q);
  if (q.numel() == 0) return {out, lse};
  const Optional bias = as_contiguous(bias_in), mask = as_contiguous(mask_in), key_mask = as_contiguous(key_mask_in);
  const Sets sets{k, v, prefix_k, prefix_v, coarse_k, coarse_v, bias, mask, key_mask};
  check_keys<Call>(q, sets);
  LocalAttention a = describe(
      q, sets,
      {grid, kernel, dilation, raster_causal, shift, prefix_bias, coarse_grid, coarse_kernel, coarse_bias, scale});
  STD_TORCH_CHECK(a.seqlen_q == a.window.grid.h * a.window.grid.w, "query: expected one token per cell");
  Call::check_options(a);
  a.out = view(out), a.lse = lse.mutable_data_ptr();
  Call::forward(a, q);
  return {out, lse};
}

inline Tensor grad_like(const Optional& x, const Tensor& q) {
  return x ? empty_rows(*x) : torch::stable::new_empty(q, {0});
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_attention_2d_bwd(
    const Optional& dout_in, const Optional& dlse_in, const Tensor& q_in, const Optional& k_in, const Optional& v_in,
    const Optional& prefix_k_in, const Optional& prefix_v_in, const Optional& coarse_k_in, const Optional& coarse_v_in,
    const Optional& bias_in, const Optional& mask_in, const Optional& key_mask_in, const Tensor& out,
    const Tensor& lse_in, Pair grid, Pair kernel, Pair dilation, bool raster_causal, bool shift, double prefix_bias,
    Pair coarse_grid, Pair coarse_kernel, double coarse_bias, double scale) {
  const Tensor& q = Call::packed(q_in);
  const Optional &k = Call::packed(k_in), &v = Call::packed(v_in);
  const Optional &prefix_k = Call::packed(prefix_k_in), &prefix_v = Call::packed(prefix_v_in);
  const Optional &coarse_k = Call::packed(coarse_k_in), &coarse_v = Call::packed(coarse_v_in);
  const Optional bias = as_contiguous(bias_in);
  Tensor dq = empty_rows(q), dk = grad_like(k, q), dv = grad_like(v, q);
  Tensor prefix_dk = grad_like(prefix_k, q), prefix_dv = grad_like(prefix_v, q);
  Tensor coarse_dk = grad_like(coarse_k, q), coarse_dv = grad_like(coarse_v, q), dbias = grad_like(bias, q);
  if (q.numel() == 0) {
    for (Tensor* g : {&dk, &dv, &prefix_dk, &prefix_dv, &coarse_dk, &coarse_dv, &dbias}) torch::stable::zero_(*g);
    return {dq, dk, dv, prefix_dk, prefix_dv, coarse_dk, coarse_dv, dbias};
  }
  const Optional mask = as_contiguous(mask_in), key_mask = as_contiguous(key_mask_in), dlse = as_contiguous(dlse_in);
  const Sets sets{k, v, prefix_k, prefix_v, coarse_k, coarse_v, bias, mask, key_mask};
  check_keys<Call>(q, sets);
  const Tensor lse = as_contiguous(lse_in), dout = Call::readable(dout_in, out);
  Call::check(out, q, "out"), Call::check(dout, q, "dout"), Call::check_device(lse, q, "lse");
  if (dlse) Call::check_device(*dlse, q, "dlse");
  LocalAttention a = describe(
      q, sets,
      {grid, kernel, dilation, raster_causal, shift, prefix_bias, coarse_grid, coarse_kernel, coarse_bias, scale});
  STD_TORCH_CHECK(a.seqlen_q == a.window.grid.h * a.window.grid.w, "query: expected one token per cell");
  Call::check_options(a);
  describe_backward(&a, q, out, lse, dout, dlse ? &*dlse : nullptr, dq, dk, dv);
  if (prefix_k) a.prefix.dk = view(prefix_dk), a.prefix.dv = view(prefix_dv);
  if (coarse_k) a.coarse.dk = view(coarse_dk), a.coarse.dv = view(coarse_dv);
  if (bias) a.bias.grad = dbias.mutable_data_ptr();
  Call::backward(a, q);
  return {dq, dk, dv, prefix_dk, prefix_dv, coarse_dk, coarse_dv, dbias};
}

}  // namespace cogview
