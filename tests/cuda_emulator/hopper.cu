// Products of warp groups, right and wrong in one way each, for test_cuda_hopper.py; and matrix descriptors.
#include <hopper.h>

#include <cstring>
#include <stdexcept>

#include "../../csrc/cuda/matrix_descriptor.h"
#include "dynamic_shared.h"
#include "kernels.h"

CUDA_EMULATOR_DYNAMIC_SHARED("_ZN7kernels6memoryE")

namespace kernels {
namespace {

using cogview::cuda::matrix_descriptor;
using cogview::cuda::Swizzle;
using gpu::u32;
using gpu::u64;

// Elements of a tile, 16-bit ones, as wgmma has them: rows of kWidth bytes (kNone: 16) and columns of tiles of these.
template <Swizzle kSwizzle>
struct Layout {
  static constexpr u32 kWidth = kSwizzle == Swizzle::k128  ? 128
                                : kSwizzle == Swizzle::k64 ? 64
                                : kSwizzle == Swizzle::k32 ? 32
                                                           : 16;
  static u32 part(u32 rows, u32 row, u32 part) {  // of 16 bytes
    const u32 parts = kWidth / 16, at = part / parts * rows * kWidth + row * kWidth + part % parts * 16;
    return at ^ (at >> 7 & (parts - 1)) << 4;
  }
};

// A matrix [rows, columns] from memory.
template <Swizzle kSwizzle>
void place(u32 to, const float* from, u32 rows, u32 columns, bool asynchronously = false) {
  for (u32 i = threadIdx.x; i < rows * columns / 8; i += blockDim.x) {
    const u32 at = to + Layout<kSwizzle>::part(rows, i / (columns / 8), i % (columns / 8));
    const char* x = reinterpret_cast<const char*>(from) + 16 * i;
    if (asynchronously)
      gpu::copy16(at, x, true);
    else
      gpu::store_shared16(at, gpu::load_global16(x));
  }
}

void store(float* out, const float* d, int n) {
  const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  for (int i = 0; i < n / 2; ++i)
    out[(16 * warp + lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Descriptors of 16 k of a matrix, the k-th ones: rows along k, or across it.
template <Swizzle kSwizzle>
u64 along(u32 at, u32 rows, u32 k) {
  constexpr u32 width = Layout<kSwizzle>::kWidth, steps = width / 32;
  if (kSwizzle == Swizzle::kNone) return matrix_descriptor(at + 2 * k * rows * 16, rows * 16, 128, kSwizzle);
  return matrix_descriptor(at + k / steps * rows * width + k % steps * 32, 0, 8 * width, kSwizzle);
}
template <Swizzle kSwizzle>
u64 across(u32 at, u32 rows, u32 k) {
  constexpr u32 width = Layout<kSwizzle>::kWidth;
  if (kSwizzle == Swizzle::kNone) return matrix_descriptor(at + 16 * k * 16, 128, rows * 16, kSwizzle);
  return matrix_descriptor(at + 16 * k * width, rows * width, 8 * width, kSwizzle);
}

// out = a * b: [64, 64] by [64, N], both in shared memory, each with rows along k or across it.
template <class T, int N, Swizzle kSwizzle, bool kAcrossA, bool kAcrossB>
__global__ void product(const float* in, float* out) {
  const u32 a = gpu::shared_address(dynamic()), b = a + 8192;
  place<kSwizzle>(a, in, 64, 64);
  place<kSwizzle>(b, in + 2048, kAcrossB ? 64 : N, kAcrossB ? N : 64);
  gpu::fence_proxy();
  __syncthreads();
  float d[N / 2];
  gpu::multiply_fence();
  for (int k = 0; k < 4; ++k)
    gpu::multiply_async<T, N, kAcrossB, kAcrossA>(d, kAcrossA ? across<kSwizzle>(a, 64, k) : along<kSwizzle>(a, 64, k),
                                                  kAcrossB ? across<kSwizzle>(b, 64, k) : along<kSwizzle>(b, N, k),
                                                  k > 0);
  gpu::multiply_commit();
  gpu::multiply_wait<0>(d);
  store(out, d, N);
}

enum Break {
  kNothing,
  kNoProxyFence,   // generic writes that wgmma reads
  kFenceTooEarly,  // before the writes
  kFenceByWriter,  // right too
  kNoBarrier,
  kNoFence,
  kLateWrite,    // of sums between the fence and the product
  kLateOperand,  // of the first operand, likewise
  kNoWait,
  kShortWait,  // one group is left in flight
  kReadEarly,  // sums before the wait
  kReuseA,     // registers before the wait
  kNoCommit,
  kOverwrite,  // shared memory before the wait
  kDifferent,  // descriptors in a warp
  kDifferentWarps,
  kBaseOffset,
  kUnwritten,
};

// out = a * b twice added, a from registers.
template <class T, int kBreak>
__global__ void steps(const float* in, float* out) {
  const u32 b = gpu::shared_address(dynamic()), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (kBreak == kFenceTooEarly) gpu::fence_proxy();
  if (kBreak != kUnwritten || threadIdx.x != 77) place<Swizzle::k128>(b, in + 2048, 64, 64);
  if (kBreak == kFenceByWriter) gpu::fence_proxy();
  if (kBreak != kNoBarrier) __syncthreads();
  if (kBreak != kNoProxyFence && kBreak != kFenceTooEarly && kBreak != kFenceByWriter) gpu::fence_proxy();
  u32 a[4][4];
  const uint16_t* x = reinterpret_cast<const uint16_t*>(in);
  for (int k = 0; k < 4; ++k)
    for (int q = 0; q < 4; ++q)
      memcpy(&a[k][q], x + (16 * warp + lane / 4 + q % 2 * 8) * 64 + 16 * k + lane % 4 * 2 + q / 2 * 8, 4);
  float d[32] = {}, e[32];
  if (kBreak != kNoFence) gpu::multiply_fence();
  if (kBreak == kLateWrite) d[lane] = 0;
  if (kBreak == kLateOperand) a[3][0] |= gridDim.x >> 8;
  for (int turn = 0; turn < 2; ++turn) {
    for (int k = 0; k < 4; ++k) {
      u64 from = across<Swizzle::k128>(b, 64, k);
      if (kBreak == kDifferent) from += lane == 5;
      if (kBreak == kDifferentWarps) from += warp == 2;
      if (kBreak == kBaseOffset) from |= 1ull << 49;
      gpu::multiply_async<T, 64, true>(d, a[k], from, true);
    }
    if (kBreak != kNoCommit) gpu::multiply_commit();
  }
  if (kBreak == kReadEarly) out[0] = d[1];
  if (kBreak == kReuseA) a[2][lane % 4] = 0;
  if (kBreak == kOverwrite) {
    __syncthreads();
    gpu::store_shared4(b + 4 * threadIdx.x, 0);
  }
  memset(e, 0, sizeof e);  // others are free
  if (kBreak == kShortWait)
    gpu::multiply_wait<1>(d);
  else if (kBreak != kNoWait)
    gpu::multiply_wait<0>(d);
  store(out, d, 64);
  if (kBreak == kShortWait) gpu::multiply_wait<0>(d);
}

enum Loss { kNoLoss, kNoReturn, kSoonReturn, kNoArrival, kNoView };

// One warp group copies b, another multiplies, twice in the same place.
template <class T, int kLoss>
__global__ void ring(const float* in, float* out) {
  const u32 a = gpu::shared_address(dynamic()), b = a + 8192, full = b + 8192, empty = full + 8;
  if (threadIdx.x == 0) {
    gpu::barrier_init(full, 128);
    gpu::barrier_init(empty, 128);
  }
  __syncthreads();
  if (gpu::uniform(threadIdx.x / 128) == 1) {
    gpu::fewer_registers<24>();
    for (int turn = 0; turn < 2; ++turn) {
      if (turn && kLoss != kNoReturn) gpu::barrier_wait(empty, turn - 1);
      for (u32 i = threadIdx.x % 128; i < 512; i += 128)
        gpu::copy16(b + Layout<Swizzle::k128>::part(64, i / 8, i % 8),
                    reinterpret_cast<const char*>(in + 2048) + 16 * i, true);
      gpu::arrive_after_copies(full);
    }
    return;
  }
  gpu::more_registers<240>();
  for (u32 i = threadIdx.x; i < 512; i += 128)
    gpu::store_shared16(a + Layout<Swizzle::k128>::part(64, i / 8, i % 8),
                        gpu::load_global16(reinterpret_cast<const char*>(in) + 16 * i));
  gpu::fence_proxy();
  gpu::named_barrier_sync(1, 128);
  float d[32];
  for (int turn = 0; turn < 2; ++turn) {
    if (kLoss != kNoArrival) gpu::barrier_wait(full, turn);
    if (kLoss != kNoView) gpu::fence_proxy();
    gpu::multiply_fence();
    for (int k = 0; k < 4; ++k)
      gpu::multiply_async<T, 64, true>(d, along<Swizzle::k128>(a, 64, k), across<Swizzle::k128>(b, 64, k),
                                       turn > 0 || k > 0);
    gpu::multiply_commit();
    if (kLoss == kSoonReturn) gpu::barrier_arrive(empty);
    gpu::multiply_wait<0>(d);
    if (kLoss != kSoonReturn) gpu::barrier_arrive(empty);
  }
  store(out, d, 64);
}

// What the tensor memory accelerator copies needs no fence of proxies: it is of the same.
template <class T>
__global__ void boxes(const float* in, float* out) {
  const gpu::TensorMap map{reinterpret_cast<const char*>(in), 128, 4 * 128, 0, 0, 4, 32, 64};
  const u32 to = gpu::shared_address(dynamic()), full = to + 16384;
  if (threadIdx.x == 0) gpu::barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    gpu::arrive_and_expect(full, 16384);
    for (int i = 0; i < 8; ++i) gpu::copy_box(to + 2048 * i, map, 0, 4 * i, 0, 0, full);
  }
  gpu::barrier_wait(full, 0);
  float d[32];
  gpu::multiply_fence();
  for (int k = 0; k < 4; ++k)
    gpu::multiply_async<T, 64, true>(d, along<Swizzle::k128>(to, 64, k), across<Swizzle::k128>(to + 8192, 64, k),
                                     k > 0);
  gpu::multiply_commit();
  gpu::multiply_wait<0>(d);
  store(out, d, 64);
}

enum Barrier { kRight, kMissing, kTwice, kCounts, kWrongId, kLost, kArriveOnly };

// Two warp groups hand a block's numbers to and fro by named barriers: x + 1 twice.
template <int kBarrier>
__global__ void turns(const float* in, float* out) {
  const u32 i = threadIdx.x % 128;
  float* x = dynamic();
  if (threadIdx.x < 128) {
    x[i] = in[i];
    if (kBarrier != kLost) gpu::named_barrier_arrive(kBarrier == kWrongId ? 0 : 1, 256);
    if (kBarrier == kTwice) gpu::named_barrier_arrive(1, 256);
    if (kBarrier == kMissing)
      ;
    else if (kBarrier == kArriveOnly)
      gpu::named_barrier_arrive(2, 256);
    else
      gpu::named_barrier_sync(2, kBarrier == kCounts ? 128 : 256);
    out[i] = x[127 - i];
  } else {
    gpu::named_barrier_sync(1, 256);
    x[127 - i] += 1;
    gpu::named_barrier_arrive(2, 256);
  }
}

using B = __nv_bfloat16;
using H = __half;

template <class T, int N, Swizzle kSwizzle>
void all(int across, const float* in, float* out) {
  constexpr int shared = 8192 + 128 * N;
  if (across == 0) return one_block<product<T, N, kSwizzle, false, false>, shared>(in, out);
  if (across == 1) return one_block<product<T, N, kSwizzle, false, true>, shared>(in, out);
  if (across == 2) return one_block<product<T, N, kSwizzle, true, false>, shared>(in, out);
  return one_block<product<T, N, kSwizzle, true, true>, shared>(in, out);
}

template <int kBreak>
constexpr Kernel one_step = one_block<steps<B, kBreak>, 8192>;
template <int kLoss>
constexpr Kernel one_ring = one_block<ring<B, kLoss>, 16400, 256>;
template <int kBarrier>
constexpr Kernel one_turn = one_block<turns<kBarrier>, 512, 256>;

const std::map<std::string, Kernel> kAll = {
    {"steps", one_step<kNothing>},
    {"steps f16", one_block<steps<H, kNothing>, 8192>},
    {"steps, no proxy fence", one_step<kNoProxyFence>},
    {"steps, proxy fence too early", one_step<kFenceTooEarly>},
    {"steps, proxy fence by writers", one_step<kFenceByWriter>},
    {"steps, no barrier", one_step<kNoBarrier>},
    {"steps, no fence", one_step<kNoFence>},
    {"steps, sums written late", one_step<kLateWrite>},
    {"steps, operand written late", one_step<kLateOperand>},
    {"steps, no wait", one_step<kNoWait>},
    {"steps, short wait", one_step<kShortWait>},
    {"steps, read early", one_step<kReadEarly>},
    {"steps, operand reused", one_step<kReuseA>},
    {"steps, no commit", one_step<kNoCommit>},
    {"steps, overwritten", one_step<kOverwrite>},
    {"steps, different descriptors", one_step<kDifferent>},
    {"steps, different warps", one_step<kDifferentWarps>},
    {"steps, base offset", one_step<kBaseOffset>},
    {"steps, unwritten", one_step<kUnwritten>},
    {"ring", one_ring<kNoLoss>},
    {"ring, no return", one_ring<kNoReturn>},
    {"ring, returned too early", one_ring<kSoonReturn>},
    {"ring, no wait", one_ring<kNoArrival>},
    {"ring, no proxy fence", one_ring<kNoView>},
    {"boxes", one_block<boxes<B>, 16392>},
    {"turns", one_turn<kRight>},
    {"turns, missing", one_turn<kMissing>},
    {"turns, twice", one_turn<kTwice>},
    {"turns, counts", one_turn<kCounts>},
    {"turns, wrong id", one_turn<kWrongId>},
    {"turns, lost", one_turn<kLost>},
    {"turns, arrives only", one_turn<kArriveOnly>},
};

std::string message;

template <class F>
const char* caught(unsigned seed, F run) {
  cuda_emulator::set_seed(seed);
  try {
    run();
    message.clear();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace
}  // namespace kernels

using namespace kernels;

extern "C" {

__attribute__((visibility("default"))) const char* run(const char* name, unsigned seed, const float* in, float* out) {
  return caught(seed, [&] { kAll.at(name)(in, out); });
}

// across: 1 rows of b across k, 2 rows of a
__attribute__((visibility("default"))) const char* multiply(unsigned seed, bool wide, int swizzle, int across,
                                                            const float* in, float* out) {
  using Run = void (*)(int, const float*, float*);
  constexpr Run kRuns[2][4] = {
      {all<B, 64, Swizzle::kNone>, all<B, 64, Swizzle::k128>, all<B, 64, Swizzle::k64>, all<B, 64, Swizzle::k32>},
      {all<B, 128, Swizzle::kNone>, all<B, 128, Swizzle::k128>, all<B, 128, Swizzle::k64>, all<B, 128, Swizzle::k32>}};
  return caught(seed, [&] { kRuns[wide][swizzle](across, in, out); });
}

__attribute__((visibility("default"))) u64 descriptor(u32 at, u32 leading, u32 stride, int swizzle) {
  return matrix_descriptor(at, leading, stride, static_cast<Swizzle>(swizzle));
}
}
