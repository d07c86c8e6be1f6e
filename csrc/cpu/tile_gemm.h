// Products of tiles. C[m, n] (+)= A[m, k] B[k, n], C in the accumulator type.
//
// Operands are row-major accumulators, but where the processor multiplies pairs of bfloat16, in its tile unit (AMX) or
// in vectors. The tile unit takes a float16 number too, as the exact sum of two bfloat16 numbers, each an operand of
// its own, and all products of parts are summed but that of the two small ones, which is below float16's precision.
// (float32 as three parts, six products, was no faster than AVX-512.) Of pairs, an A operand is row-major, and a B
// operand is 1 KB blocks of 32 x 16 elements, pairs of rows interleaved, so that a block is one tile.
#pragma once

#include "attention.h"
#include "pairs.h"
#include "tile_unit.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int kStrip = 16;   // rows that are multiplied at a time
constexpr int kBlock = 512;  // elements of a block of pairs

// As how many numbers of bfloat16 a dtype is multiplied in pairs; 0: it is not.
#if defined(COGVIEW_TILE_UNIT)
template <class T>
constexpr int kParts = std::is_same_v<T, BFloat16> ? 1
                       : std::is_same_v<T, Half>   ? 2
                                                   : 0;
template <class T>
constexpr bool kOnAmx = kParts<T> > 0;
#else
#if defined(COGVIEW_PAIRS)
template <class T>
constexpr int kParts = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr int kParts = 0;
#endif
template <class T>
constexpr bool kOnAmx = false;
#endif
// Whether a dtype is multiplied in pairs.
template <class T>
constexpr bool kPaired = kParts<T> > 0;
// Element type of packed operands of dtype T.
template <class T>
using Operand = std::conditional_t<kPaired<T>, BFloat16, Acc<T>>;
// How many of them an element takes.
template <class T>
constexpr int kPlanes = kPaired<T> ? kParts<T> : 1;
// What depths and widths are padded to.
template <class T>
constexpr int kPad = kPaired<T> ? 32 : kStrip;
// Elements that are multiplied as one: beside each other in an A operand, below each other in B.
template <class T>
constexpr int kUnit = kPaired<T> ? 2 : 1;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch memory handed out in aligned pieces; with a null base it only counts. Under the address sanitizer no piece
// may be left: 64 bytes behind each are poisoned.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class U>
  U* take(int64_t n) {
    U* p = reinterpret_cast<U*>(base + used);
    used += round_up(n * int64_t(sizeof(U)), 64);
#if defined(__SANITIZE_ADDRESS__)
    if (base) ASAN_UNPOISON_MEMORY_REGION(p, n * sizeof(U));
    if (base) ASAN_POISON_MEMORY_REGION(base + used, 64);
    used += 64;
#endif
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

// A B operand, or the part of it from some row and column on.
template <class T>
struct Matrix {
  const Operand<T>* data;
  int width;                                // columns of the whole operand
  int64_t plane;                            // elements of one of its parts
  Matrix from(int row, int column) const {  // multiples of 32
    return {data + row * int64_t(width) + column * (kPaired<T> ? 32 : 1), width, plane};
  }
};

// ---- products ----

// One unit of an A operand, in all lanes.
template <class T>
inline Vec<Acc<T>> spread(const void* unit) {
  if constexpr (kPaired<T>)
    return bits_as<Vec<Acc<T>>>(spread_pair(unit));
  else
    return splat(*static_cast<const Acc<T>*>(unit));
}

// sum + x * y, of units.
template <class T>
inline Vec<Acc<T>> multiply_add(Vec<Acc<T>> sum, Vec<Acc<T>> x, Vec<Acc<T>> y) {
  if constexpr (kPaired<T>)
    return dot_pairs(sum, bits_as<Pairs>(x), bits_as<Pairs>(y));
  else
    return sum + x * y;
}

template <class T, int MR, int NR>
inline void gemm_block(int k, const Operand<T>* a, int lda, const Operand<T>* b, int width, Acc<T>* c, int ldc,
                       bool accumulate) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>, depth = kPaired<T> ? 32 : 1;
  constexpr int across = kPaired<T> ? kBlock : w, down = kPaired<T> ? 32 : 0;  // to the next vector, the next unit
  Vec<A> acc[MR][NR];
  COGVIEW_UNROLL(i, MR)
    COGVIEW_UNROLL(j, NR) acc[i][j] = Vec<A>{};
  for (int p = 0; p < k; p += depth, b += depth * int64_t(width))
    for (int u = 0; u < depth / kUnit<T>; ++u) {
      Vec<A> x[NR];
      COGVIEW_UNROLL(j, NR) std::memcpy(&x[j], b + u * down + j * across, sizeof x[j]);
      COGVIEW_UNROLL(i, MR) {
        const Vec<A> y = spread<T>(a + i * lda + p + u * kUnit<T>);
        COGVIEW_UNROLL(j, NR) acc[i][j] = multiply_add<T>(acc[i][j], x[j], y);
      }
    }
  COGVIEW_UNROLL(i, MR)
    COGVIEW_UNROLL(j, NR) {
      A* cij = c + i * ldc + j * w;
      // added at the end: a long sum of short sums rounds less than one long sum
      store(cij, accumulate ? load(cij) + acc[i][j] : acc[i][j]);
    }
}

// Columns [j, n) of all 16 rows, as many blocks as fit.
template <class T, int MR, int NR>
inline int gemm_blocks(int j, int n, int k, const Operand<T>* a, int lda, const Matrix<T>& b, Acc<T>* c, int ldc,
                       bool accumulate) {
  constexpr int w = NR * kLanes<Acc<T>>;
  for (; j + w <= n; j += w)
    for (int i = 0; i < kStrip; i += MR)
      gemm_block<T, MR, NR>(k, a + i * lda, lda, b.from(0, j).data, b.width, c + i * ldc + j, ldc, accumulate);
  return j;
}

// C[16, n] (+)= A[16, k] B[k, n], n a multiple of the vector; of pairs, n and k multiples of 32 and everything 64-byte
// aligned. `plane`: elements between the parts of A.
template <class T, std::enable_if_t<!kOnAmx<T>, int> = 0>
inline void gemm(int n, int k, const Operand<T>* a, int lda, int64_t /*plane*/, const Matrix<T>& b, Acc<T>* c, int ldc,
                 bool accumulate) {
  int j = 0;
  if (kVecBytes == 64) j = gemm_blocks<T, 4, 4>(j, n, k, a, lda, b, c, ldc, accumulate);
  j = gemm_blocks<T, kVecBytes == 64 ? 8 : 4, 2>(j, n, k, a, lda, b, c, ldc, accumulate);
  gemm_blocks<T, 4, 1>(j, n, k, a, lda, b, c, ldc, accumulate);
}

#if defined(COGVIEW_TILE_UNIT)
template <class T, std::enable_if_t<kOnAmx<T>, int> = 0>
inline void gemm(int n, int k, const BFloat16* a, int lda, int64_t plane, const Matrix<T>& b, float* c, int ldc,
                 bool accumulate) {
  constexpr int parts = kParts<T>;
  const int64_t c_stride = ldc * 4;
  for (int j = 0; j < n; j += 64, c += 64) {
    const bool four = j + 32 < n;
    if (accumulate) {
      tile_load<0>(c, c_stride), tile_load<1>(c + 16, c_stride);
      if (four) tile_load<2>(c + 32, c_stride), tile_load<3>(c + 48, c_stride);
    } else {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (int p = 0; p < k; p += 32)
      for (int i = 0; i < parts; ++i) {
        tile_load<4>(a + i * plane + p, lda * 2);
        for (int ib = 0; ib < parts - i; ++ib) {
          const BFloat16* at = b.data + ib * b.plane + p * int64_t(b.width) + j * 32;
          const bool last = p + 32 >= k && i + 1 == parts;
          // each stored as soon as it is complete, beside the next one's product
          tile_load<5>(at, 64), tile_multiply<0, 4, 5>();
          if (last) tile_store<0>(c, c_stride);
          tile_load<6>(at + kBlock, 64), tile_multiply<1, 4, 6>();
          if (last) tile_store<1>(c + 16, c_stride);
          if (!four) continue;
          tile_load<7>(at + 2 * kBlock, 64), tile_multiply<2, 4, 7>();
          if (last) tile_store<2>(c + 32, c_stride);
          tile_load<5>(at + 3 * kBlock, 64), tile_multiply<3, 4, 5>();
          if (last) tile_store<3>(c + 48, c_stride);
        }
      }
  }
}
#endif

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
