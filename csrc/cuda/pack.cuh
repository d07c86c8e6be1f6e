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

// W elements side by side, aligned to their common size.
template <class T, int W>
struct alignas(W * sizeof(T)) Pack {
  T at[W];
};

// 16 bytes; neighbouring threads load doubles one by one as quickly.
template <class T>
constexpr int kPackWidth = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<
        kBytes == 8, uint2,
        std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, unsigned short, unsigned char>>>>;

// Of memory that nothing writes while the kernel runs.
template <int W, class T>
__device__ Pack<T, W> load(const T* x) {
  using Raw = Word<sizeof(Pack<T, W>)>;
  static_assert(sizeof(Raw) == sizeof(Pack<T, W>));
  const Raw raw = __ldg(reinterpret_cast<const Raw*>(x));
  Pack<T, W> pack;
  memcpy(&pack, &raw, sizeof raw);
  return pack;
}

template <class T, int W>
__device__ void store(T* y, const Pack<T, W>& pack) {
  Word<sizeof pack> raw;
  memcpy(&raw, &pack, sizeof raw);
  *reinterpret_cast<decltype(raw)*>(y) = raw;
}

// The same where a pack may begin anywhere and end early: elements from `left` on are zeros, and are not stored. So
// which thread has which column does not depend on the layout, and neither does a bit of the result.
template <bool kAligned, int W, class T>
__device__ Pack<T, W> load(const T* x, int left) {
  if constexpr (kAligned) {
    return load<W>(x);
  } else {
    Pack<T, W> pack;
    for (int l = 0; l < W; ++l) pack.at[l] = l < left ? load<1>(x + l).at[0] : narrow<T>(0);
    return pack;
  }
}

template <bool kAligned, class T, int W>
__device__ void store(T* y, const Pack<T, W>& pack, int left) {
  if constexpr (kAligned) {
    store(y, pack);
  } else {
    for (int l = 0; l < W; ++l)
      if (l < left) y[l] = pack.at[l];
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

}  // namespace cogview::cuda
