#include "../cpu/sandwich_layer_norm.h"

#include <cmath>

#include "common.h"
#include "rows.h"

namespace cogview {
namespace {

// The kernels' parameters are of the statistics' dtype; a conversion of D numbers where the caller's are not.
Tensor widened(const Tensor& weight, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), name, ": expected [D]");
  return torch::stable::contiguous(torch::stable::to(weight, stat_type(x)));
}

Tensor statistic(const Tensor& x) { return torch::stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), stat_type(x)); }

const void* statistic_data(const Tensor& statistic, const Tensor& x, const char* name) {
  const bool ok = statistic.scalar_type() == stat_type(x) && statistic.is_contiguous() &&
                  statistic.numel() * x.size(-1) == x.numel();
  STD_TORCH_CHECK(ok, name, ": expected one statistic per row, contiguous");
  return statistic.const_data_ptr();
}

struct Call {
  NormArgs a{};
  Tensor scratch, peaks;

  explicit Call(const Tensor& x) {
    a.dtype = dtype_of(x, "input");
    a.cols = x.size(-1);
    STD_TORCH_CHECK(a.cols >= 1, "input: expected rows of at least one element");
    a.rows = x.numel() / a.cols;
    a.scratch_cols = a.cols + kScratchPad;
    scratch = torch::stable::new_empty(x, {num_threads() * kScratchRows * a.scratch_cols}, stat_type(x));
    a.scratch = scratch.mutable_data_ptr();
  }

  void dropout(double p, int64_t seed) {
    STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout_p: expected a probability");
    const double threshold = std::nearbyint(p * 0x1p32);
    a.dropout = p > 0;
    a.seed = static_cast<uint64_t>(seed);
    a.dropout_threshold = static_cast<uint32_t>(std::min(threshold, 0x1p32 - 1));
    a.dropout_scale = threshold < 0x1p32 ? 1 / (1 - p) : 0;
  }

  void forward() { run_items(COGVIEW_PICK(sandwich_layer_norm_fwd), a, a.rows, row_grain(a.cols)); }

  // The largest |element| of the norm's input; NaN if there is one.
  double peak(const Tensor& x) {
    peaks = torch::stable::new_empty(x, {a.rows}, stat_type(x));
    a.peaks = peaks.mutable_data_ptr();
    run_items(COGVIEW_PICK(layer_norm_peaks), a, a.rows, row_grain(a.cols));
    return stat_type(x) == ScalarType::Double ? largest<double>() : largest<float>();
  }
  template <class A>
  double largest() const {
    A most = 0;
    for (int64_t i = 0; i < a.rows; ++i) {
      const A value = static_cast<const A*>(a.peaks)[i];
      if (!(value <= most)) most = value;
      if (std::isnan(most)) break;
    }
    return most;
  }

  // Blocks depend on the shape alone, so sums over rows repeat bit for bit with any number of threads; rows per block
  // and blocks grow alike, so rounding errors do with the fourth root of the number of rows.
  int64_t blocks() {
    a.block_rows = std::max<int64_t>(64, std::llround(std::ceil(std::sqrt(double(a.rows)))));
    return (a.rows + a.block_rows - 1) / a.block_rows;
  }
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in,
                                                  double eps, int64_t relax) {
  Tensor out = empty_rows(x), mean = statistic(x), rstd = statistic(x);
  const Tensor weight = widened(weight_in, x, "weight"), bias = widened(bias_in, x, "bias");
  Call call(x);
  call.a.eps = eps;
  call.a.relax = static_cast<Relax>(relax);
  call.a.h = const_cast<void*>(x.const_data_ptr());
  call.a.h_rows = rows_of(x);
  call.a.pre = {weight.const_data_ptr(), bias.const_data_ptr(), mean.mutable_data_ptr(), rstd.mutable_data_ptr()};
  if (call.a.relax == Relax::tensor) call.a.pre.peak = call.peak(x);
  call.a.x = out.mutable_data_ptr();
  call.a.x_rows = rows_of(out);
  call.forward();
  return {out, mean, rstd};
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six sandwich_fwd(const Tensor& branch, const Tensor& residual, const Tensor& post_weight_in, const Tensor& post_bias_in,
                 const Tensor& pre_weight_in, const Tensor& pre_bias_in, double eps, int64_t relax, double dropout_p,
                 int64_t seed) {
  check_same_shape(residual, branch, "residual");
  STD_TORCH_CHECK(residual.scalar_type() == branch.scalar_type(), "residual: expected branch's dtype");
  Tensor h = empty_rows(branch), x = empty_rows(branch);
  Tensor post_mean = statistic(branch), post_rstd = statistic(branch);
  Tensor pre_mean = statistic(branch), pre_rstd = statistic(branch);
  const Tensor post_weight = widened(post_weight_in, branch, "post_weight");
  const Tensor post_bias = widened(post_bias_in, branch, "post_bias");
  const Tensor pre_weight = widened(pre_weight_in, branch, "pre_weight");
  const Tensor pre_bias = widened(pre_bias_in, branch, "pre_bias");
  Call call(branch);
  NormArgs& a = call.a;
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
  a.post = {post_weight.const_data_ptr(), post_bias.const_data_ptr(), post_mean.mutable_data_ptr(),
            post_rstd.mutable_data_ptr()};
  a.pre = {pre_weight.const_data_ptr(), pre_bias.const_data_ptr(), pre_mean.mutable_data_ptr(),
           pre_rstd.mutable_data_ptr()};
  if (a.relax == Relax::tensor) {  // the whole of h must be known before x is
    a.post.peak = call.peak(branch);
    call.forward();
    a.branch = nullptr;
    a.pre.peak = call.peak(h);
  }
  a.x = x.mutable_data_ptr();
  call.forward();
  return {h, x, post_mean, post_rstd, pre_mean, pre_rstd};
}

// Sums of every block of rows, to be added up in their order.
struct Partials {
  Tensor dweight, dbias;
  Partials(Norm& norm, const Tensor& x, int64_t blocks)
      : dweight(torch::stable::new_empty(x, {blocks, x.size(-1)}, stat_type(x))),
        dbias(torch::stable::new_empty(x, {blocks, x.size(-1)}, stat_type(x))) {
    norm.dweight = dweight.mutable_data_ptr();
    norm.dbias = dbias.mutable_data_ptr();
  }
  static Tensor total(const Tensor& partial, const Tensor& weight) {
    const int64_t dim = 0;
    return torch::stable::to(torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1)),
                             weight.scalar_type());
  }
};

void describe(Norm& norm, const Tensor& weight, const void* mean, const void* rstd) {
  norm.weight = weight.const_data_ptr();
  norm.mean = const_cast<void*>(mean);
  norm.rstd = const_cast<void*>(rstd);
}

Tensor gradient_rows(const Tensor& grad, const Tensor& like, const char* name) {
  check_same_shape(grad, like, name);
  STD_TORCH_CHECK(grad.scalar_type() == like.scalar_type(), name, ": dtype does not match");
  return rows_contiguous(grad);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dout_in, const Tensor& x, const Tensor& weight_in,
                                                  const Tensor& mean, const Tensor& rstd) {
  const Tensor dout = gradient_rows(dout_in, x, "dout");
  const Tensor weight = widened(weight_in, x, "weight");
  Tensor grad = empty_rows(x);
  Call call(x);
  NormArgs& a = call.a;
  const int64_t blocks = call.blocks();
  const Partials partials(a.pre, x, blocks);
  describe(a.pre, weight, statistic_data(mean, x, "mean"), statistic_data(rstd, x, "rstd"));
  a.h = const_cast<void*>(x.const_data_ptr());
  a.h_rows = rows_of(x);
  a.dx = dout.const_data_ptr();
  a.dx_rows = rows_of(dout);
  a.dresidual = grad.mutable_data_ptr();
  a.dresidual_rows = rows_of(grad);
  run_items(COGVIEW_PICK(sandwich_layer_norm_bwd), a, blocks);
  return {grad, Partials::total(partials.dweight, weight_in), Partials::total(partials.dbias, weight_in)};
}

Six sandwich_bwd(const std::optional<Tensor>& dh_in, const std::optional<Tensor>& dx_in, const Tensor& branch,
                 const Tensor& h, const Tensor& post_weight_in, const Tensor& pre_weight_in, const Tensor& post_mean,
                 const Tensor& post_rstd, const Tensor& pre_mean, const Tensor& pre_rstd, double dropout_p,
                 int64_t seed) {
  check_same_shape(h, branch, "h");
  STD_TORCH_CHECK(h.scalar_type() == branch.scalar_type(), "h: expected branch's dtype");
  const Tensor post_weight = widened(post_weight_in, branch, "post_weight");
  const Tensor pre_weight = widened(pre_weight_in, branch, "pre_weight");
  Tensor dbranch = empty_rows(branch), dresidual = empty_rows(branch);
  Call call(branch);
  NormArgs& a = call.a;
  call.dropout(dropout_p, seed);
  const int64_t blocks = call.blocks();
  const Partials post(a.post, branch, blocks), pre(a.pre, branch, blocks);
  describe(a.post, post_weight, statistic_data(post_mean, branch, "post_mean"),
           statistic_data(post_rstd, branch, "post_rstd"));
  describe(a.pre, pre_weight, statistic_data(pre_mean, branch, "pre_mean"),
           statistic_data(pre_rstd, branch, "pre_rstd"));
  a.branch = branch.const_data_ptr();
  a.branch_rows = rows_of(branch);
  a.h = const_cast<void*>(h.const_data_ptr());
  a.h_rows = rows_of(h);
  std::optional<Tensor> dh, dx;
  if (dh_in) {
    dh = gradient_rows(*dh_in, branch, "dh");
    a.dh = dh->const_data_ptr();
    a.dh_rows = rows_of(*dh);
  }
  if (dx_in) {
    dx = gradient_rows(*dx_in, branch, "dx");
    a.dx = dx->const_data_ptr();
    a.dx_rows = rows_of(*dx);
  }
  a.dresidual = dresidual.mutable_data_ptr();
  a.dresidual_rows = rows_of(dresidual);
  a.dbranch = dbranch.mutable_data_ptr();
  a.dbranch_rows = rows_of(dbranch);
  run_items(COGVIEW_PICK(sandwich_layer_norm_bwd), a, blocks);
  return {dbranch,
          dresidual,
          Partials::total(post.dweight, post_weight_in),
          Partials::total(post.dbias, post_weight_in),
          Partials::total(pre.dweight, pre_weight_in),
          Partials::total(pre.dbias, pre_weight_in)};
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&cogview::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&cogview::layer_norm_bwd));
  m.impl("sandwich_layer_norm_fwd", TORCH_BOX(&cogview::sandwich_fwd));
  m.impl("sandwich_layer_norm_bwd", TORCH_BOX(&cogview::sandwich_bwd));
}
