// Three-region block-sparse attention on CUDA, of float16 and bfloat16.
#pragma once

#include <cuda_runtime_api.h>

#include "../three_region_attention.h"

namespace cogview::cuda {

constexpr int kThreeRegionHeadDims[] = {32, 64, 96, 128};
constexpr int64_t kThreeRegionTokens = 1 << 26, kThreeRegionSequences = 1 << 23;  // at most

// What a backward needs beside its tensors.
struct ThreeRegionScratch {
  float* stats = nullptr;  // [2, B, H, seqlen_q]
  float* parts = nullptr;  // [2, splits, B, kv_heads, part_rows, head_dim]; null where there are no splits
  int splits = 0;          // as three_region_splits says
};

// Parts of the queries that see keys as pivots, whose sums are kept apart; 0 where no query does.
int three_region_splits(const ThreeRegionAttention& problem);
int64_t three_region_part_rows(const ThreeRegionAttention& problem);

// Of a batch, or of packed sequences if there is cu_seqlens.
cudaError_t three_region_attention_fwd(const ThreeRegionAttention& problem, cudaStream_t stream);
cudaError_t three_region_attention_bwd(const ThreeRegionAttention& problem, const ThreeRegionScratch& scratch,
                                       cudaStream_t stream);

// The latter, whose samples lie a token apart and of which there is at least one: instances/three_region_varlen.cu.
cudaError_t three_region_varlen_fwd(const ThreeRegionAttention& problem, cudaStream_t stream);
cudaError_t three_region_varlen_bwd(const ThreeRegionAttention& problem, const ThreeRegionScratch& scratch,
                                    cudaStream_t stream);

}  // namespace cogview::cuda
