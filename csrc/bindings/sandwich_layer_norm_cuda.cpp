#include "../cuda/sandwich_layer_norm.h"

#include "cuda.h"
#include "sandwich_layer_norm.h"

namespace cogview {
namespace {

struct CudaCall : NormCall<cuda::LayerNormArgs> {
  Tensor post_peak, pre_peak;

  explicit CudaCall(const Tensor& x) : NormCall(x) {
    STD_TORCH_CHECK(x.is_cuda(), "input: expected on the device of the other tensors");
  }

  void check_device(const Tensor& x, const Tensor& like, const char* name) const { check_same_cuda(x, like, name); }

  // As they are where all have the rows' dtype: kernels widen them.
  template <size_t N>
  std::array<Tensor, N> parameters(const Tensor& x, const std::array<Named, N>& weights) {
    for (const auto& [weight, name] : weights) {
      check_same_cuda(weight, x, name);
      check_parameter(weight, x, name);
      a.wide_weights |= weight.scalar_type() != x.scalar_type();
    }
    std::array<Tensor, N> out;
    for (size_t i = 0; i < N; ++i)
      out[i] = a.wide_weights ? widened(weights[i].first, x) : as_contiguous(weights[i].first);
    return out;
  }

  void forward(const Tensor& x) {
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

  template <size_t N>
  std::array<std::array<Tensor, 2>, N> backward(const Tensor& x,
                                                const std::array<std::pair<Norm&, const Tensor&>, N>& norms) {
    a.scratch_cols = (a.cols + 7) / 8 * 8;
    int64_t blocks = 0;
    {
      const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
      STD_CUDA_CHECK(cuda::sandwich_layer_norm_bwd_blocks(a, a.rows, &blocks));
    }
    const Tensor scratch = torch::stable::new_empty(x, {blocks, a.scratch_cols}, stat_type(x));
    a.scratch = scratch.mutable_data_ptr();
    std::array<std::array<Tensor, 2>, N> sums, grads;
    for (size_t i = 0; i < N; ++i) {
      Norm& norm = norms[i].first;
      for (Tensor& sum : sums[i]) sum = torch::stable::new_empty(x, {blocks, a.scratch_cols}, stat_type(x));
      norm.dweight = sums[i][0].mutable_data_ptr();
      norm.dbias = sums[i][1].mutable_data_ptr();
      const ScalarType dtype = a.wide_weights ? stat_type(x) : x.scalar_type();
      for (Tensor& grad : grads[i]) grad = torch::stable::new_empty(x, {a.cols}, dtype);
      const bool post = &norm == &a.post;
      (post ? a.dpost_weight : a.dpre_weight) = grads[i][0].mutable_data_ptr();
      (post ? a.dpost_bias : a.dpre_bias) = grads[i][1].mutable_data_ptr();
    }
    run_cuda(cuda::sandwich_layer_norm_bwd, a, a.rows, x);
    for (size_t i = 0; i < N; ++i)
      for (Tensor& grad : grads[i]) grad = torch::stable::to(grad, norms[i].second.scalar_type());
    return grads;
  }
};

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CUDA, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&cogview::layer_norm_fwd<cogview::CudaCall>));
  m.impl("layer_norm_bwd", TORCH_BOX(&cogview::layer_norm_bwd<cogview::CudaCall>));
  m.impl("sandwich_layer_norm_fwd", TORCH_BOX(&cogview::sandwich_fwd<cogview::CudaCall>));
  m.impl("sandwich_layer_norm_bwd", TORCH_BOX(&cogview::sandwich_bwd<cogview::CudaCall>));
}
