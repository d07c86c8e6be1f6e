// Pairs of bfloat16, which are multiplied two at a time. AVX512-BF16 has an instruction for each of these; elsewhere
// the kernels do not use them, but tests do: they compile the kernels with COGVIEW_PAIRS for processors that have none.
// Included by kernel files only.
#pragma once

#include "vec.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// 32 numbers: 16 pairs.
typedef uint16_t Pairs __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));  // one for each pair

inline Pairs load_pairs(const BFloat16* p) {
  Pairs x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_pairs(void* p, Pairs x) { std::memcpy(p, &x, sizeof x); }
inline Pairs ones() { return Pairs{} + uint16_t(0x3f80); }

#if defined(__AVX512BF16__)

// The first n numbers, then zeros.
inline Pairs load_pairs(const BFloat16* p, int n) {
  return n >= 32 ? load_pairs(p) : bits_as<Pairs>(_mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p));
}
// Two vectors of numbers rounded to nearest even, one behind the other; numbers below the normal range become 0.
inline Pairs to_pairs(Floats lo, Floats hi) {
  return bits_as<Pairs>(_mm512_cvtne2ps_pbh(bits_as<__m512>(hi), bits_as<__m512>(lo)));
}
// The same numbers, of each half.
inline Floats low_half(Pairs x) {
  return bits_as<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits_as<__m512i>(x))), 16));
}
inline Floats high_half(Pairs x) {
  return bits_as<Floats>(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits_as<__m512i>(x), 1)), 16));
}
// Number i of two vectors beside each other, for i in order: the first 16 pairs and the others.
inline void interleave(Pairs even, Pairs odd, Pairs* out) {
  alignas(64) static constexpr uint16_t kOrder[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  COGVIEW_UNROLL(i, 2)
    out[i] = bits_as<Pairs>(
        _mm512_permutex2var_epi16(bits_as<__m512i>(even), _mm512_load_si512(kOrder + i * 32), bits_as<__m512i>(odd)));
}
// The two halves of a vector, number by number beside each other.
inline Pairs interleave_halves(Pairs x) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return bits_as<Pairs>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), bits_as<__m512i>(x)));
}
// Numbers 0 and 1 of each pair apart.
inline void separate(Pairs x, BFloat16* even, BFloat16* odd) {
  const auto bits = bits_as<__m512i>(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_cvtepi32_epi16(bits));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}
// 16 x 16 pairs.
inline void transpose_pairs(Pairs* x) { transpose_block(reinterpret_cast<__m512i*>(x)); }
// One pair, 16 times.
inline Pairs spread_pair(const void* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits_as<Pairs>(_mm512_set1_epi32(bits));
}
// sum + the product of numbers 1 of each pair, + that of numbers 0; below the normal range all are 0.
inline Floats dot_pairs(Floats sum, Pairs x, Pairs y) {
  return bits_as<Floats>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(x), bits_as<__m512bh>(y)));
}

#else

typedef uint32_t PairBits __attribute__((vector_size(64), may_alias));

// What is below the normal range is 0.
inline Floats flushed(Floats x) {
  const PairBits bits = bits_as<PairBits>(x), normal = bits_as<PairBits>((bits & 0x7f800000u) != 0);
  return bits_as<Floats>(bits & (normal | 0x80000000u));
}
inline Pairs load_pairs(const BFloat16* p, int n) {
  Pairs x{};
  std::memcpy(&x, p, sizeof(BFloat16) * (n < 32 ? n : 32));
  return x;
}
inline Pairs to_pairs(Floats lo, Floats hi) {
  const Floats both[2] = {flushed(lo), flushed(hi)};
  Pairs x;
  for (int i = 0; i < 32; ++i) {
    const float value = both[i / 16][i % 16];
    const uint32_t w = bits_as<uint32_t>(value);
    x[i] = uint16_t(value != value ? w >> 16 | 0x40 : (w + 0x7fff + (w >> 16 & 1)) >> 16);
  }
  return x;
}
inline Floats low_half(Pairs x) {
  PairBits w;
  for (int i = 0; i < 16; ++i) w[i] = uint32_t(x[i]) << 16;
  return bits_as<Floats>(w);
}
inline Floats high_half(Pairs x) {
  PairBits w;
  for (int i = 0; i < 16; ++i) w[i] = uint32_t(x[16 + i]) << 16;
  return bits_as<Floats>(w);
}
inline void interleave(Pairs even, Pairs odd, Pairs* out) {
  for (int i = 0; i < 32; ++i) out[i / 16][i % 16 * 2] = even[i], out[i / 16][i % 16 * 2 + 1] = odd[i];
}
inline Pairs interleave_halves(Pairs x) {
  Pairs out;
  for (int i = 0; i < 16; ++i) out[2 * i] = x[i], out[2 * i + 1] = x[16 + i];
  return out;
}
inline void separate(Pairs x, BFloat16* even, BFloat16* odd) {
  for (int i = 0; i < 16; ++i) even[i].bits = x[2 * i], odd[i].bits = x[2 * i + 1];
}
inline void transpose_pairs(Pairs* x) {
  const auto bits = reinterpret_cast<PairBits*>(x);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t t = bits[i][j];
      bits[i][j] = bits[j][i], bits[j][i] = t;
    }
}
inline Pairs spread_pair(const void* pair) {
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits_as<Pairs>(PairBits{} + bits);
}
inline Floats even_numbers(Pairs x) { return flushed(bits_as<Floats>(bits_as<PairBits>(x) << 16)); }
inline Floats odd_numbers(Pairs x) { return flushed(bits_as<Floats>(bits_as<PairBits>(x) & 0xffff0000u)); }
inline Floats dot_pairs(Floats sum, Pairs x, Pairs y) {
  // products of two bfloat16 are exact
  sum = flushed(flushed(sum) + flushed(odd_numbers(x) * odd_numbers(y)));
  return flushed(sum + flushed(even_numbers(x) * even_numbers(y)));
}

#endif

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
