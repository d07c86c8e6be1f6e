// Small kernels, right and wrong in one way each, for test_cuda_emulator.py: what the emulator finds, and what not.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "dynamic_shared.h"
#include "kernels.h"

CUDA_EMULATOR_DYNAMIC_SHARED("_ZN7kernels6memoryE")

namespace kernels {

namespace {

// out[i] = in[last - i] of a block, by way of shared memory.
template <bool kBarrier>
__global__ void reverse(const float* in, float* out) {
  __shared__ float x[128];
  x[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = x[127 - threadIdx.x];
}

// Each warp turns its part round, and once more for the second barrier's sake.
template <bool kFirst, bool kSecond>
__global__ void reverse_warps(const float* in, float* out) {
  __shared__ float x[128];
  const int other = threadIdx.x ^ 31;
  x[threadIdx.x] = in[threadIdx.x];
  if (kFirst) __syncwarp();
  const float mine = x[other];
  if (kSecond) __syncwarp();
  x[threadIdx.x] = mine;
  __syncwarp();
  out[threadIdx.x] = x[other];
}

// A shuffle between write and read orders nothing.
__global__ void shuffle_orders(const float* in, float* out) {
  __shared__ float x[128];
  x[threadIdx.x] = in[threadIdx.x];
  const float mine = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
  out[threadIdx.x] = x[threadIdx.x ^ 1] + mine;
}

// Teams of 4 lanes with masks of their own; a wrong mask names only other lanes.
template <bool kRight>
__global__ void teams(const float* in, float* out) {
  const int team = threadIdx.x % 32 / 4 * 4;
  const unsigned mask = 15u << (kRight ? team : (team + 4) % 32);
  float x = in[threadIdx.x];
  for (int d = 2; d > 0; d /= 2) x += __shfl_xor_sync(mask, x, d);
  out[threadIdx.x] = x;
}

// A lane reads one outside of the mask.
__global__ void outside(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, in[threadIdx.x], 16);
}

// Teams that do unequal work, then all lanes together: each shuffle waits for those of its mask.
__global__ void uneven(const float* in, float* out) {
  const int lane = threadIdx.x % 32, team = lane / 4;
  float x = in[threadIdx.x];
  for (int i = 0; i < team; ++i) x += __shfl_xor_sync(15u << 4 * team, x, 1);
  for (int d = 16; d > 0; d /= 2) x = max(x, __shfl_xor_sync(~0u, x, d));
  out[threadIdx.x] = x;
}

__global__ void masks_differ(const float* in, float* out) {
  const unsigned mask = threadIdx.x % 2 ? ~0u : 0x7FFFFFFFu;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 2);
}

__global__ void different_instructions(const float* in, float* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 1);
  else
    __syncwarp();
}

__global__ void lane_has_left(const float* in, float* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 8);
}

__global__ void some_threads_only(const float* in, float* out) {
  if (threadIdx.x < 64) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kAll>
__global__ void unwritten(const float* in, float* out) {
  __shared__ float x[128];
  if (kAll || threadIdx.x != 77) x[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x ^ 64];
}

// What another block has written is not there.
__global__ void other_block(const float* in, float* out) {
  if (blockIdx.x == 0)
    dynamic()[threadIdx.x] = in[threadIdx.x];
  else
    out[threadIdx.x] = dynamic()[threadIdx.x];
}

__global__ void swap(const float* in, float* out, int shift) {
  float* const x = dynamic() + shift;
  x[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x ^ 1];
}

__global__ void static_overrun(const float* in, float* out, int shift) {
  __shared__ float x[128];
  x[threadIdx.x + shift] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x + shift];
}

__global__ void static_too_large(const float* in, float* out) {
  __shared__ float x[13000];
  for (unsigned i = threadIdx.x; i < 13000; i += blockDim.x) x[i] = in[0];
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void vectors(const float* in, float* out, int shift) {
  if (threadIdx.x < 31)
    *reinterpret_cast<float4*>(out + 4 * threadIdx.x) =
        __ldg(reinterpret_cast<const float4*>(in + shift) + threadIdx.x);
}

template <bool kAtomic>
__global__ void count(const float*, float* out) {
  __shared__ unsigned n;
  if (threadIdx.x == 0) n = 0;
  __syncthreads();
  if (kAtomic)
    atomicAdd(&n, 1u);
  else
    ++n;
  __syncthreads();
  out[threadIdx.x] = float(n);
}

template <int kShift, int kShared>
void shifted(const float* in, float* out) {
  start(swap, 1, 128, kShared, in, out, kShift);
}

template <int kAllowed, int kShared>
void allowed(const float* in, float* out) {
  if (cudaFuncSetAttribute(reverse<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, kAllowed) != cudaSuccess)
    throw std::runtime_error("refused");
  start(reverse<true>, 1, 128, kShared, in, out);
}
template <int kX, int kY, int kZ>
void on_grid(const float* in, float* out) {
  start(reverse<true>, dim3(kX, kY, kZ), 128, 0, in, out);
}

const std::map<std::string, Kernel> kAll = {
    {"reverse", one_block<reverse<true>>},
    {"reverse, no barrier", one_block<reverse<false>>},
    {"reverse_warps", one_block<reverse_warps<true, true>>},
    {"reverse_warps, not the first", one_block<reverse_warps<false, true>>},
    {"reverse_warps, not the second", one_block<reverse_warps<true, false>>},
    {"shuffle_orders", one_block<shuffle_orders>},
    {"teams", one_block<teams<true>>},
    {"teams, wrong mask", one_block<teams<false>>},
    {"outside", one_block<outside>},
    {"uneven", one_block<uneven>},
    {"masks_differ", one_block<masks_differ>},
    {"different_instructions", one_block<different_instructions>},
    {"lane_has_left", one_block<lane_has_left>},
    {"some_threads_only", one_block<some_threads_only>},
    {"unwritten, not", one_block<unwritten<true>>},
    {"unwritten", one_block<unwritten<false>>},
    {"other_block", [](const float* in, float* out) { start(other_block, 2, 128, 512, in, out); }},
    {"dynamic", shifted<0, 512>},
    {"dynamic, beyond", shifted<0, 508>},
    {"dynamic, before", shifted<-1, 512>},
    {"static_overrun, not", [](const float* in, float* out) { start(static_overrun, 1, 128, 0, in, out, 0); }},
    {"static_overrun", [](const float* in, float* out) { start(static_overrun, 1, 128, 0, in, out, 1); }},
    {"static_too_large", one_block<static_too_large>},
    {"vectors", [](const float* in, float* out) { start(vectors, 1, 128, 0, in, out, 4); }},
    {"vectors, misaligned", [](const float* in, float* out) { start(vectors, 1, 128, 0, in, out, 2); }},
    {"count", one_block<count<true>>},
    {"count, not atomic", one_block<count<false>>},
    {"threads", one_block<reverse<true>, 0, 1056>},
    {"no threads", one_block<reverse<true>, 0, 0>},
    {"grid", on_grid<2, 3, 2>},
    {"grid y", on_grid<1, 65536, 1>},
    {"grid z", on_grid<1, 1, 65536>},
    {"no blocks", on_grid<0, 1, 1>},
    {"48 KB", one_block<unwritten<true>, 48 * kKilobyte>},
    {"48 KB and one", one_block<unwritten<true>, 48 * kKilobyte + 1>},
    {"100 KB allowed", allowed<100 * kKilobyte, 100 * kKilobyte>},
    {"more than allowed", allowed<100 * kKilobyte, 101 * kKilobyte>},
    {"228 KB", allowed<228 * kKilobyte, 0>},
    {"227 KB and static", allowed<227 * kKilobyte, 227 * kKilobyte>},
};

std::string message;

}  // namespace
}  // namespace kernels

extern "C" {

// What a kernel did wrong, or nothing.
__attribute__((visibility("default"))) const char* run(const char* name, unsigned seed, const float* in, float* out) {
  cuda_emulator::set_seed(seed);
  try {
    (kernels::pipelines.count(name) ? kernels::pipelines : kernels::kAll).at(name)(in, out);
    kernels::message.clear();
  } catch (const std::exception& error) {
    kernels::message = error.what();
  }
  return kernels::message.c_str();
}

// Conversions from 16 bits, which are `narrow`, and back.
__attribute__((visibility("default"))) void widen(bool half, const uint16_t* narrow, float* wide, long n) {
  for (long i = 0; i < n; ++i) wide[i] = half ? __half2float({narrow[i]}) : __bfloat162float({narrow[i]});
}
__attribute__((visibility("default"))) void narrow(bool half, const float* wide, uint16_t* narrow, long n) {
  for (long i = 0; i < n; ++i) narrow[i] = half ? __float2half_rn(wide[i]).bits : __float2bfloat16_rn(wide[i]).bits;
}
}
