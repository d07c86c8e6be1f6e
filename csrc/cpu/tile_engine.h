// The online-softmax tile engine: three-region attention, and local attention where there is a tile unit.
//
// An owner is up to 64 rows whose result is being summed up, a tile up to 64 columns that are packed once and shown to
// every owner of a group that sees them. Two passes: Forward (rows are queries, columns keys) and GradKey (rows are
// keys, columns queries), which sums up the columns' own gradient beside: no atomics, bitwise repeatable. Scores are
// kept in units of log2.
#pragma once

#include <cmath>
#include <limits>

#include "attention.h"
#include "loops.h"
#include "tile_pack.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <class A>
constexpr A kNone = -std::numeric_limits<A>::infinity();
// Scores up to this size need no maximum: 2^s and sums of 2^s times values of up to 2^50 stay inside float's range.
constexpr double kBounded = 60;

// Bits [lo, hi) of a word; both may lie outside of it.
inline uint64_t range_bits(int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo, hi = hi > 64 ? 64 : hi;
  if (lo >= hi) return 0;
  return (hi == 64 ? ~uint64_t(0) : (uint64_t(1) << hi) - 1) & ~((uint64_t(1) << lo) - 1);
}

// Which columns of a tile each row of an owner sees; null: all. Masked out or not, columns beyond the tile's count are
// zero, which is right for GradKey, while Forward has to be told.
using Mask = const uint64_t*;

// The columns [lo, hi), multiples of 32, of a strip of rows, outside of which its mask has nothing.
struct Part {
  int strip, lo, hi;
};
struct Parts {
  Part at[kTile / kStrip];
  int count = 0;
  Parts(int rows, Mask mask) {
    for (int first = 0; first < rows; first += kStrip) {
      uint64_t any = mask ? 0 : ~uint64_t(0);
      for (int r = first; mask && r < rows && r < first + kStrip; ++r) any |= mask[r];
      if (any) at[count++] = {first / kStrip, uint32_t(any) ? 0 : 32, any >> 32 ? kTile : 32};
    }
  }
};

// What one owner at a time works with: scores s, probabilities p and dout-products dp of two strips, of which one is
// multiplied while the other is in vectors; gradients of scores ds of all strips.
template <class T>
struct Workspace {
  struct Strip {
    Acc<T>*s, *dp;
    Operand<T>* p;
  } strip[2];
  Operand<T>*ds, *ds_pairs;
  static constexpr int64_t plane = kStrip * kTile, ds_plane = kTile * kTile;
  void take(Arena& arena) {
    for (Strip& x : strip) {
      x.s = arena.take<Acc<T>>(plane), x.dp = arena.take<Acc<T>>(plane);
      x.p = arena.take<Operand<T>>(plane * kPlanes<T>);
      // rows that an owner lacks are multiplied too
      if (arena.base) std::memset(static_cast<void*>(x.p), 0, sizeof(*x.p) * plane * kPlanes<T>);
    }
    ds = arena.take<Operand<T>>(ds_plane * kPlanes<T>), ds_pairs = arena.take<Operand<T>>(ds_plane * kPlanes<T>);
    if (arena.base) std::memset(static_cast<void*>(ds), 0, sizeof(*ds) * ds_plane * kPlanes<T>);
  }
};

// Parts of an owner's rows in a pipeline: while one is in vectors, the products `before` of the next one and `after` of
// the last one are under way, so that no product waits for what has just been written. All are told the part and which
// of the two strips of the workspace it is in; f also a row.
template <class Before, class F, class After>
inline void each_part(const Parts& parts, int rows, Before&& before, F&& f, After&& after) {
  for (int i = 0; i <= parts.count; ++i) {
    if (i == 0 && parts.count) before(parts.at[0], 0);
    if (i + 1 < parts.count) before(parts.at[i + 1], (i + 1) & 1);
    if (i < parts.count) {
      const int first = parts.at[i].strip * kStrip;
      for (int r = first; r < rows && r < first + kStrip; ++r) f(parts.at[i], i & 1, r);
    }
    if (i > 0) after(parts.at[i - 1], (i - 1) & 1);
  }
}

// Rows of accumulators times a factor each, in the tensor's dtype.
template <class T>
inline void write_row(const Acc<T>* acc, Acc<T> factor, int d, T* out) {
  each<Acc<T>>(d, [&](int64_t j, auto n) { put(out + j, load(acc + j, n) * factor, n); });
}

// One row of scores against its running maximum m: adds to `total`, and hands two vectors of probabilities at a time to
// put(column, x0, x1). Calls rescale(keep) when the maximum moved.
template <class T, class Rescale, class Put>
inline void softmax_row(const Acc<T>* s, uint64_t mask, Acc<T> scale, Acc<T> bias, Acc<T>* m, Vec<Acc<T>>* total,
                        Rescale&& rescale, Put&& put) {
  using A = Acc<T>;
  constexpr int l = kLanes<A>, n = kTile / l;
  Vec<A> x[n], top = splat(kNone<A>);
  COGVIEW_UNROLL(c, n) {
    x[c] = select_bits<A>(mask >> (c * l), load(s + c * l) * scale + bias, kNone<A>);
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

// Writes rows of the output, out(r), and hands their log-sum-exp to lse(r, value): zeros and -inf for a row that saw
// nothing. `weight` is the sum of the probabilities that were multiplied, `total` of those that were not rounded for
// it.
template <class T, class Out, class Lse>
inline void finish_rows(int rows, const Acc<T>* o, int ld, const Acc<T>* m, const Vec<Acc<T>>* total,
                        const Vec<Acc<T>>* weight, int d, Out&& out, Lse&& lse) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
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
    }
  }
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

constexpr int kGroup = 16;                  // owners at most
constexpr int kBatch = 32;                  // tiles at most
constexpr int64_t kBatchBytes = 256 << 10;  // what may stay in the L2 cache beside the owners

// Owners that share tiles, in one thread's scratch.
template <class T, template <class> class Engine>
struct Group {
  using Tile = typename Engine<T>::Tile;
  Workspace<T> work;
  Engine<T> owners[kGroup];
  Tile tiles[kBatch];

  Group(Arena arena, int d, int count) {
    work.take(arena);
    for (int i = 0; i < count; ++i) owners[i].take(arena, d);
    const int64_t before = arena.used;
    tiles[0].take(arena, d);
    const int64_t fit = kBatchBytes / (arena.used - before);
    batch_ = int(fit < 4 ? 4 : fit > kBatch ? kBatch : fit);
    for (int i = 1; i < batch_; ++i) tiles[i].take(arena, d);
    bytes_ = arena.used;
  }
  static int64_t bytes(int d) { return Group(Arena{nullptr}, d, kGroup).bytes_; }

  // pack(number, tile) once for each of n tiles, then see(owner, number, tile) by every owner, in the order of numbers.
  template <class Pack, class See>
  void meet(int count, int64_t n, Pack&& pack, See&& see) {
    for (int64_t first = 0; first < n; first += batch_) {
      const int here = int(n - first < batch_ ? n - first : batch_);
      for (int i = 0; i < here; ++i) pack(first + i, tiles[i]);
      for (int o = 0; o < count; ++o)
        for (int i = 0; i < here; ++i) see(owners[o], o, first + i, tiles[i]);
    }
  }

 private:
  int batch_;
  int64_t bytes_;
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview

// Defines the exported kernel `name`: items [begin, end), each by function<T> of the tensors' dtype, for the dtypes
// that some instruction set runs it for.
#define COGVIEW_DEFINE_KERNEL(name, Plan, function, runs)                                \
  void name(const Plan& plan, int64_t begin, int64_t end, int slot) {                    \
    [[maybe_unused]] AmxScope amx;                                                       \
    char* scratch = plan.scratch.of(slot);                                               \
    by_dtype(plan.problem.dtype, [&](auto x) {                                           \
      using T = decltype(x);                                                             \
      if constexpr (runs)                                                                \
        for (int64_t item = begin; item < end; ++item) function<T>(plan, item, scratch); \
    });                                                                                  \
  }
#define COGVIEW_TILE_KERNEL(name, Plan, function) COGVIEW_DEFINE_KERNEL(name, Plan, function, true)
#define COGVIEW_AMX_KERNEL(name, Plan, function) COGVIEW_DEFINE_KERNEL(name, Plan, function, kOnAmx<T>)
#define COGVIEW_LANE_KERNEL(name, Plan, function) COGVIEW_DEFINE_KERNEL(name, Plan, function, !kOnAmx<T>)
