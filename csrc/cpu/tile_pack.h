// Rows packed into operands of products, and results back.
#pragma once

#include "tile_gemm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

#if defined(__AVX512BF16__)
// Two vectors of 16 numbers in bfloat16, one behind the other.
inline __m512i two_rows(VecF lo, VecF hi) {
  return bits_as<__m512i>(_mm512_cvtne2ps_pbh(bits_as<__m512>(hi), bits_as<__m512>(lo)));
}
// Two vectors of 16 numbers as parts of 32 each.
template <int parts>
inline void split(VecF lo, VecF hi, __m512i* out) {
  COGVIEW_UNROLL(i, parts) {
    out[i] = two_rows(lo, hi);
    if (i + 1 == parts) return;
    lo -= bits_as<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(out[i])), 16));
    hi -= bits_as<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(out[i], 1)), 16));
  }
}
// The first n (at most 32) elements from p as parts; the rest is zero.
template <class T>
inline void load_parts(const T* p, int n, __m512i* out) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    *out = n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p);
  } else if (n >= 32) {
    split<kParts<T>>(load(p), load(p + 16), out);
  } else {
    const int rest = n > 16 ? n - 16 : 0;
    split<kParts<T>>(load_partial(p, n - rest), rest ? load_partial(p + 16, rest) : VecF{}, out);
  }
}
// 32 elements of row r from column j on, as parts; zeros where there are none.
template <class T>
inline void row_parts(const RowSet<T>& x, int r, int j, int d, __m512i* out) {
  if (r < x.count)
    load_parts(x.row(r) + j, d - j, out);
  else
    COGVIEW_UNROLL(i, kParts<T>) out[i] = _mm512_setzero_si512();
}
// 32 columns of two rows, column by column beside each other.
inline void interleave(__m512i even, __m512i odd, __m512i* out) {
  alignas(64) static constexpr uint16_t kOrder[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  COGVIEW_UNROLL(i, 2) out[i] = _mm512_permutex2var_epi16(even, _mm512_load_si512(kOrder + i * 32), odd);
}
#endif

// One row of d elements, converted and padded with zeros to ld.
template <class T>
inline void copy_row(const T* x, int d, Operand<T>* out, int ld, int64_t plane) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    for (int j = 0; j < ld; j += 32) {
      __m512i part[kParts<T>];
      load_parts(x + j, d - j, part);
      for (int i = 0; i < kParts<T>; ++i) _mm512_storeu_si512(out + i * plane + j, part[i]);
    }
    return;
  }
#endif
  constexpr int w = kLanes<Acc<T>>;
  int j = 0;
  if constexpr (!kPaired<T>) {
    for (; j + w <= d; j += w) store(out + j, load(x + j));
    if (j < d) store(out + j, load_partial(x + j, d - j)), j += w;
    for (; j < ld; j += w) store(out + j, Vec<Acc<T>>{});
  }
}

// A operand [rows, ld]: rows as they are; those beyond the count are zero.
template <class T>
void pack_a(const RowSet<T>& x, int rows, int d, Operand<T>* out, int ld, int64_t plane) {
  for (int r = 0; r < x.count; ++r) copy_row<T>(x.row(r), d, out + r * ld, ld, plane);
  for (int i = 0; i < kPlanes<T> && rows > x.count; ++i)
    std::memset(static_cast<void*>(out + i * plane + x.count * ld), 0,
                int64_t(rows - x.count) * ld * sizeof(Operand<T>));
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

// B operand of the transpose, [ld, 64], of up to 64 rows; the rest is zero.
template <class T>
void pack_transposed(const RowSet<T>& x, int d, Operand<T>* out, int ld) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    constexpr int parts = kParts<T>;
    for (int first = 0; first < kTile; first += 16)
      for (int j = 0; j < ld; j += 32) {
        __m512i part[parts], r[parts][16];
        COGVIEW_UNROLL(c, 16) {
          row_parts(x, first + c, j, d, part);
          COGVIEW_UNROLL(i, parts) r[i][c] = part[i];
        }
        COGVIEW_UNROLL(i, parts) {
          BFloat16* block = out + i * int64_t(ld) * kTile + j * kTile + first * 32;
          transpose_block(r[i]);  // a pair of elements moves as one
          COGVIEW_UNROLL(c, 16) _mm512_storeu_si512(block + c * 32, r[i][c]);
        }
      }
    return;
  }
#endif
  if constexpr (!kPaired<T>) {
    using A = Acc<T>;
    constexpr int w = kLanes<A>;
    for (int first = 0; first < kTile; first += w)
      for (int j = 0; j < ld; j += w) {
        Vec<A> r[w];
        COGVIEW_UNROLL(c, w) {
          const int n = first + c < x.count ? d - j : 0;
          r[c] = n >= w ? load(x.row(first + c) + j) : n > 0 ? load_partial(x.row(first + c) + j, n) : Vec<A>{};
        }
        transpose<A>(r);
        COGVIEW_UNROLL(c, w) store(out + (j + c) * kTile + first, r[c]);
      }
  }
}

// A operand of the transpose, [ld, 64], of up to 64 rows; `room` takes as much as `out`.
template <class T>
void pack_a_transposed(const RowSet<T>& x, int d, Operand<T>* out, int ld, Operand<T>* room) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    pack_transposed(x, d, room, ld);
    for (int i = 0; i < kParts<T>; ++i)
      for (int j = 0; j < ld; j += 2)
        for (int first = 0; first < kTile; first += 16) {
          const int64_t plane = i * int64_t(ld) * kTile;
          const __m512i pairs = _mm512_loadu_si512(room + plane + j / 32 * 32 * kTile + first * 32 + j % 32 * 16);
          BFloat16* at = out + plane + j * kTile + first;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(pairs));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + kTile),
                              _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
        }
    return;
  }
#endif
  pack_transposed(x, d, out, ld);
}

#if defined(__AVX512BF16__)
// 32 columns of two rows, interleaved, to two blocks of a B operand.
inline void store_pairs(BFloat16* block, __m512i even, __m512i odd) {
  __m512i pairs[2];
  interleave(even, odd, pairs);
  COGVIEW_UNROLL(i, 2) _mm512_store_si512(block + i * kBlock, pairs[i]);
}
#endif

// B operand of up to 64 rows themselves, [64, ld]; the rest is zero.
template <class T>
void pack_b(const RowSet<T>& x, int d, Operand<T>* out, int ld) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    constexpr int parts = kParts<T>;
    for (int r = 0; r < kTile; r += 2)
      for (int j = 0; j < ld; j += 32) {
        __m512i row[2][parts];
        for (int c = 0; c < 2; ++c) row_parts(x, r + c, j, d, row[c]);
        COGVIEW_UNROLL(i, parts)
          store_pairs(out + i * int64_t(ld) * kTile + (r / 32 * ld + j) * 32 + r % 32 * 16, row[0][i], row[1][i]);
      }
    return;
  }
#endif
  pack_a(x, kTile, d, out, ld, 0);
}

// From some rows of an A operand [64, 64] the same of the B operand of the same numbers, columns [lo, hi); for
// accumulators that is the same memory. All multiples of 32.
template <class T>
Matrix<T> a_to_b(const Operand<T>* a, int row, int rows, int lo, int hi, [[maybe_unused]] Operand<T>* out) {
  constexpr int64_t plane = kTile * kTile;
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    for (int i = 0; i < kParts<T>; ++i)
      for (int r = row; r < row + rows; r += 2)
        for (int j = lo; j < hi; j += 32) {
          const BFloat16* from = a + i * plane + r * kTile + j;
          store_pairs(out + i * plane + (r / 32 * kTile + j) * 32 + r % 32 * 16, _mm512_load_si512(from),
                      _mm512_load_si512(from + kTile));
        }
    return Matrix<T>{out, kTile, plane}.from(row, lo);
  }
#endif
  return Matrix<T>{a, kTile, plane}.from(row, lo);
}

// Whether operands of a dtype are so much coarser than accumulators that sums of them differ.
template <class T>
constexpr bool kRounds = kPlanes<T> == 1 && kPaired<T>;

// Two vectors of accumulators as elements of an operand; returns the sum of what was stored.
template <class T, class V>
inline V store_pair(Operand<T>* p, int64_t plane, V x0, V x1) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    __m512i part[kParts<T>];
    split<kParts<T>>(x0, x1, part);
    for (int i = 0; i < kParts<T>; ++i) _mm512_store_si512(p + i * plane, part[i]);
    if constexpr (kRounds<T>) {
      const auto ones = bits_as<__m512bh>(_mm512_set1_epi16(0x3f80));
      return bits_as<VecF>(_mm512_dpbf16_ps(_mm512_setzero_ps(), bits_as<__m512bh>(part[0]), ones));
    }
  }
#endif
  if constexpr (!kPaired<T>) store(p, x0), store(p + kLanes<Acc<T>>, x1);
  return x0 + x1;
}

// The largest squared norm among the columns of a transposed operand [ld, 64], a little rounded.
template <class T>
Acc<T> max_norm(const Operand<T>* columns, int ld) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  Vec<A> top{};
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    __m512 sum[kTile / 16] = {};
    for (int j = 0; j < ld; j += 32)
      for (int r = 0; r < 16; ++r)
        for (int i = 0; i < kTile / 16; ++i) {
          const auto pair = bits_as<__m512bh>(_mm512_load_si512(columns + j * kTile + i * kBlock + r * 32));
          sum[i] = _mm512_dpbf16_ps(sum[i], pair, pair);
        }
    for (const __m512& x : sum) top = vmax(bits_as<VecF>(x), top);
    return hmax(top);
  }
#endif
  if constexpr (!kPaired<T>)
    for (int first = 0; first < kTile; first += w) {
      Vec<A> sum{};
      for (int j = 0; j < ld; ++j) {
        const Vec<A> x = load(columns + j * kTile + first);
        sum += x * x;
      }
      top = vmax(sum, top);
    }
  return hmax(top);
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
