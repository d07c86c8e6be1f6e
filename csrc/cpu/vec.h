// Vectors as wide as the instruction set this file is compiled for, and conversion of every dtype to and from them.
// GCC vector extensions: one source for AVX-512, AVX2, SSE2 and Arm. Included by kernel files only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../dtype.h"

#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver log,log@GLIBC_2.2.5");  // glibc 2.29's gives the same, and older systems lack it
#endif

namespace cogview {
namespace COGVIEW_ISA {
namespace {

#if defined(__AVX512BF16__) && !defined(COGVIEW_PAIRS)
#define COGVIEW_PAIRS  // bfloat16 is multiplied in pairs: see pairs.h
#endif
#if defined(__AVX512F__) || defined(COGVIEW_PAIRS)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// A loop over a few vectors, unrolled before all else, so that arrays of vectors are registers, not memory.
#define COGVIEW_UNROLL(i, count) _Pragma("GCC unroll 64") for (int i = 0; i < (count); ++i)

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Traits {
  using Acc = float;
};
template <>
struct Traits<double> {
  using Acc = double;
};
// What a dtype is accumulated in.
template <class T>
using Acc = typename Traits<T>::Acc;

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef double VecD __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVecBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));

template <class A>
struct VecOf {
  using type = VecF;
  using Int = VecI32;
  using Lane = int32_t;
};
template <>
struct VecOf<double> {
  using type = VecD;
  using Int = VecI64;
  using Lane = int64_t;
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
using VecInt = typename VecOf<A>::Int;
template <class A>
constexpr int kLanes = kVecBytes / int(sizeof(A));

template <class To, class From>
inline To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};
}

// f(a number of the dtype).
template <class F>
inline auto by_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f64:
      return f(double{});
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(BFloat16{});
    case Dtype::f16:
      return f(Half{});
  }
  __builtin_trap();  // a dtype that is missing above does not compile
}

// ---- load and store, converting ----

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline VecD load(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline VecF load(const BFloat16* p) {
#if defined(__AVX512F__)  // GCC 12 makes two halves of a conversion
  const VecU32 w = bits_as<VecU32>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  const VecU32 w = bits_as<VecU32>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecU16 h;
  std::memcpy(&h, p, sizeof h);
  const VecU32 w = __builtin_convertvector(h, VecU32);
#endif
  return bits_as<VecF>(w << 16);
}
inline VecF load(const Half* p) {
#if defined(__AVX512F__)
  return bits_as<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bits_as<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecU16 h;
  std::memcpy(&h, p, sizeof h);
  const VecU32 w = __builtin_convertvector(h, VecU32);
  const VecU32 magnitude = (w & 0x7fff) << 13;
  // shifting the exponent by a multiplication also normalises subnormals
  const VecF scaled = bits_as<VecF>(magnitude) * 0x1p112f;
  const VecU32 special = bits_as<VecU32>((w & 0x7c00) == 0x7c00) & 0x7f800000u;
  return bits_as<VecF>(bits_as<VecU32>(scaled) | special | (w & 0x8000) << 16);
#endif
}

inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, VecD v) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, VecF v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(bits_as<__m512>(v));  // numbers below the normal range become 0
  std::memcpy(static_cast<void*>(p), &h, sizeof h);
#else
  const VecU32 w = bits_as<VecU32>(v);
  const VecU32 rounded = (w + 0x7fff + (w >> 16 & 1)) >> 16;
  const VecU32 nan = bits_as<VecU32>(v != v);
  const VecU16 h = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), VecU16);
  std::memcpy(p, &h, sizeof h);
#endif
}
inline void store(Half* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU32 w = bits_as<VecU32>(v), sign = w >> 16 & 0x8000, a = w & 0x7fffffff;
  // normal: round the mantissa to nearest even; subnormal: let a float addition round it; then overflow and NaN
  const VecU32 normal = (a - 0x38000000u + 0xfff + (a >> 13 & 1)) >> 13;
  const VecU32 subnormal = bits_as<VecU32>(bits_as<VecF>(a) + 0.5f) - 0x3f000000u;
  const VecU32 small = bits_as<VecU32>(a < 0x38800000u), large = bits_as<VecU32>(a >= 0x477ff000u);
  const VecU32 nan = bits_as<VecU32>(a > 0x7f800000u);
  VecU32 r = (subnormal & small) | (normal & ~small);
  r = (r & ~large) | (0x7c00 & large);
  const VecU16 h = __builtin_convertvector(r | (0x200 & nan) | sign, VecU16);
  std::memcpy(p, &h, sizeof h);
#endif
}

// Writes a vector around the caches; p is aligned to it. What another thread reads needs a `stream_fence` before.
inline void stream(void* p, VecU32 v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), bits_as<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), bits_as<__m256i>(v));
#elif defined(__SSE2__)
  __m128i piece[kVecBytes / 16];
  std::memcpy(piece, &v, sizeof v);
  for (int i = 0; i < kVecBytes / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(p) + i, piece[i]);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Copies the first n of a vector's elements between memory and a whole vector in a buffer, whose rest becomes zero.
template <class T>
inline void copy_partial(T* buffer, const T* p, int64_t n) {
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(T) == 8)
    _mm512_storeu_pd(buffer, _mm512_maskz_loadu_pd(__mmask8(mask), p));
  else if constexpr (sizeof(T) == 4)
    _mm512_storeu_ps(buffer, _mm512_maskz_loadu_ps(__mmask16(mask), p));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(__mmask16(mask), p));
#else
  for (int64_t i = 0; i < kLanes<Acc<T>>; ++i) buffer[i] = i < n ? p[i] : T{};
#endif
}

// The first n elements; the rest of the vector is zero.
template <class T>
inline Vec<Acc<T>> load_partial(const T* p, int64_t n) {
  T buffer[kLanes<Acc<T>>];
  copy_partial(buffer, p, n);
  return load(buffer);
}
template <class T>
inline void store_partial(T* p, Vec<Acc<T>> v, int64_t n) {
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_pd(p, __mmask8(mask), _mm512_loadu_pd(buffer));
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16(mask), _mm512_loadu_ps(buffer));
  else
    _mm256_mask_storeu_epi16(p, __mmask16(mask), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
#else
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// ---- arithmetic ----

// While one lives, results below the normal range are 0: in full they take a hundred times as long.
class FlushToZero {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();

 public:
  FlushToZero() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before); }
#else
 public:
  ~FlushToZero() {}
#endif
};

template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)  // the same, down to NaN, in an instruction that GCC does not find
inline VecF vmax(VecF a, VecF b) { return bits_as<VecF>(_mm512_max_ps(bits_as<__m512>(a), bits_as<__m512>(b))); }
#endif

// All lanes into one by a fixed tree, lower half with upper, so that a sum does not depend on the compiler.
template <class V, class F>
inline auto fold(V v, F f) {
  using A = std::decay_t<decltype(v[0])>;
  if constexpr (sizeof(V) > 16) {
    typedef A Narrower __attribute__((vector_size(sizeof(V) / 2)));
    Narrower halves[2];
    std::memcpy(halves, &v, sizeof v);
    return fold(f(halves[0], halves[1]), f);
  } else if constexpr (sizeof(A) == 8) {
    return f(v[0], v[1]);
  } else {
    return f(f(v[0], v[2]), f(v[1], v[3]));
  }
}
template <class V>
inline auto hmax(V v) {
  return fold(v, [](auto a, auto b) { return vmax(a, b); });
}
template <class V>
inline auto hsum(V v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}

#if defined(__AVX512F__)
// 16 x 16 of 32-bit elements.
inline void transpose_block(__m512i* r) {
  __m512i t[16];
  COGVIEW_UNROLL(i, 8) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  COGVIEW_UNROLL(q, 4) {
    const int i = 4 * q;
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  COGVIEW_UNROLL(j, 4) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  COGVIEW_UNROLL(j, 4) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}
#endif

// w vectors of w accumulators, transposed.
template <class A>
inline void transpose(Vec<A>* x) {
  constexpr int w = kLanes<A>;
#if defined(__AVX512F__)
  if constexpr (w == 16) {
    __m512i r[16];
    COGVIEW_UNROLL(i, 16) r[i] = bits_as<__m512i>(x[i]);
    transpose_block(r);
    COGVIEW_UNROLL(i, 16) x[i] = bits_as<Vec<A>>(r[i]);
    return;
  }
#endif
  for (int i = 0; i < w; ++i)
    for (int j = 0; j < i; ++j) {
      const A t = x[i][j];
      x[i][j] = x[j][i], x[j][i] = t;
    }
}

// Lane i of the result is v[i] where bit i is set, else `other`.
template <class A>
inline Vec<A> select_bits(uint64_t bits, Vec<A> v, A other) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return bits_as<VecF>(_mm512_mask_mov_ps(_mm512_set1_ps(other), __mmask16(bits), bits_as<__m512>(v)));
  else
    return bits_as<VecD>(_mm512_mask_mov_pd(_mm512_set1_pd(other), __mmask8(bits), bits_as<__m512d>(v)));
#else
  VecInt<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = typename VecOf<A>::Lane(1) << i;
  const VecInt<A> on = (lane & typename VecOf<A>::Lane(bits)) != 0;
  return on ? v : splat<A>(other);
#endif
}

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;
// What 2^x has to be known to, for results that are rounded to a dtype.
template <class T>
constexpr int kExpDegree = sizeof(T) == 2 ? 4 : 6;

// 2^f for f in [0, 1] by the polynomial of least relative error: 3e-6 or 2e-9.
template <int degree>
inline VecF exp2_poly(VecF f) {
  static_assert(degree == 4 || degree == 6);
  constexpr float c4[] = {0.0135341678f, 0.0520114638f, 0.241442755f, 0.693003833f, 1.00000262f};
  constexpr float c6[] = {
      0.000217022549f, 0.00124396884f, 0.00967884064f, 0.0554833412f, 0.24022983f, 0.693147004f, 1.0f};
  const float* c = degree == 4 ? c4 : c6;
  VecF p = splat(c[0]);
  for (int i = 1; i <= degree; ++i) p = p * f + c[i];
  return p;
}
// 2^x; 0 below the normal range; NaN stays NaN.
template <int degree = 6>
inline VecF exp2v(VecF x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  // the fraction, and scaling by the rest, are an instruction each; both take infinities and NaN as they should be
  const VecF f = bits_as<VecF>(_mm512_reduce_ps(bits_as<__m512>(x), _MM_FROUND_TO_NEG_INF));
  return bits_as<VecF>(_mm512_scalef_ps(bits_as<__m512>(exp2_poly<degree>(f)), bits_as<__m512>(x)));
#else
  const VecF clamped = x < -126.5f ? splat(-126.5f) : (x > 128.0f ? splat(128.0f) : x);
  const VecF magic = splat(0x1.8p23f);
  const VecF shifted = clamped - 0.5f + magic;
  // floor(x) in [-127, 128]: the factor is 2^-127 = 0 after the shift, up to infinity
  const VecI32 exponent = bits_as<VecI32>(shifted) - bits_as<VecI32>(magic) + 127;
  return exp2_poly<degree>(clamped - (shifted - magic)) * bits_as<VecF>(exponent << 23);
#endif
}
template <int degree = 13>
inline VecD exp2v(VecD x) {
  const VecD clamped = x < -1023.0 ? splat(-1023.0) : (x > 1024.0 ? splat(1024.0) : x);
  const VecD magic = splat(0x1.8p52);
  const VecD shifted = clamped + magic, f = (clamped - (shifted - magic)) * 0.693147180559945309417;
  VecD p = splat(1.0 / 6227020800.0);  // Taylor of e^f to f^13: |f| <= ln(2) / 2, remainder 4e-18
  constexpr double kInverseFactorial[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  for (double c : kInverseFactorial) p = p * f + c;
  const VecI64 exponent = bits_as<VecI64>(shifted) - bits_as<VecI64>(magic) + 1023;
  return p * bits_as<VecD>(exponent << 52);
}
// log(x) of positive numbers in the normal range, infinity and NaN.
inline VecF logv(VecF x) {
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh((m - 1) / (m + 1))
  const VecI32 bits = bits_as<VecI32>(x), e = (bits - 0x3f3504f3) >> 23;
  const VecF m = bits_as<VecF>(bits - (e << 23)), s = (m - 1) / (m + 1), z = s * s;
  const VecF p = ((2.0f / 9 * z + 2.0f / 7) * z + 2.0f / 5) * z + 2.0f / 3;
  const VecF y = __builtin_convertvector(e, VecF) * 0.693147180559945309f + (p * z * s + 2 * s);
  return x - x == 0 ? y : x;
}
inline VecD logv(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
