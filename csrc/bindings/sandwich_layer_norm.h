// Checks, allocation and arguments of the norms, the same for both kinds and on every device. A `Call` (a page per
// device) does the work: it holds the arguments `a`, `parameters` turns weights into what its kernels take, `find_peak`
// finds the largest |input| of the norm that is next, `forward` runs, and `backward` runs and sums over rows.
#pragma once

#include "../sandwich_layer_norm.h"

#include <array>
#include <climits>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"
#include "rows.h"

namespace cogview {

using Maybe = std::optional<Tensor>;

using Named = std::pair<const Maybe&, const char*>;
using Parameter = std::tuple<const Maybe&, const char*, double>;  // a name and what is to be added

// In the statistics' dtype.
inline Tensor widened(const Tensor& weight, const Tensor& x) {
  const ScalarType type = stat_type(x);
  return as_contiguous(weight.scalar_type() == type ? weight : torch::stable::to(weight, type));
}

inline Tensor statistic(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), stat_type(x));
}

// What is not there is an empty tensor.
inline Tensor absent(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

inline void* data_of(const Maybe& x) { return x ? const_cast<void*>(x->const_data_ptr()) : nullptr; }

inline Tensor gradient_rows(const Tensor& grad, const Tensor& like, const char* name) {
  check_same_shape(grad, like, name);
  return rows_contiguous(grad);
}

template <class Args>
struct NormCall {
  Args a{};
  std::vector<Tensor> kept;  // what was copied for the kernels

  NormCall(const Tensor& x, bool rms) {
    a.rms = rms;
    a.dtype = a.residual_dtype = dtype_of(x, "input");
    a.cols = x.size(-1);
    STD_TORCH_CHECK(a.cols >= 1, "input: expected rows of at least one element");
    a.rows = a.rows_per_seed = x.numel() / a.cols;
    a.branch_scale = 1;
  }

  void norm(double eps, int64_t relax, double weight_offset, bool round_before_weight) {
    STD_TORCH_CHECK(!a.rms || relax == 0, "relax: expected 0 of RMSNorm");
    a.eps = eps;
    a.relax = static_cast<Relax>(relax);
    a.weight_offset = weight_offset;
    a.round_before_weight = round_before_weight;
  }

  // Of residual or h, beside branch.
  void residual(const Tensor& x, const char* name) {
    a.residual_dtype = dtype_of(x, name);
    const bool wider = a.residual_dtype == Dtype::f32 && (a.dtype == Dtype::bf16 || a.dtype == Dtype::f16);
    STD_TORCH_CHECK(wider || a.residual_dtype == a.dtype, name,
                    ": expected branch's dtype, or float32 beside bfloat16 or float16");
  }

  // Numbers of the rows of x, in any layout: a shard of them may be a slice.
  void* of_rows(const Maybe& numbers, const Tensor& x, const char* name) {
    if (!numbers) return nullptr;
    const bool ok = numbers->scalar_type() == stat_type(x) && numbers->numel() * x.size(-1) == x.numel();
    STD_TORCH_CHECK(ok, name, ": expected one statistic per row");
    kept.push_back(as_contiguous(*numbers));
    return const_cast<void*>(kept.back().const_data_ptr());
  }

  // `seed`, of the caller's, is read when the kernels run: one, or one for each sample of x.
  void dropout(double p, bool after_norm, const Maybe& seed, const Tensor& x) {
    STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout_p: expected a probability");
    STD_TORCH_CHECK(seed || p == 0, "seed: expected with dropout");
    const double threshold = std::nearbyint(p * 0x1p32);
    a.dropout = p > 0;
    a.dropout_after_norm = a.dropout && after_norm && a.post.weight;
    if (seed) {
      const bool one = seed->numel() == 1, each = x.dim() > 1 && seed->dim() == 1 && seed->size(0) == x.size(0);
      STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && (one || each),
                      "seed: expected one int64, or one for each sample");
      STD_TORCH_CHECK(seed->numel() <= INT_MAX, "seed: expected up to 2**31 - 1");
      kept.push_back(as_contiguous(*seed));
      a.seed = static_cast<const int64_t*>(kept.back().const_data_ptr());
      a.rows_per_seed = a.rows / std::max<int64_t>(seed->numel(), 1);
    }
    a.dropout_threshold = static_cast<uint32_t>(std::min(threshold, 0x1p32 - 1));
    a.dropout_scale = threshold < 0x1p32 ? 1 / (1 - p) : 0;
  }
};

inline void check_parameter(const Tensor& weight, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), name, ": expected [D]");
}

// A weight has a bias if and only if this is LayerNorm.
template <class Call>
void check_bias(const Call& call, const Maybe& weight, const Maybe& bias, const char* name) {
  STD_TORCH_CHECK(bool(bias) == (weight && !call.a.rms), name, ": expected with a weight of LayerNorm, and only there");
}

// New mean and rstd of the rows of x, written by `norm` if it is there.
inline std::array<Tensor, 2> statistics(const Tensor& x, bool rms, Norm& norm) {
  const bool there = norm.weight;
  Tensor mean = there && !rms ? statistic(x) : absent(x), rstd = there ? statistic(x) : absent(x);
  if (there && !rms) norm.mean = mean.mutable_data_ptr();
  if (there) norm.rstd = rstd.mutable_data_ptr();
  return {mean, rstd};
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const Tensor& weight, const Maybe& bias, double eps,
                                            int64_t relax, double weight_offset, bool round_before_weight) {
  Call call(x);
  const Maybe some_weight(weight);
  check_bias(call, some_weight, bias, "bias");
  call.norm(eps, relax, weight_offset, round_before_weight);
  const auto parameters =
      call.template parameters<2>(x, {Parameter{some_weight, "weight", weight_offset}, Parameter{bias, "bias", 0}});
  Tensor out = empty_rows(x);
  auto& a = call.a;
  a.h = const_cast<void*>(x.const_data_ptr());
  a.h_rows = rows_of(x);
  a.pre.weight = data_of(parameters[0]);
  a.pre.bias = data_of(parameters[1]);
  const auto [mean, rstd] = statistics(x, a.rms, a.pre);
  if (a.relax == Relax::tensor) call.find_peak(x);
  a.x = out.mutable_data_ptr();
  a.x_rows = rows_of(out);
  call.forward(x);
  return {out, mean, rstd};
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Call>
Six step_fwd(const Tensor& branch, const Tensor& residual, const Maybe& post_weight, const Maybe& post_bias,
             const Maybe& pre_weight, const Maybe& pre_bias, const Maybe& row_scale, double branch_scale, double eps,
             int64_t relax, double weight_offset, bool round_before_weight, double dropout_p, bool dropout_after_norm,
             const Maybe& seed) {
  Call call(branch);
  call.check_device(residual, branch, "residual");
  if (row_scale) call.check_device(*row_scale, branch, "row_scale");
  if (seed) call.check_device(*seed, branch, "seed");
  check_same_shape(residual, branch, "residual");
  call.residual(residual, "residual");
  check_bias(call, post_weight, post_bias, "post_bias");
  check_bias(call, pre_weight, pre_bias, "pre_bias");
  call.norm(eps, relax, weight_offset, round_before_weight);
  const auto parameters = call.template parameters<4>(
      branch, {Parameter{post_weight, "post_weight", weight_offset}, Parameter{post_bias, "post_bias", 0},
               Parameter{pre_weight, "pre_weight", weight_offset}, Parameter{pre_bias, "pre_bias", 0}});
  Tensor h = empty_rows(residual), x = pre_weight ? empty_rows(branch) : absent(branch);
  auto& a = call.a;
  a.branch_scale = branch_scale;
  a.row_scale = call.of_rows(row_scale, branch, "row_scale");
  a.branch = branch.const_data_ptr();
  a.branch_rows = rows_of(branch);
  a.residual = residual.const_data_ptr();
  a.residual_rows = rows_of(residual);
  a.h = h.mutable_data_ptr();
  a.h_rows = rows_of(h);
  a.post.weight = data_of(parameters[0]);
  a.post.bias = data_of(parameters[1]);
  a.pre.weight = data_of(parameters[2]);
  a.pre.bias = data_of(parameters[3]);
  call.dropout(dropout_p, dropout_after_norm, seed, branch);
  const auto post = statistics(branch, a.rms, a.post), pre = statistics(branch, a.rms, a.pre);
  if (a.relax == Relax::tensor && post_weight) call.find_peak(branch);
  if (pre_weight) {
    if (a.relax == Relax::tensor) {  // the whole of h must be known before x is
      call.forward(branch);
      a.branch = nullptr;
      call.find_peak(h);
    }
    a.x = x.mutable_data_ptr();
    a.x_rows = rows_of(x);
  }
  call.forward(branch);
  return {h, x, post[0], post[1], pre[0], pre[1]};
}

template <class Call>
std::tuple<Tensor, Tensor, Tensor> norm_bwd(const Tensor& dout_in, const Tensor& x, const Tensor& weight,
                                            const Maybe& mean, const Tensor& rstd, double weight_offset) {
  Call call(x);
  call.check_device(dout_in, x, "dout");
  call.check_device(rstd, x, "rstd");
  if (mean) call.check_device(*mean, x, "mean");
  STD_TORCH_CHECK(bool(mean) == !call.a.rms, "mean: expected of LayerNorm");
  STD_TORCH_CHECK(dout_in.scalar_type() == x.scalar_type(), "dout: dtype does not match");
  const Tensor dout = gradient_rows(dout_in, x, "dout");
  const Maybe some_weight(weight);
  const auto parameters = call.template parameters<1>(x, {Parameter{some_weight, "weight", weight_offset}});
  Tensor grad = empty_rows(x);
  auto& a = call.a;
  a.weight_offset = weight_offset;
  a.pre.weight = data_of(parameters[0]);
  a.pre.mean = call.of_rows(mean, x, "mean");
  a.pre.rstd = call.of_rows(rstd, x, "rstd");
  a.h = const_cast<void*>(x.const_data_ptr());
  a.h_rows = rows_of(x);
  a.dx = dout.const_data_ptr();
  a.dx_rows = rows_of(dout);
  a.dresidual = grad.mutable_data_ptr();
  a.dresidual_rows = rows_of(grad);
  const auto [dweight, dbias] = call.backward(x, {std::nullopt, some_weight})[1];
  return {grad, dweight, dbias};
}

template <class Call>
Seven step_bwd(const Maybe& dh_in, const Maybe& dx_in, const Maybe& branch, const Maybe& h, const Maybe& post_weight,
               const Maybe& post_bias, const Maybe& pre_weight, const Maybe& row_scale, const Maybe& post_mean,
               const Maybe& post_rstd, const Maybe& pre_mean, const Maybe& pre_rstd, bool same_gradient,
               double branch_scale, double weight_offset, double dropout_p, bool dropout_after_norm,
               const Maybe& seed) {
  STD_TORCH_CHECK(branch || dx_in, "branch: expected where there is no dx");
  STD_TORCH_CHECK(dh_in || dx_in, "dh: expected where there is no dx");
  STD_TORCH_CHECK(h || !dx_in, "h: expected with dx");
  STD_TORCH_CHECK(!post_weight || branch, "branch: expected with a post-norm");
  STD_TORCH_CHECK(!dx_in || pre_weight, "pre_weight: expected with dx");
  const Tensor &like = branch ? *branch : *dx_in, &sum = h ? *h : *dh_in;
  Call call(like);
  for (const auto& [tensor, name] :
       {Named{h, "h"}, Named{dh_in, "dh"}, Named{dx_in, "dx"}, Named{row_scale, "row_scale"},
        Named{post_mean, "post_mean"}, Named{post_rstd, "post_rstd"}, Named{pre_mean, "pre_mean"},
        Named{pre_rstd, "pre_rstd"}, Named{seed, "seed"}})
    if (tensor) call.check_device(*tensor, like, name);
  STD_TORCH_CHECK(bool(post_rstd) == bool(post_weight) && bool(pre_rstd) == bool(pre_weight),
                  "statistics: expected of each norm");
  STD_TORCH_CHECK(bool(post_mean) == (post_rstd && !call.a.rms) && bool(pre_mean) == (pre_rstd && !call.a.rms),
                  "means: expected of LayerNorm");
  check_same_shape(sum, like, h ? "h" : "dh");
  call.residual(sum, h ? "h" : "dh");
  const auto parameters = call.template parameters<3>(
      like, {Parameter{post_weight, "post_weight", weight_offset}, Parameter{pre_weight, "pre_weight", weight_offset},
             Parameter{post_bias, "post_bias", 0}});
  auto& a = call.a;
  a.weight_offset = weight_offset;
  a.branch_scale = branch_scale;
  a.row_scale = call.of_rows(row_scale, like, "row_scale");
  a.post.weight = data_of(parameters[0]);
  call.dropout(dropout_p, dropout_after_norm, seed, like);
  a.post.bias = data_of(parameters[2]);
  a.post.mean = call.of_rows(post_mean, like, "post_mean");
  a.post.rstd = call.of_rows(post_rstd, like, "post_rstd");
  a.pre.weight = data_of(parameters[1]);
  a.pre.mean = call.of_rows(pre_mean, like, "pre_mean");
  a.pre.rstd = call.of_rows(pre_rstd, like, "pre_rstd");
  if (branch) {
    a.branch = branch->const_data_ptr();
    a.branch_rows = rows_of(*branch);
  }
  if (h) {
    a.h = data_of(h);
    a.h_rows = rows_of(*h);
  }
  Maybe dh, dx;
  if (dh_in) {
    STD_TORCH_CHECK(dh_in->scalar_type() == sum.scalar_type(), "dh: dtype does not match");
    dh = gradient_rows(*dh_in, like, "dh");
    a.dh = dh->const_data_ptr();
    a.dh_rows = rows_of(*dh);
  }
  if (dx_in) {
    STD_TORCH_CHECK(dx_in->scalar_type() == like.scalar_type(), "dx: dtype does not match");
    dx = gradient_rows(*dx_in, like, "dx");
    a.dx = dx->const_data_ptr();
    a.dx_rows = rows_of(*dx);
  }
  Tensor dbranch = same_gradient ? absent(like) : empty_rows(like), dresidual = dx ? empty_rows(sum) : absent(like);
  Tensor drow_scale = row_scale && branch ? statistic(like) : absent(like);
  if (!same_gradient) {
    a.dbranch = dbranch.mutable_data_ptr();
    a.dbranch_rows = rows_of(dbranch);
  }
  if (dx) {
    a.dresidual = dresidual.mutable_data_ptr();
    a.dresidual_rows = rows_of(dresidual);
  }
  if (row_scale && branch) {
    STD_TORCH_CHECK(a.rms || !post_weight || post_bias, "post_bias: expected with row_scale");
    a.drow_scale = drow_scale.mutable_data_ptr();
  }
  const auto [post, pre] = call.backward(like, {post_weight, pre_weight});
  return {dbranch, dresidual, drow_scale, post[0], post[1], pre[0], pre[1]};
}

}  // namespace cogview
