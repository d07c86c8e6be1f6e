// Products of tiles, and the packing of rows into operands. C[m, n] (+)= A[m, k] B[k, n], C in the accumulator type.
//
// A operand: row-major, the depth padded with zeros. B operand: row-major too, except on AMX, which wants pairs of
// rows interleaved. bfloat16 multiplies on AMX where the processor has it; everything else in float or double vectors.
#pragma once

#include "vec.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int kTile = 64;  // rows and columns of a tile of scores

#if defined(__AMX_BF16__)
constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif
template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<BFloat16> = true;
template <class T>
constexpr bool kOnAmx = kHasAmx && kIsBf16<T>;

template <bool amx, class T>
struct OperandOf {
  using type = Acc<T>;
};
template <class T>
struct OperandOf<true, T> {
  using type = BFloat16;
};
// Element type of packed operands of dtype T.
template <class T>
using Operand = typename OperandOf<kOnAmx<T>, T>::type;
// What depths and widths are padded to.
template <class T>
constexpr int kPad = kOnAmx<T> ? 32 : kLanes<Acc<T>>;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch memory handed out in aligned pieces; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class U>
  U* take(int64_t n) {
    U* p = reinterpret_cast<U*>(base + used);
    used += round_up(n * int64_t(sizeof(U)), 64);
    return p;
  }
};

// Rows of a tensor picked by index.
template <class T>
struct RowSet {
  const T* base;
  int64_t stride;
  const int64_t* index;
  int count;
  const T* row(int r) const { return base + index[r] * stride; }
};

// ---- products ----

template <class A, int MR, int NR>
inline void gemm_block(int k, const A* a, int lda, const A* b, int ldb, A* c, int ldc, bool accumulate) {
  constexpr int w = kLanes<A>;
  Vec<A> acc[MR][NR];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) acc[i][j] = Vec<A>{};
  for (int p = 0; p < k; ++p) {
    Vec<A> bv[NR];
    for (int j = 0; j < NR; ++j) bv[j] = load(b + p * ldb + j * w);
    for (int i = 0; i < MR; ++i) {
      const Vec<A> av = splat(a[i * lda + p]);
      for (int j = 0; j < NR; ++j) acc[i][j] += av * bv[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) {
      A* cij = c + i * ldc + j * w;
      // added at the end: a long sum of short sums rounds less than one long sum
      store(cij, accumulate ? load(cij) + acc[i][j] : acc[i][j]);
    }
}

// m a multiple of 4, n of the vector.
template <class A>
void gemm(int m, int n, int k, const A* a, int lda, const A* b, int ldb, A* c, int ldc, bool accumulate) {
  constexpr int w = kLanes<A>, NR = kVecBytes == 64 ? 4 : 2;
  int j = 0;
  for (; j + NR * w <= n; j += NR * w)
    for (int i = 0; i < m; i += 4)
      gemm_block<A, 4, NR>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
  for (; j < n; j += w)
    for (int i = 0; i < m; i += 4)
      gemm_block<A, 4, 1>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
}

#if defined(__AMX_BF16__)
// Tile registers set to 16 rows of 64 bytes, for the life of this object.
struct AmxScope {
  AmxScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
  }
  ~AmxScope() { _tile_release(); }
};

// 32 x 32 of C, or 16 in a direction. m, n multiples of 16, k of 32; everything 64-byte aligned.
template <bool wide_m, bool wide_n>
inline void amx_block(int k, const BFloat16* a, int lda, const BFloat16* b, int ldb, float* c, int ldc,
                      bool accumulate) {
  const int c_stride = ldc * 4, a_stride = lda * 2, b_stride = ldb * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_stride);
    if (wide_n) _tile_loadd(1, c + 16, c_stride);
    if (wide_m) _tile_loadd(2, c + 16 * ldc, c_stride);
    if (wide_m && wide_n) _tile_loadd(3, c + 16 * ldc + 16, c_stride);
  } else {
    _tile_zero(0);
    if (wide_n) _tile_zero(1);
    if (wide_m) _tile_zero(2);
    if (wide_m && wide_n) _tile_zero(3);
  }
  for (int p = 0; p < k; p += 32) {
    _tile_loadd(4, a + p, a_stride);
    if (wide_m) _tile_loadd(5, a + 16 * lda + p, a_stride);
    _tile_loadd(6, b + p * ldb, b_stride);
    if (wide_n) _tile_loadd(7, b + p * ldb + 32, b_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (wide_n) _tile_dpbf16ps(1, 4, 7);
    if (wide_m) _tile_dpbf16ps(2, 5, 6);
    if (wide_m && wide_n) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_stride);
  if (wide_n) _tile_stored(1, c + 16, c_stride);
  if (wide_m) _tile_stored(2, c + 16 * ldc, c_stride);
  if (wide_m && wide_n) _tile_stored(3, c + 16 * ldc + 16, c_stride);
}

inline void gemm(int m, int n, int k, const BFloat16* a, int lda, const BFloat16* b, int ldb, float* c, int ldc,
                 bool accumulate) {
  for (int j = 0; j < n; j += 32)
    for (int i = 0; i < m; i += 32) {
      const BFloat16 *ai = a + i * lda, *bj = b + j * 2;
      float* cij = c + i * ldc + j;
      const bool wide_m = m - i > 16, wide_n = n - j > 16;
      if (wide_m && wide_n)
        amx_block<true, true>(k, ai, lda, bj, ldb, cij, ldc, accumulate);
      else if (wide_m)
        amx_block<true, false>(k, ai, lda, bj, ldb, cij, ldc, accumulate);
      else if (wide_n)
        amx_block<false, true>(k, ai, lda, bj, ldb, cij, ldc, accumulate);
      else
        amx_block<false, false>(k, ai, lda, bj, ldb, cij, ldc, accumulate);
    }
}
#else
struct AmxScope {
  ~AmxScope() {}
};
#endif

// ---- packing ----

// One row of d elements, converted and padded with zeros to ld.
template <class T>
inline void copy_row(const T* x, int d, Operand<T>* out, int ld) {
  if constexpr (kOnAmx<T>) {
    constexpr int line = 32;  // elements of 64 bytes: copies of a known size are moves, not calls
    int j = 0;
    for (; j + line <= d; j += line) std::memcpy(static_cast<void*>(out + j), x + j, line * sizeof(T));
    if (j == d) return;
    std::memset(static_cast<void*>(out + j), 0, line * sizeof(T));
    std::memcpy(static_cast<void*>(out + j), x + j, (d - j) * sizeof(T));
  } else {
    constexpr int w = kLanes<Acc<T>>;
    int j = 0;
    for (; j + w <= d; j += w) store(out + j, load(x + j));
    if (j < d) store(out + j, load_partial(x + j, d - j)), j += w;
    for (; j < ld; j += w) store(out + j, Vec<Acc<T>>{});
  }
}

// A operand: rows as they are; those beyond the count up to `rows` are zero.
template <class T>
void pack_a(const RowSet<T>& x, int rows, int d, Operand<T>* out, int ld) {
  for (int r = 0; r < x.count; ++r) copy_row(x.row(r), d, out + r * ld, ld);
  if (rows > x.count)
    std::memset(static_cast<void*>(out + x.count * ld), 0, int64_t(rows - x.count) * ld * sizeof(Operand<T>));
}

// A vector of accumulators as elements of an operand.
template <class E, class V>
inline void store_operand(E* p, V v) {
#if defined(__AVX512BF16__)
  if constexpr (kIsBf16<E>) {
    const __m256bh h = _mm512_cvtneps_pbh(bits_as<__m512>(v));
    std::memcpy(static_cast<void*>(p), &h, sizeof h);
    return;
  }
#endif
  store(p, v);
}

#if defined(__AVX512F__)
// 16 x 16 of 32-bit elements.
inline void transpose_block(const uint32_t* in, int ld_in, uint32_t* out, int ld_out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * ld_in);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_si512(out + j * ld_out, _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88));
    _mm512_storeu_si512(out + (4 + j) * ld_out, _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88));
    _mm512_storeu_si512(out + (8 + j) * ld_out, _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd));
    _mm512_storeu_si512(out + (12 + j) * ld_out, _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd));
  }
}
#endif

template <class U>
void transpose(const U* in, int ld_in, int rows, int cols, U* out, int ld_out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 4)
    if (rows % 16 == 0 && cols % 16 == 0) {
      for (int i = 0; i < rows; i += 16)
        for (int j = 0; j < cols; j += 16)
          transpose_block(reinterpret_cast<const uint32_t*>(in) + i * ld_in + j, ld_in,
                          reinterpret_cast<uint32_t*>(out) + j * ld_out + i, ld_out);
      return;
    }
#endif
  for (int j = 0; j < cols; ++j)
    for (int i = 0; i < rows; ++i) out[j * ld_out + i] = in[i * ld_in + j];
}

// From 64 rows packed as an A operand with leading dimension ld: the B operand of their transpose, [ld, 64].
template <class T>
void pack_b_transposed(const Operand<T>* rows, int ld, Operand<T>* out) {
  if constexpr (kOnAmx<T>)  // a pair of elements moves as one
    transpose(reinterpret_cast<const uint32_t*>(rows), ld / 2, kTile, ld / 2, reinterpret_cast<uint32_t*>(out), kTile);
  else
    transpose(rows, ld, kTile, ld, out, kTile);
}

// From 64 rows packed as an A operand: the B operand of themselves, [64, ld]; without AMX that is the same memory.
template <class T>
const Operand<T>* pack_b(const Operand<T>* rows, int ld, Operand<T>* out) {
  if constexpr (kOnAmx<T>) {
    constexpr int w = kLanes<float>;
    for (int r = 0; r < kTile; r += 2)
      for (int j = 0; j < ld; j += w) {
        VecU16 even, odd;
        std::memcpy(&even, rows + r * ld + j, sizeof even);
        std::memcpy(&odd, rows + (r + 1) * ld + j, sizeof odd);
        const VecU32 pairs = __builtin_convertvector(even, VecU32) | __builtin_convertvector(odd, VecU32) << 16;
        std::memcpy(static_cast<void*>(out + r * ld + 2 * j), &pairs, sizeof pairs);
      }
    return out;
  } else {
    return rows;
  }
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
