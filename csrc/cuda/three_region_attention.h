// Three-region block-sparse attention on CUDA, of float16 and bfloat16.
#pragma once

#include <cuda_runtime_api.h>

#include "../three_region_attention.h"

namespace cogview::cuda {

constexpr int kThreeRegionHeadDims[] = {32, 64, 96, 128};
constexpr int64_t kThreeRegionTokens = 1 << 26;  // at most

// What a backward needs beside its tensors.
struct ThreeRegionScratch {
  float* stats = nullptr;  // [2, B, H, seqlen_q]
  float* parts = nullptr;  // [2, splits, B, kv_heads, num_pivots, head_dim]; null where there are no splits
  int splits = 0;          // as three_region_splits says
};

// Parts of the queries that see keys as pivots, whose sums are kept apart; 0 where no query does.
int three_region_splits(const ThreeRegionAttention& problem);

// Which forward runs: 0 tiles by mma.sync; 2 or 3 that of compute capability 9.0, with so many groups of consumers.
struct TunedForward {
  int head_dim, groups;
};
// The fastest, as `python -m benchmarks.sweep` measures it: nothing is measured yet.
constexpr TunedForward kTunedForward[] = {{64, 0}, {128, 0}};
constexpr int kUsual = -1;  // as tuned

// Whether this build has it, on this device, for this problem.
bool three_region_forward_runs(const ThreeRegionAttention& problem, int groups);
cudaError_t three_region_attention_fwd(const ThreeRegionAttention& problem, int groups, cudaStream_t stream);
cudaError_t three_region_attention_bwd(const ThreeRegionAttention& problem, const ThreeRegionScratch& scratch,
                                       cudaStream_t stream);

}  // namespace cogview::cuda
