// PB-relax softmax on CPU. Work items are rows.
#pragma once

#include "../pb_relax_softmax.h"
#include "isa.h"

namespace cogview {

struct SoftmaxPlan : SoftmaxArgs {
  bool stream;    // write results around the caches
  void* scratch;  // a row of scratch_cols numbers of the dtype it is computed in, per slot
  int64_t scratch_cols;
};

COGVIEW_DECLARE_KERNEL(pb_relax_softmax_fwd, SoftmaxPlan)
COGVIEW_DECLARE_KERNEL(pb_relax_softmax_bwd, SoftmaxPlan)

}  // namespace cogview
