// Elements in device memory: what each dtype is computed in, and packs that one instruction moves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtype.h"

namespace cogview::cuda {

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<
        kBytes == 8, uint2,
        std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, unsigned short, unsigned char>>>>;

// W elements side by side, aligned to their common size. Whole words: halves of their own would take twice the
// registers.
template <class T, int W>
struct Pack {
  Word<W * sizeof(T)> bits;

  __device__ static Pack of(const T (&x)[W]) {
    Pack pack;
    memcpy(&pack, x, sizeof pack);
    return pack;
  }
  __device__ void to(T (&x)[W]) const { memcpy(x, &bits, sizeof bits); }
};

template <class T, int W>
__device__ void widen(const Pack<T, W>& pack, Acc<T> (&x)[W]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && W % 2 == 0) {  // its bits are a float's upper half
    uint32_t words[W / 2];
    memcpy(words, &pack, sizeof pack);
    for (int q = 0; q < W / 2; ++q) {
      const uint32_t two[2] = {words[q] << 16, words[q] & 0xffff0000u};
      memcpy(x + 2 * q, two, sizeof two);
    }
  } else {
    T at[W];
    pack.to(at);
    for (int l = 0; l < W; ++l) x[l] = widen(at[l]);
  }
}

template <class T, int W>
__device__ Pack<T, W> narrow(const Acc<T> (&x)[W]) {
  T at[W];
  for (int l = 0; l < W; ++l) at[l] = narrow<T>(x[l]);
  return Pack<T, W>::of(at);
}

// 16 bytes; neighbouring threads load doubles one by one as quickly.
template <class T>
constexpr int kPackWidth = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

// Of memory that nothing writes while the kernel runs.
template <int W, class T>
__device__ Pack<T, W> load(const T* x) {
  return {__ldg(reinterpret_cast<const decltype(Pack<T, W>::bits)*>(x))};
}

// Towards the L2 cache; nothing waits for it.
__device__ inline void prefetch(const void* x) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x));
#endif
}

template <class T, int W>
__device__ void store(T* y, const Pack<T, W>& pack) {
  *reinterpret_cast<decltype(pack.bits)*>(y) = pack.bits;
}

// The same where a pack may begin anywhere and end early: elements from `left` on are zeros, and are not stored. So
// which thread has which column does not depend on the layout, and neither does a bit of the result.
template <bool kAligned, int W, class T>
__device__ Pack<T, W> load(const T* x, int left) {
  if constexpr (kAligned) {
    return load<W>(x);
  } else {
    T at[W];
    for (int l = 0; l < W; ++l) at[l] = l < left ? x[l] : narrow<T>(0);
    return Pack<T, W>::of(at);
  }
}

template <bool kAligned, class T, int W>
__device__ void store(T* y, const Pack<T, W>& pack, int left) {
  if constexpr (kAligned) {
    store(y, pack);
  } else {
    T at[W];
    pack.to(at);
    for (int l = 0; l < W; ++l)
      if (l < left) y[l] = at[l];
  }
}

template <Dtype dtype>
using One = std::conditional_t<
    dtype == Dtype::f64, double,
    std::conditional_t<dtype == Dtype::f32, float, std::conditional_t<dtype == Dtype::bf16, __nv_bfloat16, __half>>>;

// Calls f with a value of the dtype's type. COGVIEW_ONE_DTYPE: for quick looks at what the compiler makes of one.
template <class F>
cudaError_t by_dtype(Dtype dtype, F f) {
#ifdef COGVIEW_ONE_DTYPE
  return dtype == Dtype::COGVIEW_ONE_DTYPE ? f(One<Dtype::COGVIEW_ONE_DTYPE>{}) : cudaErrorInvalidValue;
#else
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(__nv_bfloat16{});
    case Dtype::f16:
      return f(__half{});
  }
  return cudaErrorInvalidValue;
#endif
}

// The same for kernels that take 16 bits only.
template <class F>
cudaError_t by_narrow_dtype(Dtype dtype, F f) {
  return by_dtype(dtype, [&](auto one) {
    if constexpr (sizeof one == 2)
      return f(one);
    else
      return cudaErrorInvalidValue;
  });
}

}  // namespace cogview::cuda
