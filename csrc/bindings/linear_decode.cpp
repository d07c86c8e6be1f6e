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
  LinearPlan plan{};
  plan.dtype = dtype_of(x, "x");
  plan.in = weight.size(1);
  plan.out = weight.size(0);
  plan.x = x.const_data_ptr();
  plan.x_rows = rows_of(x);
  plan.weight = weight.const_data_ptr();
  plan.weight_stride = weight.stride(0);
  if (scale_in) plan.scale = (scale = of_outputs(*scale_in, stat_type(x), weight, "scale")).const_data_ptr();
  if (bias_in) plan.bias = (bias = of_outputs(*bias_in, x.scalar_type(), weight, "bias")).const_data_ptr();
  plan.y = y.mutable_data_ptr();

  const TorchHost host(x);
  plan.packed_bytes = (plan.in * accumulator_bytes(plan.dtype) + kPackedPad + 63) / 64 * 64;
  const int64_t groups = (plan.x_rows.count + kRows - 1) / kRows;
  plan.packed = host.memory(groups * kRows * plan.packed_bytes);
  run_items(host, COGVIEW_PICK(linear_decode_pack), plan, groups, row_grain(plan.in * kRows));
  const int64_t items = (plan.out + kOutputs - 1) / kOutputs;
  const int64_t item_bytes = kOutputs * plan.in * weight.element_size();
  run_items(host, COGVIEW_PICK(linear_decode), plan, items, (int64_t(1) << 18) / std::max<int64_t>(item_bytes, 1) + 1);
  return y;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) { m.impl("linear_decode", TORCH_BOX(&cogview::run)); }
