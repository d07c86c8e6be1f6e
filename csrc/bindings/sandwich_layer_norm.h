// Checks, allocation and arguments of the norms, the same on every device. A `Call` (a page per device) does the work:
// it holds the arguments `a`, `parameters` turns weights into what its kernels take, `find_peak` finds the largest
// |input| of the norm that is next, `forward` runs, and `backward` runs and sums over rows.
#pragma once

#include "../sandwich_layer_norm.h"

#include <array>
#include <cmath>
#include <utility>

#include "common.h"
#include "rows.h"

namespace cogview {

using Named = std::pair<const Tensor&, const char*>;

// In the statistics' dtype.
inline Tensor widened(const Tensor& weight, const Tensor& x) {
  const ScalarType type = stat_type(x);
  return as_contiguous(weight.scalar_type() == type ? weight : torch::stable::to(weight, type));
}

inline Tensor statistic(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), stat_type(x));
}

inline void* statistic_data(const Tensor& statistic, const Tensor& x, const char* name) {
  const bool ok = statistic.scalar_type() == stat_type(x) && statistic.is_contiguous() &&
                  statistic.numel() * x.size(-1) == x.numel();
  STD_TORCH_CHECK(ok, name, ": expected one statistic per row, contiguous");
  return const_cast<void*>(statistic.const_data_ptr());
}

inline Tensor gradient_rows(const Tensor& grad, const Tensor& like, const char* name) {
  check_same_shape(grad, like, name);
  STD_TORCH_CHECK(grad.scalar_type() == like.scalar_type(), name, ": dtype does not match");
  return rows_contiguous(grad);
}

template <class Args>
struct NormCall {
  Args a{};

  explicit NormCall(const Tensor& x) {
    a.dtype = a.residual_dtype = dtype_of(x, "input");
    a.cols = x.size(-1);
    STD_TORCH_CHECK(a.cols >= 1, "input: expected rows of at least one element");
    a.rows = x.numel() / a.cols;
  }

  // Of residual or h, beside branch.
  void residual(const Tensor& x, const char* name) {
    a.residual_dtype = dtype_of(x, name);
    const bool wider = a.residual_dtype == Dtype::f32 && (a.dtype == Dtype::bf16 || a.dtype == Dtype::f16);
    STD_TORCH_CHECK(wider || a.residual_dtype == a.dtype, name,
                    ": expected branch's dtype, or float32 beside bfloat16 or float16");
  }

  // `seed`, of the caller's, is read when the kernels run.
  void dropout(double p, const std::optional<Tensor>& seed) {
    STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout_p: expected a probability");
    STD_TORCH_CHECK(seed || p == 0, "seed: expected with dropout");
    const double threshold = std::nearbyint(p * 0x1p32);
    a.dropout = p > 0;
    if (seed) {
      const bool one = seed->scalar_type() == ScalarType::Long && seed->numel() == 1;
      STD_TORCH_CHECK(one, "seed: expected one int64");
      a.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    a.dropout_threshold = static_cast<uint32_t>(std::min(threshold, 0x1p32 - 1));
    a.dropout_scale = threshold < 0x1p32 ? 1 / (1 - p) : 0;
  }
};

inline void check_parameter(const Tensor& weight, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), name, ": expected [D]");
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                                  int64_t relax) {
  Call call(x);
  const auto parameters = call.template parameters<2>(x, {Named{weight, "weight"}, Named{bias, "bias"}});
  Tensor out = empty_rows(x), mean = statistic(x), rstd = statistic(x);
  auto& a = call.a;
  a.eps = eps;
  a.relax = static_cast<Relax>(relax);
  a.h = const_cast<void*>(x.const_data_ptr());
  a.h_rows = rows_of(x);
  a.pre = {parameters[0].const_data_ptr(), parameters[1].const_data_ptr(), mean.mutable_data_ptr(),
           rstd.mutable_data_ptr()};
  if (a.relax == Relax::tensor) call.find_peak(x);
  a.x = out.mutable_data_ptr();
  a.x_rows = rows_of(out);
  call.forward(x);
  return {out, mean, rstd};
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Call>
Six sandwich_fwd(const Tensor& branch, const Tensor& residual, const Tensor& post_weight, const Tensor& post_bias,
                 const Tensor& pre_weight, const Tensor& pre_bias, double eps, int64_t relax, double dropout_p,
                 const std::optional<Tensor>& seed) {
  Call call(branch);
  call.check_device(residual, branch, "residual");
  if (seed) call.check_device(*seed, branch, "seed");
  check_same_shape(residual, branch, "residual");
  call.residual(residual, "residual");
  const auto parameters =
      call.template parameters<4>(branch, {Named{post_weight, "post_weight"}, Named{post_bias, "post_bias"},
                                           Named{pre_weight, "pre_weight"}, Named{pre_bias, "pre_bias"}});
  Tensor h = empty_rows(residual), x = empty_rows(branch);
  Tensor post_mean = statistic(branch), post_rstd = statistic(branch);
  Tensor pre_mean = statistic(branch), pre_rstd = statistic(branch);
  auto& a = call.a;
  a.eps = eps;
  a.relax = static_cast<Relax>(relax);
  call.dropout(dropout_p, seed);
  a.branch = branch.const_data_ptr();
  a.branch_rows = rows_of(branch);
  a.residual = residual.const_data_ptr();
  a.residual_rows = rows_of(residual);
  a.h = h.mutable_data_ptr();
  a.h_rows = rows_of(h);
  a.x_rows = rows_of(x);
  a.post = {parameters[0].const_data_ptr(), parameters[1].const_data_ptr(), post_mean.mutable_data_ptr(),
            post_rstd.mutable_data_ptr()};
  a.pre = {parameters[2].const_data_ptr(), parameters[3].const_data_ptr(), pre_mean.mutable_data_ptr(),
           pre_rstd.mutable_data_ptr()};
  if (a.relax == Relax::tensor) {  // the whole of h must be known before x is
    call.find_peak(branch);
    call.forward(branch);
    a.branch = nullptr;
    call.find_peak(h);
  }
  a.x = x.mutable_data_ptr();
  call.forward(branch);
  return {h, x, post_mean, post_rstd, pre_mean, pre_rstd};
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dout_in, const Tensor& x, const Tensor& weight,
                                                  const Tensor& mean, const Tensor& rstd) {
  Call call(x);
  for (const auto& [tensor, name] : {Named{dout_in, "dout"}, Named{mean, "mean"}, Named{rstd, "rstd"}})
    call.check_device(tensor, x, name);
  const Tensor dout = gradient_rows(dout_in, x, "dout");
  const auto parameters = call.template parameters<1>(x, {Named{weight, "weight"}});
  Tensor grad = empty_rows(x);
  auto& a = call.a;
  a.pre.weight = parameters[0].const_data_ptr();
  a.pre.mean = statistic_data(mean, x, "mean");
  a.pre.rstd = statistic_data(rstd, x, "rstd");
  a.h = const_cast<void*>(x.const_data_ptr());
  a.h_rows = rows_of(x);
  a.dx = dout.const_data_ptr();
  a.dx_rows = rows_of(dout);
  a.dresidual = grad.mutable_data_ptr();
  a.dresidual_rows = rows_of(grad);
  const auto [dweight, dbias] = call.template backward<1>(x, {{{a.pre, weight}}})[0];
  return {grad, dweight, dbias};
}

template <class Call>
Six sandwich_bwd(const std::optional<Tensor>& dh_in, const std::optional<Tensor>& dx_in, const Tensor& branch,
                 const Tensor& h, const Tensor& post_weight, const Tensor& pre_weight, const Tensor& post_mean,
                 const Tensor& post_rstd, const Tensor& pre_mean, const Tensor& pre_rstd, double dropout_p,
                 const std::optional<Tensor>& seed) {
  Call call(branch);
  if (seed) call.check_device(*seed, branch, "seed");
  for (const auto& [tensor, name] : {Named{h, "h"}, Named{post_mean, "post_mean"}, Named{post_rstd, "post_rstd"},
                                     Named{pre_mean, "pre_mean"}, Named{pre_rstd, "pre_rstd"}})
    call.check_device(tensor, branch, name);
  check_same_shape(h, branch, "h");
  call.residual(h, "h");
  const auto parameters =
      call.template parameters<2>(branch, {Named{post_weight, "post_weight"}, Named{pre_weight, "pre_weight"}});
  Tensor dbranch = empty_rows(branch), dresidual = empty_rows(h);
  auto& a = call.a;
  call.dropout(dropout_p, seed);
  a.post.weight = parameters[0].const_data_ptr();
  a.post.mean = statistic_data(post_mean, branch, "post_mean");
  a.post.rstd = statistic_data(post_rstd, branch, "post_rstd");
  a.pre.weight = parameters[1].const_data_ptr();
  a.pre.mean = statistic_data(pre_mean, branch, "pre_mean");
  a.pre.rstd = statistic_data(pre_rstd, branch, "pre_rstd");
  a.branch = branch.const_data_ptr();
  a.branch_rows = rows_of(branch);
  a.h = const_cast<void*>(h.const_data_ptr());
  a.h_rows = rows_of(h);
  std::optional<Tensor> dh, dx;
  if (dh_in) {
    call.check_device(*dh_in, branch, "dh");
    dh = gradient_rows(*dh_in, h, "dh");
    a.dh = dh->const_data_ptr();
    a.dh_rows = rows_of(*dh);
  }
  if (dx_in) {
    call.check_device(*dx_in, branch, "dx");
    dx = gradient_rows(*dx_in, branch, "dx");
    a.dx = dx->const_data_ptr();
    a.dx_rows = rows_of(*dx);
  }
  a.dresidual = dresidual.mutable_data_ptr();
  a.dresidual_rows = rows_of(dresidual);
  a.dbranch = dbranch.mutable_data_ptr();
  a.dbranch_rows = rows_of(dbranch);
  const auto [post, pre] = call.template backward<2>(branch, {{{a.post, post_weight}, {a.pre, pre_weight}}});
  return {dbranch, dresidual, post[0], post[1], pre[0], pre[1]};
}

}  // namespace cogview
