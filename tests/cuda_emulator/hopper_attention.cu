// The product's forward for compute capability 9.0 without torch.
#include <stdexcept>
#include <string>

#include "dynamic_shared.h"

#ifndef COGVIEW_HOPPER  // a copy that has lost something
#define COGVIEW_HOPPER "../../csrc/cuda/three_region_hopper.cuh"
#endif
#include COGVIEW_HOPPER

CUDA_EMULATOR_DYNAMIC_SHARED("_ZN7cogview4cuda6memoryE")

namespace {
std::string message;
}

// Of tensors q, k, v, out; of packed sequences if there is `ends`, cu_seqlens. What it did wrong, or nothing.
extern "C" __attribute__((visibility("default"))) const char* attend(unsigned seed, bool half, bool wide_pivots,
                                                                     const long* sizes, const double* numbers,
                                                                     void* const* tensors, const long (*strides)[3],
                                                                     void* lse, const void* pivots, const void* ends,
                                                                     bool wide_ends, long sequences, long longest) {
  cogview::ThreeRegionAttention a{};
  a.dtype = half ? cogview::Dtype::f16 : cogview::Dtype::bf16;
  a.batch = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.seqlen_q = a.seqlen_k = sizes[3];
  a.head_dim = sizes[4], a.num_pivots = sizes[5], a.block_size = sizes[6], a.window_blocks = sizes[7];
  a.scale = numbers[0], a.pivot_bias = numbers[1];
  a.pivots = {pivots, wide_pivots}, a.lse = lse;
  cogview::Tensor4* const to[] = {&a.q, &a.k, &a.v, &a.out};
  for (int i = 0; i < 4; ++i) {
    to[i]->data = tensors[i];
    for (int n = 0; n < 3; ++n) to[i]->stride[n] = strides[i][ends && n == 0 ? 2 : n];
  }
  a.cu_seqlens = {ends, wide_ends}, a.sequences = sequences, a.max_seqlen = longest;
  cuda_emulator::set_seed(seed);
  try {
    if (!cogview::cuda::three_region_hopper_takes(a)) return "not taken";
    message = cogview::cuda::three_region_hopper_fwd(a, nullptr) == cudaSuccess ? "" : "an error code";
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}

// Where the forward has part `part` of a row of a tile of 128 rows of `dim` columns, and its k-th descriptors of the
// tile's rows or columns from `at` on.
template <int D>
using Tile = cogview::cuda::hopper::Tile<D, 128>;
extern "C" __attribute__((visibility("default"))) unsigned part(int dim, unsigned row, unsigned part) {
  return dim == 64 ? Tile<64>::part(row, part) : Tile<128>::part(row, part);
}
extern "C" __attribute__((visibility("default"))) uint64_t along(int dim, unsigned at, int k) {
  return dim == 64 ? Tile<64>::along(Tile<64>::rows(at), k) : Tile<128>::along(Tile<128>::rows(at), k);
}
extern "C" __attribute__((visibility("default"))) uint64_t across(int dim, unsigned at, int k) {
  return dim == 64 ? Tile<64>::across(Tile<64>::columns(at), k) : Tile<128>::across(Tile<128>::columns(at), k);
}
