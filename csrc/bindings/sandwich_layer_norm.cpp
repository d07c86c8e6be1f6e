#include "sandwich_layer_norm.h"

#include "../cpu/sandwich_layer_norm.h"
#include "host.h"

namespace cogview {
namespace {

struct Call : NormCall<NormPlan> {
  TorchHost host;

  explicit Call(const Tensor& x) : NormCall(x), host(x) {
    a.stream = beyond_cache(x);
    a.scratch_cols = a.cols + kScratchPad;
    a.scratch = host.memory(host.threads * kScratchRows * a.scratch_cols * accumulator_bytes(a.dtype));
  }

  void check_device(const Tensor&, const Tensor&, const char*) const {}

  // The kernels' parameters are of the statistics' dtype; a conversion of D numbers where the caller's are not.
  template <size_t N>
  std::array<Tensor, N> parameters(const Tensor& x, const std::array<Named, N>& weights) const {
    std::array<Tensor, N> out;
    for (size_t i = 0; i < N; ++i) {
      check_parameter(weights[i].first, x, weights[i].second);
      out[i] = widened(weights[i].first, x);
    }
    return out;
  }

  void forward(const Tensor&) { run_items(host, COGVIEW_PICK(sandwich_layer_norm_fwd), a, a.rows, row_grain(a.cols)); }

  // NaN if there is one.
  void find_peak(const Tensor& x) {
    if (!a.peaks) {  // else those of h are there, from what wrote it
      a.peaks = host.memory(a.rows * accumulator_bytes(a.dtype));
      run_items(host, COGVIEW_PICK(layer_norm_peaks), a, a.rows, row_grain(a.cols));
    }
    a.peak = stat_type(x) == ScalarType::Double ? largest<double>() : largest<float>();
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
  template <size_t N>
  std::array<std::array<Tensor, 2>, N> backward(const Tensor& x,
                                                const std::array<std::pair<Norm&, const Tensor&>, N>& norms) {
    a.block_rows = std::max<int64_t>(64, std::llround(std::ceil(std::sqrt(double(a.rows)))));
    const int64_t blocks = (a.rows + a.block_rows - 1) / a.block_rows;
    std::array<std::array<Tensor, 2>, N> sums;
    for (size_t i = 0; i < N; ++i) {
      for (Tensor& sum : sums[i]) sum = torch::stable::new_empty(x, {blocks, a.cols}, stat_type(x));
      norms[i].first.dweight = sums[i][0].mutable_data_ptr();
      norms[i].first.dbias = sums[i][1].mutable_data_ptr();
    }
    run_items(host, COGVIEW_PICK(sandwich_layer_norm_bwd), a, blocks);
    const int64_t dim = 0;
    for (size_t i = 0; i < N; ++i)
      for (Tensor& sum : sums[i])
        sum = torch::stable::to(torch::stable::sum(sum, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1)),
                                norms[i].second.scalar_type());
    return sums;
  }
};

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&cogview::layer_norm_fwd<cogview::Call>));
  m.impl("layer_norm_bwd", TORCH_BOX(&cogview::layer_norm_bwd<cogview::Call>));
  m.impl("sandwich_layer_norm_fwd", TORCH_BOX(&cogview::sandwich_fwd<cogview::Call>));
  m.impl("sandwich_layer_norm_bwd", TORCH_BOX(&cogview::sandwich_bwd<cogview::Call>));
}
