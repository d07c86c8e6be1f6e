// LayerNorm, RMSNorm and the fused step of a transformer on CPU.
#pragma once

#include "../sandwich_layer_norm.h"
#include "isa.h"

namespace cogview {

// Weights have their offset. Norm::dweight and Norm::dbias are [blocks, cols].
struct NormPlan : NormArgs {
  double peak;  // relax = tensor: the largest |input| of the one norm that a forward then has
  void* peaks;  // [rows], of the dropped-out branch, or of h without one; of h by the first half without the second;
                // null: not wanted
  int64_t block_rows;
  bool stream;    // write h, x and the gradients around the caches
  void* scratch;  // kScratchRows rows of scratch_cols statistics numbers per slot
  int64_t scratch_cols;
};
// Rows in the statistics' dtype, their factors of dropout, rows to be written.
enum ScratchRow { kWide, kFactors, kBuffer, kScratchKinds };
constexpr int kGroup = 4;  // rows that the backward takes together
constexpr int64_t kScratchRows = kScratchKinds * kGroup;
constexpr int64_t kScratchPad = 64;  // scratch_cols is at least cols + kScratchPad

COGVIEW_DECLARE_KERNEL(layer_norm_peaks, NormPlan)         // items are rows
COGVIEW_DECLARE_KERNEL(sandwich_layer_norm_fwd, NormPlan)  // items are rows
COGVIEW_DECLARE_KERNEL(sandwich_layer_norm_bwd, NormPlan)  // items are blocks of block_rows rows

}  // namespace cogview
