// Products by tensor cores through asynchronous copies, right and wrong in one way each.
#include <tensor_cores.h>

#include <cstring>

#include "kernels.h"

namespace kernels {
namespace {

enum Break { kNothing, kNoWait, kNoArrive, kNoInit, kUnseen, kOverwrite, kNoReturn };

// out = a * b for [16, 16] of T, row-major; warp 0 copies, warp 1 multiplies, twice in the same place.
template <class T, int kBreak>
__global__ void product(const float* in, float* out) {
  using gpu::u32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 a = gpu::shared_address(dynamic()), b = a + 512, full = a + 1024, empty = full + 8;
  if (threadIdx.x == 0 && kBreak != kNoInit) {
    gpu::barrier_init(full, 32);
    gpu::barrier_init(empty, 32);
  }
  if (kBreak != kUnseen) __syncthreads();
  for (u32 turn = 0; turn < 2; ++turn) {
    if (warp == 0) {
      if (turn && kBreak != kOverwrite) gpu::barrier_wait(empty, turn - 1);
      for (int part = lane; part < 64; part += 32)
        gpu::copy16(a + 16 * part, reinterpret_cast<const char*>(in) + 16 * part, true);
      if (kBreak != kNoArrive) gpu::arrive_after_copies(full);
    } else {
      if (kBreak != kNoWait) gpu::barrier_wait(full, turn);
      u32 x[4], y[4];
      gpu::load_matrices(x, a + lane % 16 * 32 + lane / 16 * 16);
      gpu::load_matrices_transposed(y, b + lane % 16 * 32 + lane / 16 * 16);
      if (kBreak != kNoReturn) gpu::barrier_arrive(empty);
      for (int half = 0; half < 2; ++half) {
        float d[4];
        gpu::multiply_first<T>(d, x, y[2 * half], y[2 * half + 1]);
        for (int e = 0; e < 4; ++e) out[(lane / 4 + e / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + e % 2] = d[e];
      }
    }
  }
}

// Whether a box is where the swizzle says it is.
template <bool kWait>
__global__ void box(const float* in, float* out) {
  using gpu::u32;
  const gpu::TensorMap map{reinterpret_cast<const char*>(in), 128, 4 * 128, 0, 0, 4, 2, 64};
  const u32 to = gpu::shared_address(dynamic()), full = to + 2048;
  if (threadIdx.x == 0) gpu::barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    gpu::arrive_and_expect(full, 2048);
    gpu::copy_box(to, map, 0, 0, 0, 0, full);
  }
  if (kWait) gpu::barrier_wait(full, 0);
  const int cell = threadIdx.x / 8, part = threadIdx.x % 8;  // of 16
  const uint4 x = gpu::load_shared16(to + cell * 128 + (part ^ cell % 8) * 16);
  memcpy(out + 4 * threadIdx.x, &x, sizeof x);
}

using B = __nv_bfloat16;

}  // namespace

const std::map<std::string, Kernel> pipelines = {
    {"product bf16", one_block<product<B, kNothing>, 2 * kKilobyte, 64>},
    {"product f16", one_block<product<__half, kNothing>, 2 * kKilobyte, 64>},
    {"product, no wait", one_block<product<B, kNoWait>, 2 * kKilobyte, 64>},
    {"product, no arrive", one_block<product<B, kNoArrive>, 2 * kKilobyte, 64>},
    {"product, no init", one_block<product<B, kNoInit>, 2 * kKilobyte, 64>},
    {"product, init unseen", one_block<product<B, kUnseen>, 2 * kKilobyte, 64>},
    {"product, overwritten", one_block<product<B, kOverwrite>, 2 * kKilobyte, 64>},
    {"product, no return", one_block<product<B, kNoReturn>, 2 * kKilobyte, 64>},
    {"box", one_block<box<true>, 3 * kKilobyte>},
    {"box, no wait", one_block<box<false>, 3 * kKilobyte>},
};

}  // namespace kernels
