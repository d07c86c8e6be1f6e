#include "../cpu/pb_relax_softmax.h"

#include "common.h"
#include "rows.h"

namespace cogview {
namespace {

SoftmaxArgs describe(const Tensor& like, double alpha, bool causal) {
  SoftmaxArgs a{};
  a.dtype = dtype_of(like, "scores");
  a.cols = like.size(-1);
  a.rows_per_matrix = like.dim() > 1 ? like.size(-2) : 1;
  a.alpha = alpha;
  a.causal = causal;
  return a;
}

Tensor fwd(const Tensor& scores, const std::optional<Tensor>& mask, double alpha, bool causal) {
  Tensor out = empty_rows(scores);
  SoftmaxArgs a = describe(scores, alpha, causal);
  a.scores = scores.const_data_ptr();
  a.scores_rows = rows_of(scores);
  if (mask) {
    check_same_shape(*mask, scores, "mask");
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_rows = leading_rows(*mask);
    a.mask_col_stride = mask->stride(-1);
  }
  a.out = out.mutable_data_ptr();
  a.out_rows = rows_of(out);
  run_items(COGVIEW_PICK(pb_relax_softmax_fwd), a, scores.numel() / std::max<int64_t>(a.cols, 1), row_grain(a.cols));
  return out;
}

Tensor bwd(const Tensor& dout_in, const Tensor& out, double alpha, bool causal) {
  check_same_shape(dout_in, out, "dout");
  const Tensor dout = rows_contiguous(dout_in);
  Tensor grad = empty_rows(out);
  SoftmaxArgs a = describe(out, alpha, causal);
  a.dout = dout.const_data_ptr();
  a.dout_rows = rows_of(dout);
  a.out = const_cast<void*>(out.const_data_ptr());
  a.out_rows = rows_of(out);
  a.grad = grad.mutable_data_ptr();
  a.grad_rows = rows_of(grad);
  run_items(COGVIEW_PICK(pb_relax_softmax_bwd), a, out.numel() / std::max<int64_t>(a.cols, 1), row_grain(a.cols));
  return grad;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("pb_relax_softmax_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("pb_relax_softmax_bwd", TORCH_BOX(&cogview::bwd));
}
