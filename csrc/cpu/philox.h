// Dropout masks from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): element i
// of what a seed drops, in raster order, uses word i % 4 of counter i / 4. Included by kernel files only.
#pragma once

#include "vec.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int kCounters = kVecBytes / 8;  // at a time
constexpr int kPhiloxWords = 4 * kCounters;

// Product of the low halves of 64-bit lanes.
inline VecU64 multiply_low(VecU64 a, uint32_t b) {
#if defined(__AVX512F__)
  return bits_as<VecU64>(_mm512_mul_epu32(bits_as<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bits_as<VecU64>(_mm256_mul_epu32(bits_as<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bits_as<VecU64>(_mm_mul_epu32(bits_as<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffff) * b;
#endif
}

// Where lane l's counter comes among those of its vector: even lanes first, so that pairs of lanes unpack in order.
constexpr int counter_of(int l) { return l / 2 + l % 2 * (kCounters / 2); }

// The words of counters [first, first + kCounters), in order.
inline void philox(uint64_t seed, uint64_t first, uint32_t* words) {
  VecU64 c0, c1, c2{}, c3{};  // only the low halves count
  for (int l = 0; l < kCounters; ++l) c0[l] = first + counter_of(l);
  c1 = c0 >> 32;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const VecU64 p0 = multiply_low(c0, 0xD2511F53), p1 = multiply_low(c2, 0xCD9E8D57);
    c0 = p1 >> 32 ^ c1 ^ k0;
    c1 = p1;
    c2 = p0 >> 32 ^ c3 ^ k1;
    c3 = p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const VecU64 low = VecU64{} + 0xffffffff;
  const VecU64 a = (c0 & low) | c1 << 32, b = (c2 & low) | c3 << 32;  // words 0 1 and 2 3 of every counter
#if defined(__AVX512F__)
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64(bits_as<__m512i>(a), bits_as<__m512i>(b)));
  _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(bits_as<__m512i>(a), bits_as<__m512i>(b)));
#elif defined(__AVX2__)
  __m256i* to = reinterpret_cast<__m256i*>(words);
  _mm256_storeu_si256(to, _mm256_unpacklo_epi64(bits_as<__m256i>(a), bits_as<__m256i>(b)));
  _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(bits_as<__m256i>(a), bits_as<__m256i>(b)));
#else
  for (int l = 0; l < kCounters; ++l) {
    const uint64_t pair[2] = {a[l], b[l]};
    std::memcpy(words + 4 * counter_of(l), pair, sizeof pair);
  }
#endif
}

// Factors of n elements from element `at` on: 0 where dropped, `scale` where kept, that is where the word is at least
// `threshold`. Writes to `buffer`, which has room for n + 2 * kPhiloxWords; returns where the first one is.
template <class A>
inline const A* dropout_factors(uint64_t seed, uint32_t threshold, A scale, int64_t at, int64_t n, A* buffer) {
  const int64_t skip = at % 4;
  for (int64_t j = 0; j < skip + n; j += kPhiloxWords) {
    uint32_t words[kPhiloxWords];
    philox(seed, uint64_t(at / 4 + j / 4), words);
    for (int t = 0; t < kPhiloxWords; ++t) buffer[j + t] = words[t] < threshold ? A(0) : scale;
  }
  return buffer + skip;
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
