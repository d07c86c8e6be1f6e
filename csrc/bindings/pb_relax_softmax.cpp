#include "pb_relax_softmax.h"

#include "../cpu/pb_relax_softmax.h"
#include "host.h"

namespace cogview {
namespace {

template <class Kernel>
auto runner(Kernel kernel, const Tensor& like) {
  return [kernel, &like](const SoftmaxArgs& a, int64_t rows) {
    const TorchHost host(like);
    SoftmaxPlan plan{a, beyond_cache(like), nullptr, (a.cols + 31) / 16 * 16};  // slots share no cache line
    plan.scratch = host.memory(host.threads * plan.scratch_cols * accumulator_bytes(a.dtype));
    run_items(host, kernel, plan, rows, row_grain(a.cols));
  };
}

Tensor fwd(const Tensor& scores, const std::optional<Tensor>& mask, double alpha, bool causal) {
  return softmax_fwd(scores, mask, alpha, causal, runner(COGVIEW_PICK(pb_relax_softmax_fwd), scores));
}

Tensor bwd(const Tensor& dout, const Tensor& out, double alpha, bool causal) {
  return softmax_bwd(dout, out, alpha, causal, runner(COGVIEW_PICK(pb_relax_softmax_bwd), out));
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CPU, m) {
  m.impl("pb_relax_softmax_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("pb_relax_softmax_bwd", TORCH_BOX(&cogview::bwd));
}
