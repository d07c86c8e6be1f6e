// What csrc/cuda uses of the CUDA language: on the emulator, kernels are C++ functions that fibers call.
//
// A block's shared memory is thread-local: C++ then takes both forms of it, `__shared__ T x[n];` in a function, which
// is static, and `extern __shared__ T x[];`. Fibers are all on the thread that launched them.
#pragma once

#include <math.h>
#include <cstdint>
#include <tuple>
#include <utility>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  auto body = [&] { std::apply(kernel, copies); };
  const auto call = [](void* context) { (*static_cast<decltype(body)*>(context))(); };
  return cuda_emulator::launch(*config, reinterpret_cast<const void*>(kernel), call, &body);
}

inline void __syncthreads() { cuda_emulator::synchronize_block(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_emulator::synchronize_warp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_emulator::shuffle("__shfl_sync", mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return cuda_emulator::shuffle("__shfl_xor_sync", mask, value, cuda_emulator::lane() ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int from = cuda_emulator::lane() - static_cast<int>(by);
  return cuda_emulator::shuffle("__shfl_up_sync", mask, value, from < 0 ? cuda_emulator::lane() : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int from = cuda_emulator::lane() + static_cast<int>(by);
  return cuda_emulator::shuffle("__shfl_down_sync", mask, value, from > 31 ? cuda_emulator::lane() : from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Lane {
    int in;
    unsigned out;
  } mine{predicate, 0};
  cuda_emulator::meet("__ballot_sync", mask, &mine, [](unsigned mask, void* const* lanes) {
    unsigned all = 0;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) all |= unsigned(static_cast<const Lane*>(lanes[l])->in != 0) << l;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) static_cast<Lane*>(lanes[l])->out = all;
  });
  return mine.out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T __ldg(const T* x) {
  return *x;
}

template <class T>
T atomicMax(T* to, T x) {
  return cuda_emulator::atomic(to, [x](T old) { return old < x ? x : old; });
}
template <class T>
T atomicAdd(T* to, T x) {
  return cuda_emulator::atomic(to, [x](T old) { return old + x; });
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }  // of a number and NaN: the number
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
