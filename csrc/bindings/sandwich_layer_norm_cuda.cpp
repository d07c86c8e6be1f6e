#include "../cuda/sandwich_layer_norm.h"

#include "cuda.h"
#include "sandwich_layer_norm.h"

namespace cogview {
namespace {

template <bool kRms>
struct CudaCall : NormCall<cuda::LayerNormArgs> {
  Tensor post_peak, pre_peak;

  explicit CudaCall(const Tensor& x) : NormCall(x, kRms) {
    STD_TORCH_CHECK(x.is_cuda(), "input: expected on the device of the other tensors");
  }

  void check_device(const Tensor& x, const Tensor& like, const char* name) const { check_same_cuda(x, like, name); }

  // As they are where all have the rows' dtype: kernels widen them, and add the offset.
  template <size_t N>
  std::array<Maybe, N> parameters(const Tensor& x, const std::array<Parameter, N>& given) {
    for (const auto& [weight, name, offset] : given) {
      if (!weight) continue;
      check_same_cuda(*weight, x, name);
      check_parameter(*weight, x, name);
      a.wide_weights |= weight->scalar_type() != x.scalar_type();
    }
    std::array<Maybe, N> out;
    for (size_t i = 0; i < N; ++i) {
      const Maybe& weight = std::get<0>(given[i]);
      if (weight) out[i] = a.wide_weights ? widened(*weight, x) : as_contiguous(*weight);
    }
    return out;
  }

  void forward(const Tensor& x) {
    if (a.relax == Relax::tensor && !a.x && a.pre.weight) {  // of h, on the way
      pre_peak = torch::stable::new_empty(x, {1}, stat_type(x));
      a.pre_peak = pre_peak.mutable_data_ptr();
    }
    run_cuda(cuda::sandwich_layer_norm_fwd, a, a.rows, x);
  }

  void find_peak(const Tensor& x) {
    if (!a.branch && a.pre_peak) return;
    Tensor& peak = a.branch ? post_peak : pre_peak;
    peak = torch::stable::new_empty(x, {1}, stat_type(x));
    (a.branch ? a.post_peak : a.pre_peak) = peak.mutable_data_ptr();
    auto input = a;
    input.dropout = a.dropout && !a.dropout_after_norm;
    run_cuda(cuda::layer_norm_peak, input, a.rows, x);
  }

  std::array<std::array<Tensor, 2>, 2> backward(const Tensor& x, const std::array<Maybe, 2>& weights) {
    a.scratch_cols = (a.cols + 7) / 8 * 8;
    int64_t blocks = 0;
    {
      const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
      STD_CUDA_CHECK(cuda::sandwich_layer_norm_bwd_blocks(a, a.rows, &blocks));
    }
    const Tensor scratch = torch::stable::new_empty(x, {blocks, a.scratch_cols}, stat_type(x));
    a.scratch = scratch.mutable_data_ptr();
    std::array<std::array<Tensor, 2>, 2> sums, grads;
    const ScalarType dtype = a.wide_weights ? stat_type(x) : x.scalar_type();
    for (size_t i = 0; i < 2; ++i) {
      Norm& norm = i ? a.pre : a.post;
      void** const partial[] = {&norm.dweight, &norm.dbias};
      void** const to[2][2] = {{&a.dpost_weight, &a.dpost_bias}, {&a.dpre_weight, &a.dpre_bias}};
      for (size_t k = 0; k < 2; ++k) {
        if (!weights[i] || (kRms && k == 1)) {
          grads[i][k] = absent(x);
          continue;
        }
        sums[i][k] = torch::stable::new_empty(x, {blocks, a.scratch_cols}, stat_type(x));
        *partial[k] = sums[i][k].mutable_data_ptr();
        grads[i][k] = torch::stable::new_empty(x, {a.cols}, dtype);
        *to[i][k] = grads[i][k].mutable_data_ptr();
      }
    }
    run_cuda(cuda::sandwich_layer_norm_bwd, a, a.rows, x);
    for (size_t i = 0; i < 2; ++i)
      for (size_t k = 0; weights[i] && k < (kRms ? 1 : 2); ++k)
        grads[i][k] = torch::stable::to(grads[i][k], weights[i]->scalar_type());
    return grads;
  }
};

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CUDA, m) {
  using LayerNorm = cogview::CudaCall<false>;
  using RmsNorm = cogview::CudaCall<true>;
  m.impl("layer_norm_fwd", TORCH_BOX(&cogview::norm_fwd<LayerNorm>));
  m.impl("layer_norm_bwd", TORCH_BOX(&cogview::norm_bwd<LayerNorm>));
  m.impl("sandwich_layer_norm_fwd", TORCH_BOX(&cogview::step_fwd<LayerNorm>));
  m.impl("sandwich_layer_norm_bwd", TORCH_BOX(&cogview::step_bwd<LayerNorm>));
  m.impl("rms_norm_fwd", TORCH_BOX(&cogview::norm_fwd<RmsNorm>));
  m.impl("rms_norm_bwd", TORCH_BOX(&cogview::norm_bwd<RmsNorm>));
  m.impl("sandwich_rms_norm_fwd", TORCH_BOX(&cogview::step_fwd<RmsNorm>));
  m.impl("sandwich_rms_norm_bwd", TORCH_BOX(&cogview::step_bwd<RmsNorm>));
}
