#include "pb_relax_softmax.h"

namespace cogview {
namespace {

template <class Kernel>
auto runner(Kernel kernel, const Tensor& like) {
  return [kernel, &like](SoftmaxArgs& a, int64_t rows) {
    a.scratch_cols = (a.cols + 31) / 16 * 16;  // slots share no cache line
    const Tensor scratch = torch::stable::new_empty(like, {num_threads() * a.scratch_cols}, stat_type(like));
    a.scratch = scratch.mutable_data_ptr();
    a.stream = beyond_cache(like);
    run_items(kernel, a, rows, row_grain(a.cols));
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

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("pb_relax_softmax_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("pb_relax_softmax_bwd", TORCH_BOX(&cogview::bwd));
}
