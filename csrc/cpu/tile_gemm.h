// Products of tiles. C[m, n] (+)= A[m, k] B[k, n], C in the accumulator type.
//
// Operands are row-major accumulators; of pairs, an A operand is row-major, and a B operand is 1 KB blocks of 32 x 16
// elements, pairs of rows interleaved, so that a block is one tile of the unit.
#pragma once

#include "operands.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int kStrip = 16;   // rows that are multiplied at a time
constexpr int kBlock = 512;  // elements of a block of pairs
// What depths and widths are padded to.
template <class T>
constexpr int kPad = kPaired<T> ? 32 : kStrip;

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
template <class T, std::enable_if_t<!kOnTiles<T>, int> = 0>
inline void gemm(int n, int k, const Operand<T>* a, int lda, int64_t /*plane*/, const Matrix<T>& b, Acc<T>* c, int ldc,
                 bool accumulate) {
  int j = 0;
  if (kVecBytes == 64) j = gemm_blocks<T, 4, 4>(j, n, k, a, lda, b, c, ldc, accumulate);
  j = gemm_blocks<T, kVecBytes == 64 ? 8 : 4, 2>(j, n, k, a, lda, b, c, ldc, accumulate);
  gemm_blocks<T, 4, 1>(j, n, k, a, lda, b, c, ldc, accumulate);
}

#if defined(COGVIEW_TILE_UNIT)
template <class T, std::enable_if_t<kOnTiles<T>, int> = 0>
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
