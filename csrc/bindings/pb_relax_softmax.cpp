#include "pb_relax_softmax.h"

namespace cogview {
namespace {

Tensor fwd(const Tensor& scores, const std::optional<Tensor>& mask, double alpha, bool causal) {
  return softmax_fwd(scores, mask, alpha, causal, [](const SoftmaxArgs& a, int64_t rows) {
    run_items(COGVIEW_PICK(pb_relax_softmax_fwd), a, rows, row_grain(a.cols));
  });
}

Tensor bwd(const Tensor& dout, const Tensor& out, double alpha, bool causal) {
  return softmax_bwd(dout, out, alpha, causal, [](const SoftmaxArgs& a, int64_t rows) {
    run_items(COGVIEW_PICK(pb_relax_softmax_bwd), a, rows, row_grain(a.cols));
  });
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("pb_relax_softmax_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("pb_relax_softmax_bwd", TORCH_BOX(&cogview::bwd));
}
