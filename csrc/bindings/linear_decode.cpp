#include "../cpu/linear_decode.h"

#include "host.h"
#include "rows.h"

namespace cogview {
namespace {

using Optional = std::optional<Tensor>;

// One number for each output.
Tensor of_outputs(const Tensor& numbers, ScalarType dtype, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == weight.size(0), name, ": shape does not match");
  STD_TORCH_CHECK(numbers.scalar_type() == dtype, name, ": expected another dtype");
  return as_contiguous(numbers);
}

Tensor run(const Tensor& x, const Tensor& weight, const Optional& bias_in, const Optional& scale_in) {
  STD_TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1), "weight: shape does not match");
  STD_TORCH_CHECK(weight.stride(1) == 1 || weight.size(1) <= 1, "weight: expected a contiguous last dimension");
  STD_TORCH_CHECK(weight.scalar_type() == (scale_in ? ScalarType::Char : x.scalar_type()),
                  "weight: expected x's dtype, or int8 with a scale");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, sizes), bias, scale;
  if (y.numel() == 0) return y;
  LinearArgs a{};
  a.dtype = dtype_of(x, "x");
  a.in = weight.size(1);
  a.out = weight.size(0);
  a.x = x.const_data_ptr();
  a.x_rows = rows_of(x);
  a.weight = weight.const_data_ptr();
  a.weight_stride = weight.stride(0);
  a.element_bytes = weight.element_size();
  if (scale_in) a.scale = (scale = of_outputs(*scale_in, stat_type(x), weight, "scale")).const_data_ptr();
  if (bias_in) a.bias = (bias = of_outputs(*bias_in, x.scalar_type(), weight, "bias")).const_data_ptr();
  a.y = y.mutable_data_ptr();
  linear_decode(a, TorchHost(x));
  return y;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CPU, m) { m.impl("linear_decode", TORCH_BOX(&cogview::run)); }
