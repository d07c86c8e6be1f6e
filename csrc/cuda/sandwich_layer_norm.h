// LayerNorm, RMSNorm and the fused step of a transformer on CUDA, over all rows.
#pragma once

#include <cuda_runtime_api.h>

#include "../sandwich_layer_norm.h"

namespace cogview::cuda {

// Weights may have the rows' dtype, and sums over rows are added up and rounded here.
struct LayerNormArgs : NormArgs {
  bool wide_weights;           // of the statistics' dtype, not the rows'
  void *post_peak, *pre_peak;  // relax = tensor: a norm's largest |input|, one number of the statistics' dtype
  void *dpost_weight, *dpost_bias, *dpre_weight, *dpre_bias;  // [cols], in the weights' dtype
  void* scratch;  // of the backward, as the sums: [blocks, scratch_cols] of the statistics' dtype
  int64_t scratch_cols;
  bool sums_in_shared;  // for the launchers
};

// The largest |element| of the dropped-out branch to post_peak, or of h to pre_peak where there is no branch.
cudaError_t layer_norm_peak(const LayerNormArgs& args, int64_t rows, cudaStream_t stream);

// With relax = tensor, without x and with a pre_peak, the largest |h| goes there.
cudaError_t sandwich_layer_norm_fwd(const LayerNormArgs& args, int64_t rows, cudaStream_t stream);

// Norm::dweight, Norm::dbias and scratch are [blocks, scratch_cols] of the statistics' dtype, scratch_cols a multiple
// of 8, and blocks is this; it depends on the shape, the layout and the GPU, so gradients repeat bit for bit.
cudaError_t sandwich_layer_norm_bwd_blocks(const LayerNormArgs& args, int64_t rows, int64_t* blocks);
cudaError_t sandwich_layer_norm_bwd(const LayerNormArgs& args, int64_t rows, cudaStream_t stream);

}  // namespace cogview::cuda
