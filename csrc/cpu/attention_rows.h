// Rows of queries, keys and values, which of them see each other, and the softmax of a row; for every engine. Scores
// are in units of log2. Included by kernel files only.
#pragma once

#include <cmath>
#include <limits>

#include "attention.h"
#include "loops.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Rows of a tensor picked by index.
template <class T>
struct RowSet {
  const T* base;
  int64_t stride;
  const int64_t* index;
  int count;
  const T* row(int r) const { return base + index[r] * stride; }
};

template <class A>
constexpr A kNone = -std::numeric_limits<A>::infinity();
// Bits [lo, hi) of a word; both may lie outside of it.
inline uint64_t range_bits(int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo, hi = hi > 64 ? 64 : hi;
  if (lo >= hi) return 0;
  return (hi == 64 ? ~uint64_t(0) : (uint64_t(1) << hi) - 1) & ~((uint64_t(1) << lo) - 1);
}

// Which columns of a tile each row of an owner sees; null: all. Masked out or not, columns beyond the tile's count are
// zero, which is right for GradKey, while Forward has to be told.
using Mask = const uint64_t*;

// Rows of accumulators times a factor each, in the tensor's dtype.
template <class T>
inline void write_row(const Acc<T>* acc, Acc<T> factor, int d, T* out) {
  each<Acc<T>>(d, [&](int64_t j, auto n) { put(out + j, load(acc + j, n) * factor, n); });
}

// One row of scores against its running maximum m: adds to `total`, and hands two vectors of probabilities at a time to
// put(column, x0, x1). Calls rescale(keep) when the maximum moved. bias(column) is added to the scores.
template <class T, class Bias, class Rescale, class Put>
inline void softmax_row(const Acc<T>* s, uint64_t mask, Acc<T> scale, Bias&& bias, Acc<T>* m, Vec<Acc<T>>* total,
                        Rescale&& rescale, Put&& put) {
  using A = Acc<T>;
  constexpr int l = kLanes<A>, n = kTile / l;
  Vec<A> x[n], top = splat(kNone<A>);
  COGVIEW_UNROLL(c, n) {
    x[c] = select_bits<A>(mask >> (c * l), load(s + c * l) * scale + bias(c * l), kNone<A>);
    top = vmax(x[c], top);
  }
  const A peak = hmax(top);
  if (peak > *m) {
    if (*m != kNone<A>) {
      const A keep = exp2v(splat(*m - peak))[0];
      *total *= keep;
      rescale(keep);
    }
    *m = peak;
  }
  // masked entries stay exp2(-inf) = 0; a NaN among the others stays NaN
  const A base = *m == kNone<A> ? A(0) : *m;
  COGVIEW_UNROLL(i, n / 2) {
    const int c = 2 * i;
    x[c] = exp2v<kExpDegree<T>>(x[c] - base), x[c + 1] = exp2v<kExpDegree<T>>(x[c + 1] - base);
    *total += x[c] + x[c + 1];
    put(c * l, x[c], x[c + 1]);
  }
}

// The sums of w vectors of w lanes, as one vector.
template <class A>
inline Vec<A> sums_of(Vec<A>* x) {
  constexpr int w = kLanes<A>;
  Vec<A> sum{};
  if constexpr (kVecBytes == 64 && sizeof(A) == 4) {
    transpose<A>(x);
    COGVIEW_UNROLL(i, w) sum += x[i];
  } else {
    for (int i = 0; i < w; ++i) sum[i] = hsum(x[i]);
  }
  return sum;
}

// Whether no number of a row is NaN or infinite.
template <class T>
inline bool finite_row(const T* x, int d) {
  Vec<Acc<T>> zero{};
  each<Acc<T>>(d, [&](int64_t j, auto n) { zero += load(x + j, n) * Acc<T>(0); });
  return hsum(zero) == 0;
}

// Writes rows of the output, out(r), and hands their log-sum-exp to lse(r, value): zeros and -inf for a row that saw
// nothing. `weight` is the sum of the probabilities that were multiplied, `total` of those that were not rounded for
// it. Returns the rows that are not finite: a value that is not, times the probability 0 of a row that does not see it,
// may have made them so.
template <class T, class Out, class Lse>
inline uint64_t finish_rows(int rows, const Acc<T>* o, int ld, const Acc<T>* m, const Vec<Acc<T>>* total,
                            const Vec<Acc<T>>* weight, int d, Out&& out, Lse&& lse) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  uint64_t spoilt = 0;
  for (int first = 0; first < rows; first += w) {
    const int n = rows - first < w ? rows - first : w;
    Vec<A> part[2][w] = {};
    for (int i = 0; i < n; ++i) part[0][i] = total[first + i], part[1][i] = weight[first + i];
    const Vec<A> sum = sums_of<A>(part[0]), inverse = A(1) / sums_of<A>(part[1]), log = logv(sum);
    for (int i = 0; i < n; ++i) {
      const int r = first + i;
      if (sum[i] == 0)
        std::memset(static_cast<void*>(out(r)), 0, d * sizeof(T));
      else
        write_row(o + r * ld, inverse[i], d, out(r));
      lse(r, sum[i] == 0 ? kNone<A> : A(kLn2) * m[r] + log[i]);
      spoilt |= uint64_t(!finite_row(o + r * ld, d)) << r;
    }
  }
  return spoilt;
}

// f(r) for every bit.
template <class F>
inline void each_bit(uint64_t bits, F&& f) {
  for (; bits; bits &= bits - 1) f(__builtin_ctzll(bits));
}

// sum(x * y), still to be summed
template <class T>
inline Vec<Acc<T>> dot_lanes(const T* x, const T* y, int d) {
  Vec<Acc<T>> sum{};
  each<Acc<T>>(d, [&](int64_t j, auto n) { sum += load(x + j, n) * load(y + j, n); });
  return sum;
}
template <class T>
inline Acc<T> row_dot(const T* x, const T* y, int d) {
  return hsum(dot_lanes(x, y, d));
}

// Rows of a head of a [B, H, S, D] tensor.
template <class T>
inline RowSet<T> rows_of(const Tensor4& x, int64_t b, int64_t h, const int64_t* index, int n) {
  return {x.at<T>(b, h), x.stride[2], index, n};
}
// The rows [first, end), of which a tile takes 64; returns how many.
inline int rows_from(int64_t first, int64_t end, int64_t* index) {
  const int n = int(end - first < kTile ? end - first : kTile);
  for (int r = 0; r < n; ++r) index[r] = first + r;
  return n;
}

// A head's [seqlen_q] of statistics; null if there are none.
template <class T>
inline Acc<T>* stat(void* p, const Attention& a, int64_t b, int64_t h) {
  return p ? static_cast<Acc<T>*>(p) + (b * a.heads + h) * a.seqlen_q : nullptr;
}

// delta = sum(dout * out) - dlse of n queries.
template <class T>
inline void set_delta(const Attention& a, void* delta, int64_t b, int64_t h, const int64_t* index, int n) {
  const Acc<T>* dlse = stat<T>(a.dlse, a, b, h);
  const RowSet<T> dout = rows_of<T>(a.dout, b, h, index, n), out = rows_of<T>(a.out, b, h, index, n);
  for (int r = 0; r < n; ++r)
    stat<T>(delta, a, b, h)[index[r]] = row_dot(dout.row(r), out.row(r), int(a.head_dim)) - (dlse ? dlse[index[r]] : 0);
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
