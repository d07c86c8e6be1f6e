// Rows packed into operands of products of tiles, and results back.
#pragma once

#include "arena.h"
#include "tile_gemm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// B operand of the transpose, [ld, 64], of up to 64 rows; the rest is zero.
template <class T>
void pack_transposed(const RowSet<T>& x, int d, Operand<T>* out, int ld) {
  if constexpr (kPaired<T>) {
    constexpr int parts = kParts<T>;
    for (int first = 0; first < kTile; first += 16)
      for (int j = 0; j < ld; j += 32) {
        Pairs part[parts], r[parts][16];
        COGVIEW_UNROLL(c, 16) {
          row_parts(x, first + c, j, d, part);
          COGVIEW_UNROLL(i, parts) r[i][c] = part[i];
        }
        COGVIEW_UNROLL(i, parts) {
          BFloat16* block = out + i * int64_t(ld) * kTile + j * kTile + first * 32;
          transpose_pairs(r[i]);
          COGVIEW_UNROLL(c, 16) store_pairs(block + c * 32, r[i][c]);
        }
      }
  } else {
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
  if constexpr (kPaired<T>) {
    pack_transposed(x, d, room, ld);
    for (int i = 0; i < kParts<T>; ++i)
      for (int j = 0; j < ld; j += 2)
        for (int first = 0; first < kTile; first += 16) {
          const int64_t plane = i * int64_t(ld) * kTile;
          BFloat16* at = out + plane + j * kTile + first;
          separate(load_pairs(room + plane + j / 32 * 32 * kTile + first * 32 + j % 32 * 16), at, at + kTile);
        }
  } else {
    pack_transposed(x, d, out, ld);
  }
}

// 32 columns of two rows, interleaved, to two blocks of a B operand.
inline void store_blocks(BFloat16* block, Pairs even, Pairs odd) {
  Pairs pairs[2];
  interleave(even, odd, pairs);
  COGVIEW_UNROLL(i, 2) store_pairs(block + i * kBlock, pairs[i]);
}

// B operand of up to 64 rows themselves, [64, ld]; the rest is zero.
template <class T>
void pack_b(const RowSet<T>& x, int d, Operand<T>* out, int ld) {
  if constexpr (kPaired<T>) {
    constexpr int parts = kParts<T>;
    for (int r = 0; r < kTile; r += 2)
      for (int j = 0; j < ld; j += 32) {
        Pairs row[2][parts];
        for (int c = 0; c < 2; ++c) row_parts(x, r + c, j, d, row[c]);
        COGVIEW_UNROLL(i, parts)
          store_blocks(out + i * int64_t(ld) * kTile + (r / 32 * ld + j) * 32 + r % 32 * 16, row[0][i], row[1][i]);
      }
  } else {
    pack_a(x, kTile, d, out, ld, 0);
  }
}

// From some rows of an A operand [64, 64] the same of the B operand of the same numbers, columns [lo, hi); for
// accumulators that is the same memory. All multiples of 32.
template <class T>
Matrix<T> a_to_b(const Operand<T>* a, int row, int rows, int lo, int hi, [[maybe_unused]] Operand<T>* out) {
  constexpr int64_t plane = kTile * kTile;
  if constexpr (kPaired<T>) {
    for (int i = 0; i < kParts<T>; ++i)
      for (int r = row; r < row + rows; r += 2)
        for (int j = lo; j < hi; j += 32) {
          const BFloat16* from = a + i * plane + r * kTile + j;
          store_blocks(out + i * plane + (r / 32 * kTile + j) * 32 + r % 32 * 16, load_pairs(from),
                       load_pairs(from + kTile));
        }
    return Matrix<T>{out, kTile, plane}.from(row, lo);
  } else {
    return Matrix<T>{a, kTile, plane}.from(row, lo);
  }
}

// Whether operands of a dtype are so much coarser than accumulators that sums of them differ.
template <class T>
constexpr bool kRounds = kPlanes<T> == 1 && kPaired<T>;

// Two vectors of accumulators as elements of an operand; returns the sum of what was stored.
template <class T, class V>
inline V store_pair(Operand<T>* p, int64_t plane, V x0, V x1) {
  if constexpr (kPaired<T>) {
    Pairs part[kParts<T>];
    split<kParts<T>>(x0, x1, part);
    for (int i = 0; i < kParts<T>; ++i) store_pairs(p + i * plane, part[i]);
    if constexpr (kRounds<T>) return dot_pairs(V{}, part[0], ones());
  } else {
    store(p, x0), store(p + kLanes<Acc<T>>, x1);
  }
  return x0 + x1;
}

// The largest squared norm among the columns of a transposed operand [ld, 64], a little rounded.
template <class T>
Acc<T> max_norm(const Operand<T>* columns, int ld) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  Vec<A> top{};
  if constexpr (kPaired<T>) {
    Vec<A> sum[kTile / 16] = {};
    for (int j = 0; j < ld; j += 32)
      for (int r = 0; r < 16; ++r)
        for (int i = 0; i < kTile / 16; ++i) {
          const Pairs pairs = load_pairs(columns + j * kTile + i * kBlock + r * 32);
          sum[i] = dot_pairs(sum[i], pairs, pairs);
        }
    for (const Vec<A>& x : sum) top = vmax(x, top);
  } else {
    for (int first = 0; first < kTile; first += w) {
      Vec<A> sum{};
      for (int j = 0; j < ld; ++j) {
        const Vec<A> x = load(columns + j * kTile + first);
        sum += x * x;
      }
      top = vmax(sum, top);
    }
  }
  return hmax(top);
}

// Rows of the transpose of acc [ld, 64] times a factor, in the tensor's dtype, to places by index.
template <class T>
void write_transposed(const Acc<T>* acc, Acc<T> factor, const int64_t* index, int rows, int d, T* out, int64_t stride) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  for (int first = 0; first < rows; first += w)
    each<A>(d, [&](int64_t j, auto n) {
      Vec<A> x[w];
      for (int i = 0; i < w; ++i) x[i] = i < n ? load(acc + (j + i) * kTile + first) : Vec<A>{};
      transpose<A>(x);
      for (int i = 0; i < w && first + i < rows; ++i) put(out + index[first + i] * stride + j, x[i] * factor, n);
    });
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
