#include "sandwich_layer_norm.h"

#include "../cpu/sandwich_layer_norm.h"
#include "host.h"

namespace cogview {
namespace {

template <bool kRms>
struct Call : NormCall<NormPlan> {
  TorchHost host;

  explicit Call(const Tensor& x) : NormCall(x, kRms), host(x) {
    a.stream = beyond_cache(x);
    a.scratch_cols = a.cols + kScratchPad;
    a.scratch = host.memory(host.threads * kScratchRows * a.scratch_cols * accumulator_bytes(a.dtype));
  }

  void check_device(const Tensor&, const Tensor&, const char*) const {}

  // The kernels' parameters are of the statistics' dtype, with their offset: D numbers where the caller's are not.
  template <size_t N>
  std::array<Maybe, N> parameters(const Tensor& x, const std::array<Parameter, N>& given) const {
    std::array<Maybe, N> out;
    for (size_t i = 0; i < N; ++i) {
      const auto& [weight, name, offset] = given[i];
      if (!weight) continue;
      check_parameter(*weight, x, name);
      out[i] = widened(*weight, x);
      if (offset != 0) out[i] = a.dtype == Dtype::f64 ? sum<double>(*out[i], offset) : sum<float>(*out[i], offset);
    }
    return out;
  }
  template <class A>
  static Tensor sum(const Tensor& weight, double offset) {
    Tensor out = torch::stable::empty_like(weight);
    const A* from = static_cast<const A*>(weight.const_data_ptr());
    A* to = static_cast<A*>(out.mutable_data_ptr());
    for (int64_t j = 0; j < weight.numel(); ++j) to[j] = from[j] + A(offset);
    return out;
  }

  void forward(const Tensor&) {
    if (a.relax == Relax::tensor && !a.x && !a.peaks) a.peaks = host.memory(a.rows * accumulator_bytes(a.dtype));
    run_items(host, COGVIEW_PICK(sandwich_layer_norm_fwd), a, a.rows, row_grain(a.cols));
  }

  // NaN if there is one.
  void find_peak(const Tensor&) {
    if (a.branch || !a.peaks) {  // else those of h are there, from what wrote it
      a.peaks = host.memory(a.rows * accumulator_bytes(a.dtype));
      run_items(host, COGVIEW_PICK(layer_norm_peaks), a, a.rows, row_grain(a.cols));
    }
    a.peak = a.dtype == Dtype::f64 ? largest<double>() : largest<float>();
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

  // Gradients of weight and bias of each norm: sums of every block of rows, added up in their order. Blocks depend on
  // the shape alone, so sums repeat bit for bit with any number of threads; rows per block and blocks grow alike, so
  // rounding errors do with the fourth root of the number of rows.
  std::array<std::array<Tensor, 2>, 2> backward(const Tensor& x, const std::array<Maybe, 2>& weights) {
    a.block_rows = std::max<int64_t>(64, std::llround(std::ceil(std::sqrt(double(a.rows)))));
    const int64_t blocks = (a.rows + a.block_rows - 1) / a.block_rows;
    std::array<std::array<Maybe, 2>, 2> sums;
    for (size_t i = 0; i < 2; ++i) {
      if (!weights[i]) continue;
      for (size_t k = 0; k < (kRms ? 1 : 2); ++k)
        sums[i][k] = torch::stable::new_empty(x, {blocks, a.cols}, stat_type(x));
      Norm& norm = i ? a.pre : a.post;
      norm.dweight = data_of(sums[i][0]);
      norm.dbias = data_of(sums[i][1]);
    }
    run_items(host, COGVIEW_PICK(sandwich_layer_norm_bwd), a, blocks);
    const int64_t dim = 0;
    const auto total = [&](size_t i, size_t k) {
      if (!sums[i][k]) return absent(x);
      return torch::stable::to(torch::stable::sum(*sums[i][k], torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1)),
                               weights[i]->scalar_type());
    };
    return {{{total(0, 0), total(0, 1)}, {total(1, 0), total(1, 1)}}};
  }
};

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&cogview::norm_fwd<cogview::Call<false>>));
  m.impl("layer_norm_bwd", TORCH_BOX(&cogview::norm_bwd<cogview::Call<false>>));
  m.impl("rms_norm_fwd", TORCH_BOX(&cogview::norm_fwd<cogview::Call<true>>));
  m.impl("rms_norm_bwd", TORCH_BOX(&cogview::norm_bwd<cogview::Call<true>>));
  m.impl("sandwich_layer_norm_fwd", TORCH_BOX(&cogview::step_fwd<cogview::Call<false>>));
  m.impl("sandwich_layer_norm_bwd", TORCH_BOX(&cogview::step_bwd<cogview::Call<false>>));
  m.impl("sandwich_rms_norm_fwd", TORCH_BOX(&cogview::step_fwd<cogview::Call<true>>));
  m.impl("sandwich_rms_norm_bwd", TORCH_BOX(&cogview::step_bwd<cogview::Call<true>>));
}
