#include "../cuda/sandwich_layer_norm.h"

#include "cuda.h"
#include "sandwich_layer_norm.h"

namespace cogview {
namespace {

struct CudaCall : NormCall<cuda::LayerNormArgs> {
  Tensor post_peak, pre_peak;

  explicit CudaCall(const Tensor& x) : NormCall(x, false) {
    STD_TORCH_CHECK(x.is_cuda(), "input: expected on the device of the other tensors");
  }

  void check_device(const Tensor& x, const Tensor& like, const char* name) const { check_same_cuda(x, like, name); }

  // As they are where all have the rows' dtype: kernels widen them.
  template <size_t N>
  std::array<Maybe, N> parameters(const Tensor& x, const std::array<Parameter, N>& given) {
    for (const auto& [weight, name, offset] : given) {
      STD_TORCH_CHECK(offset == 0, "weight_offset: not implemented in CUDA C++ yet");
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

  void check_step() const {
    const bool known = a.branch_scale == 1 && !a.row_scale && !a.dropout_after_norm;
    STD_TORCH_CHECK(known && (!a.branch || a.post.weight) && a.pre.weight, "not implemented in CUDA C++ yet");
  }

  void forward(const Tensor& x) {
    check_step();
    if (a.relax == Relax::tensor && !a.x) {  // of h, on the way
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
    run_cuda(cuda::layer_norm_peak, a, a.rows, x);
  }

  std::array<std::array<Tensor, 2>, 2> backward(const Tensor& x, const std::array<Maybe, 2>& weights) {
    check_step();
    Tensor unused;
    if (!a.dresidual) {
      unused =
          torch::stable::new_empty(x, x.sizes(), a.residual_dtype == Dtype::f32 ? ScalarType::Float : x.scalar_type());
      a.dresidual = unused.mutable_data_ptr();
      a.dresidual_rows = rows_of(unused);
    }
    a.scratch_cols = (a.cols + 7) / 8 * 8;
    int64_t blocks = 0;
    {
      const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
      STD_CUDA_CHECK(cuda::sandwich_layer_norm_bwd_blocks(a, a.rows, &blocks));
    }
    const Tensor scratch = torch::stable::new_empty(x, {blocks, a.scratch_cols}, stat_type(x));
    a.scratch = scratch.mutable_data_ptr();
    std::array<std::array<Tensor, 2>, 2> sums, grads;
    for (size_t i = 0; i < 2; ++i) {
      if (!weights[i]) {
        for (Tensor& grad : grads[i]) grad = absent(x);
        continue;
      }
      Norm& norm = i ? a.pre : a.post;
      for (Tensor& sum : sums[i]) sum = torch::stable::new_empty(x, {blocks, a.scratch_cols}, stat_type(x));
      norm.dweight = sums[i][0].mutable_data_ptr();
      norm.dbias = sums[i][1].mutable_data_ptr();
      const ScalarType dtype = a.wide_weights ? stat_type(x) : x.scalar_type();
      for (Tensor& grad : grads[i]) grad = torch::stable::new_empty(x, {a.cols}, dtype);
      (i ? a.dpre_weight : a.dpost_weight) = grads[i][0].mutable_data_ptr();
      (i ? a.dpre_bias : a.dpost_bias) = grads[i][1].mutable_data_ptr();
    }
    run_cuda(cuda::sandwich_layer_norm_bwd, a, a.rows, x);
    for (size_t i = 0; i < 2; ++i)
      if (weights[i])
        for (Tensor& grad : grads[i]) grad = torch::stable::to(grad, weights[i]->scalar_type());
    return grads;
  }
};

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CUDA, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&cogview::norm_fwd<cogview::CudaCall>));
  m.impl("layer_norm_bwd", TORCH_BOX(&cogview::norm_bwd<cogview::CudaCall>));
  m.impl("sandwich_layer_norm_fwd", TORCH_BOX(&cogview::step_fwd<cogview::CudaCall>));
  m.impl("sandwich_layer_norm_bwd", TORCH_BOX(&cogview::step_bwd<cogview::CudaCall>));
}
