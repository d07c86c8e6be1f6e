// Checks, allocation and arguments of PB-relax softmax, the same on every device. `run(args, rows)` does the work.
#pragma once

#include "../pb_relax_softmax.h"

#include "common.h"
#include "rows.h"

namespace cogview {

inline SoftmaxArgs softmax_args(const Tensor& like, double alpha, bool causal) {
  SoftmaxArgs a{};
  a.dtype = dtype_of(like, "scores");
  a.cols = like.size(-1);
  a.rows_per_matrix = like.dim() > 1 ? like.size(-2) : 1;
  a.alpha = alpha;
  a.causal = causal;
  return a;
}

template <class Run>
Tensor softmax_fwd(const Tensor& scores, const std::optional<Tensor>& mask, double alpha, bool causal, Run run) {
  Tensor out = empty_rows(scores);
  SoftmaxArgs a = softmax_args(scores, alpha, causal);
  a.scores = scores.const_data_ptr();
  a.scores_rows = rows_of(scores);
  if (mask) {
    check_same_shape(*mask, scores, "mask");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_rows = leading_rows(*mask);
    a.mask_col_stride = mask->stride(-1);
  }
  a.out = out.mutable_data_ptr();
  a.out_rows = rows_of(out);
  run(a, scores.numel() / std::max<int64_t>(a.cols, 1));
  return out;
}

template <class Run>
Tensor softmax_bwd(const Tensor& dout_in, const Tensor& out, double alpha, bool causal, Run run) {
  check_same_shape(dout_in, out, "dout");
  STD_TORCH_CHECK(dout_in.scalar_type() == out.scalar_type(), "dout: expected out's dtype");
  const Tensor dout = rows_contiguous(dout_in);
  Tensor grad = empty_rows(out);
  SoftmaxArgs a = softmax_args(out, alpha, causal);
  a.dout = dout.const_data_ptr();
  a.dout_rows = rows_of(dout);
  a.out = const_cast<void*>(out.const_data_ptr());
  a.out_rows = rows_of(out);
  a.grad = grad.mutable_data_ptr();
  a.grad_rows = rows_of(grad);
  run(a, out.numel() / std::max<int64_t>(a.cols, 1));
  return grad;
}

}  // namespace cogview
