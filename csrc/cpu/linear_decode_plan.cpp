// How a product of few rows is cut: by outputs, which read parts of the weight one after the other.
#include "host.h"
#include "linear_decode.h"

namespace cogview {
namespace {

// Whether x lies as it is multiplied: accumulators, no end of a row that fills no vector, rows at one distance.
bool in_place(const LinearArgs& a) {
  return (a.dtype == Dtype::f32 || a.dtype == Dtype::f64) && a.in % 16 == 0 && a.x_rows.ndim <= 1;
}

}  // namespace

void linear_decode(const LinearArgs& args, const Host& host) {
  constexpr int64_t piece = int64_t(1) << 18;  // bytes of the weight that a thread takes at a time
  alignas(64) char small[int64_t(1) << 17];    // what malloc would take and give back as a large block, every time
  LinearPlan plan{args};
  if (in_place(args)) {
    plan.packed = const_cast<void*>(args.x);
    plan.packed_bytes = args.x_rows.ndim ? args.x_rows.strides[0] * accumulator_bytes(args.dtype) : 0;
  } else {
    const int64_t groups = ceil_div(args.x_rows.count, kRows), padded = ceil_div(args.in, kLongest) * kLongest;
    plan.packed_bytes = padded * accumulator_bytes(args.dtype);
    plan.group_bytes = padded * kRows * 2;
    const int64_t bytes = std::max(args.x_rows.count * plan.packed_bytes, groups * plan.group_bytes);
    plan.packed = bytes <= int64_t(sizeof small) ? small : host.memory(bytes);
    run_items(host, COGVIEW_PICK(linear_decode_pack), plan, groups, piece / (kRows * plan.packed_bytes + 1) + 1);
  }
  const int64_t item_bytes = kOutputs * args.in * args.element_bytes;
  run_items(host, COGVIEW_PICK(linear_decode_products), plan, ceil_div(args.out, kOutputs),
            piece / (item_bytes + 1) + 1);
}

}  // namespace cogview
