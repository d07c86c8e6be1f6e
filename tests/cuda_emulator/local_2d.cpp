// 2D local attention without torch, forward and backward, for copies of csrc/cuda that are broken in some way.
#include <tensor_cores.h>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/local_attention_2d.h"
#include "emulator.h"

namespace {
std::string message;
}

// What it did wrong, or nothing. Tensors q, k, v, out, dout, dq, dk, dv, then k, v, dk, dv of prefix and of coarse
// keys, or null; their strides; lse, dlse or null; masks of the prefix and of the image or null; a table of biases or
// null and its gradient; sizes: batch, heads, kv_heads, head_dim, grid, kernel, dilation, raster_causal, shift, prefix
// keys, coarse grid, coarse kernel.
extern "C" __attribute__((visibility("default"))) const char* local_2d(
    unsigned seed, void* const* tensors, const long (*strides)[3], float* lse, float* dlse, const bool* mask,
    const bool* key_mask, const float* table, float* dtable, const long* sizes, double prefix_bias, double coarse_bias,
    double scale) {
  cogview::LocalAttention a{};
  a.dtype = cogview::Dtype::bf16;
  a.batch = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.head_dim = sizes[3];
  a.window = {{sizes[4], sizes[5]}, {sizes[6], sizes[7]}, {sizes[8], sizes[9]}, sizes[10] != 0, sizes[11] != 0};
  a.prefix.len = sizes[12], a.prefix.mask = mask, a.prefix.bias = prefix_bias;
  a.key_mask = key_mask, a.bias = {table, dtable, {2 * sizes[6] - 1, 2 * sizes[7] - 1}};
  a.coarse.grid = {sizes[13], sizes[14]}, a.coarse.kernel = {sizes[15], sizes[16]}, a.coarse.bias = coarse_bias;
  a.seqlen_q = sizes[4] * sizes[5], a.scale = scale;
  cogview::Tensor4* views[] = {&a.q,        &a.k,        &a.v,         &a.out,      &a.dout,      &a.dq,
                               &a.dk,       &a.dv,       &a.prefix.k,  &a.prefix.v, &a.prefix.dk, &a.prefix.dv,
                               &a.coarse.k, &a.coarse.v, &a.coarse.dk, &a.coarse.dv};
  for (int i = 0; i < 16; ++i) {
    views[i]->data = tensors[i];
    for (int d = 0; d < 3; ++d) views[i]->stride[d] = strides[i][d];
  }
  a.lse = lse, a.dlse = dlse;
  using namespace cogview::cuda;
  try {
    cuda_emulator::set_seed(seed);
    int64_t bytes = 0;
    cudaError_t error = local_bwd_scratch(a, &bytes);
    constexpr int kAround = 1 << 14;  // for what writes beyond
    std::vector<float> scratch(bytes / 4 + 2 * kAround, __builtin_nanf(""));
    gpu::counts = {};
    if (error == cudaSuccess) error = local_fwd(a, {}, nullptr);
    if (error == cudaSuccess) error = local_bwd(a, scratch.data() + kAround, {}, nullptr);
    message = error != cudaSuccess ? "an error code" : gpu::counts.bank_conflicts ? "rows that share banks" : "";
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}
