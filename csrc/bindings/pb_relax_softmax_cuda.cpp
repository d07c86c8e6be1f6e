#include "../cuda/pb_relax_softmax.h"

#include "cuda.h"
#include "pb_relax_softmax.h"

namespace cogview {
namespace {

Tensor fwd(const Tensor& scores, const std::optional<Tensor>& mask, double alpha, bool causal) {
  STD_TORCH_CHECK(scores.is_cuda(), "scores: expected on the device of mask");
  if (mask) check_same_cuda(*mask, scores, "mask");
  return softmax_fwd(scores, mask, alpha, causal, [&](const SoftmaxArgs& a, int64_t rows) {
    run_cuda(cuda::pb_relax_softmax_fwd, a, rows, scores);
  });
}

Tensor bwd(const Tensor& dout, const Tensor& out, double alpha, bool causal) {
  STD_TORCH_CHECK(out.is_cuda(), "out: expected on the device of dout");
  check_same_cuda(dout, out, "dout");
  return softmax_bwd(dout, out, alpha, causal,
                     [&](const SoftmaxArgs& a, int64_t rows) { run_cuda(cuda::pb_relax_softmax_bwd, a, rows, out); });
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CUDA, m) {
  m.impl("pb_relax_softmax_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("pb_relax_softmax_bwd", TORCH_BOX(&cogview::bwd));
}
