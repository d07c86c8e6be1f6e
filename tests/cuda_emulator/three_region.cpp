// Three-region attention without torch, forward and backward, for copies of csrc/cuda that are broken in some way.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include <tensor_cores.h>

#include "../../csrc/cuda/three_region_attention.h"
#include "emulator.h"

namespace {
std::string message;
}

// What it did wrong, or nothing. Tensors q, k, v, out, dout, dq, dk, dv and their strides; lse, dlse or null; sizes:
// batch, heads, kv_heads, seqlen, head_dim, num_pivots, block_size, window_blocks, sequences that are packed in a batch
// of one, the longest of them; cu_seqlens, or null.
extern "C" __attribute__((visibility("default"))) const char* three_region(unsigned seed, void* const* tensors,
                                                                           const long (*strides)[3], float* lse,
                                                                           float* dlse, const void* pivots, bool wide,
                                                                           const long* sizes, const void* ends,
                                                                           double pivot_bias, double scale) {
  cogview::ThreeRegionAttention a{};
  a.dtype = cogview::Dtype::bf16;
  a.batch = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.seqlen_q = a.seqlen_k = sizes[3];
  a.head_dim = sizes[4], a.num_pivots = sizes[5], a.block_size = sizes[6], a.window_blocks = sizes[7];
  a.sequences = sizes[8], a.max_seqlen = sizes[9], a.cu_seqlens = {ends, wide};
  a.pivot_bias = pivot_bias, a.scale = scale;
  cogview::Tensor4* views[] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
  for (int i = 0; i < 8; ++i) {
    views[i]->data = tensors[i];
    for (int d = 0; d < 3; ++d) views[i]->stride[d] = strides[i][d];
  }
  a.lse = lse, a.dlse = dlse, a.pivots = {pivots, wide};
  using namespace cogview::cuda;
  ThreeRegionScratch scratch;
  scratch.splits = three_region_splits(a);
  const float nothing = __builtin_nanf("");
  // as long again behind them, where nothing may be written
  const long count = 2 * a.batch * a.heads * a.seqlen_q;
  const long sums = 2 * scratch.splits * a.batch * a.kv_heads * three_region_part_rows(a) * a.head_dim;
  std::vector<float> stats(2 * count, nothing), parts(2 * sums, nothing);
  const auto untouched = [](const std::vector<float>& x) {
    return std::all_of(x.begin() + x.size() / 2, x.end(), [](float x) { return x != x; });
  };
  scratch.stats = stats.data(), scratch.parts = parts.data();
  try {
    cuda_emulator::set_seed(seed);
    gpu::counts = {};
    cudaError_t error = three_region_attention_fwd(a, nullptr);
    if (error == cudaSuccess) error = three_region_attention_bwd(a, scratch, nullptr);
    message = error != cudaSuccess ? "an error code" : gpu::counts.bank_conflicts ? "rows that share banks" : "";
    if (!untouched(stats) || !untouched(parts)) message = "writes behind its scratch memory";
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}
