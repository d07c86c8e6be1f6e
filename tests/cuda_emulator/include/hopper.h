// Instructions that only compute capability 9.0 has, and named barriers, on the emulator: wgmma, proxies, registers of
// warp groups.
#pragma once

#include "../wgmma.h"
#include "tensor_cores.h"

namespace gpu {

using u64 = uint64_t;

inline float widen(uint16_t x, __nv_bfloat16*) { return __bfloat162float({x}); }
inline float widen(uint16_t x, __half*) { return __half2float({x}); }

// d = a * b, or += if add: 64 x 16 by 16 x N, a warp group's. kAcross: rows in shared memory run across k.
template <class T, int N, bool kAcrossB, bool kAcrossA = false>
void multiply_async(float (&d)[N / 2], u64 a, u64 b, bool add) {
  static_assert(N % 8 == 0 && N <= 256);
  const auto widen = [](uint16_t x) { return gpu::widen(x, static_cast<T*>(nullptr)); };
  cuda_emulator::wgmma::multiply({d, N, nullptr, a, b, kAcrossA, kAcrossB, add, widen});
}
template <class T, int N, bool kAcrossB>
void multiply_async(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool add) {
  static_assert(N % 8 == 0 && N <= 256);
  const auto widen = [](uint16_t x) { return gpu::widen(x, static_cast<T*>(nullptr)); };
  cuda_emulator::wgmma::multiply({d, N, a, 0, b, false, kAcrossB, add, widen});
}
inline void multiply_fence() { cuda_emulator::wgmma::fence(); }
inline void multiply_commit() { cuda_emulator::wgmma::commit(); }
// Until no more than kLeft groups are in flight; `d` is what may be read then.
template <int kLeft, int N>
void multiply_wait(float (&)[N]) {
  cuda_emulator::wgmma::wait(kLeft);
}
// Before a fence: what has been written to registers stays before it.
template <class T>
void settle(T&) {}

inline void divide(bool) {}

template <class T>
u32 max_packed(u32 x, u32 y, T* type) {
  const float2 a = unpack(x, type), b = unpack(y, type);
  return pack_as(fmaxf(a.x, b.x), fmaxf(a.y, b.y), type);
}

inline void fence_proxy() { cuda_emulator::wgmma::fence_proxy(); }
inline void named_barrier_sync(int id, int threads) { cuda_emulator::synchronize_named(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { cuda_emulator::synchronize_named(id, threads, false); }
template <int kCount>
void more_registers() {
  cuda_emulator::wgmma::set_registers(kCount);
}
template <int kCount>
void fewer_registers() {
  cuda_emulator::wgmma::set_registers(kCount);
}

}  // namespace gpu
