// How a product of few rows is cut: by outputs, which read parts of the weight one after the other.
#include "host.h"
#include "linear_decode.h"

namespace cogview {

void linear_decode(const LinearArgs& args, const Host& host) {
  constexpr int64_t piece = int64_t(1) << 18;  // bytes of the weight that a thread takes at a time
  LinearPlan plan{args, nullptr, (args.in * accumulator_bytes(args.dtype) + kPackedPad + 63) / 64 * 64};
  const int64_t groups = ceil_div(args.x_rows.count, kRows), item_bytes = kOutputs * args.in * args.element_bytes;
  plan.packed = host.memory(groups * kRows * plan.packed_bytes);
  run_items(host, COGVIEW_PICK(linear_decode_pack), plan, groups, piece / (kRows * plan.packed_bytes) + 1);
  run_items(host, COGVIEW_PICK(linear_decode_products), plan, ceil_div(args.out, kOutputs),
            piece / (item_bytes + 1) + 1);
}

}  // namespace cogview
