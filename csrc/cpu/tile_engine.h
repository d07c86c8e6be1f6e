// The online-softmax tile engine that every attention operator shares.
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
#include "tile_gemm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;
template <class A>
constexpr A kNone = -std::numeric_limits<A>::infinity();
// Scores up to this size need no maximum: 2^s and sums of 2^s times values of up to 2^50 stay inside float's range.
constexpr double kBounded = 60;
// What the probabilities of a dtype are rounded to decides how well 2^x has to be known.
template <class T>
constexpr int kExpDegree = sizeof(T) == 2 ? 4 : 6;

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
  each<Acc<T>>(d, [&](int64_t j, auto n) { put(out + j, load(acc + j) * factor, n); });
}

// One row of scores against its running maximum m: adds to `total`, and hands two vectors of probabilities at a time to
// put(column, x0, x1). Calls rescale(keep) when the maximum moved.
template <class T, class Rescale, class Put>
inline void softmax_row(const Acc<T>* s, uint64_t mask, Acc<T> scale, Acc<T> bias, Acc<T>* m, Vec<Acc<T>>* total,
                        Rescale&& rescale, Put&& put) {
  using A = Acc<T>;
  constexpr int l = kLanes<A>, n = kTile / l;
  Vec<A> x[n], top = splat(kNone<A>);
  for (int c = 0; c < n; ++c) {
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
  for (int c = 0; c < n; c += 2) {
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
    for (int i = 0; i < w; ++i) sum += x[i];
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

template <class T>
struct Forward {
  using A = Acc<T>;
  using E = Operand<T>;
  using Strip = typename Workspace<T>::Strip;

  // Keys and values, packed.
  struct Tile {
    E *kt, *v;
    A norm;  // of the longest key, squared
    uint64_t valid = 0;
    void take(Arena& arena, int d) {
      const int64_t n = kTile * round_up(d, kPad<T>) * kPlanes<T>;
      kt = arena.take<E>(n), v = arena.take<E>(n);
    }
    void pack(const RowSet<T>& keys, const RowSet<T>& values, int d) {
      const int ld = int(round_up(d, kPad<T>));
      pack_transposed(keys, d, kt, ld);
      pack_b(values, d, v, ld);
      norm = max_norm<T>(kt, ld);
    }
  };

  void take(Arena& arena, int d) {
    d_ = d, ld_ = int(round_up(d, kPad<T>));
    q_ = arena.take<E>(kTile * ld_ * kPlanes<T>), o_ = arena.take<A>(kTile * ld_);
    total_ = arena.take<Vec<A>>(kTile), stored_ = arena.take<Vec<A>>(kTile), m_ = arena.take<A>(kTile);
  }

  void begin(const RowSet<T>& q, double scale) {
    rows = q.count;
    scale_ = A(scale * kLog2e);
    pack_a(q, int(round_up(rows, 16)), d_, q_, ld_, plane());
    norm_ = 0, bounded_ = true;
    for (bool& x : started_) x = false;
    for (int first = 0; first < rows; first += kLanes<A>) {
      Vec<A> norms[kLanes<A>] = {};
      for (int r = first; r < rows && r < first + kLanes<A>; ++r) {
        total_[r] = stored_[r] = Vec<A>{}, m_[r] = 0;
        norms[r - first] = dot_lanes(q.row(r), q.row(r), d_);
      }
      norm_ = vmax(hmax(sums_of<A>(norms)), norm_);
    }
  }

  void step(const Workspace<T>& w, const Tile& tile, Mask mask, double bias_) {
    const A bias = A(bias_ * kLog2e);
    // no score is larger than the product of the norms (Cauchy-Schwarz); false for NaN
    if (bounded_ && !(std::sqrt(norm_ * tile.norm) * std::abs(scale_) + std::abs(bias) < A(kBounded))) leave_bounded();
    if (!bounded_)
      run(w, tile, mask,
          [&](const Part&, const Strip& x, int r) { running_max(r, x, mask ? mask[r] : ~uint64_t(0), bias); });
    else if (mask)
      run(w, tile, mask, [&](const Part& part, const Strip& x, int r) { bounded<true>(r, x, part, mask[r], bias); });
    else
      run(w, tile, mask, [&](const Part& part, const Strip& x, int r) { bounded<false>(r, x, part, 0, bias); });
  }

  // Writes every row r of the output to out(r), and hands its log-sum-exp to lse(r, value).
  template <class Out, class Lse>
  void finish(Out&& out, Lse&& lse) const {
    finish_rows<T>(rows, o_, ld_, m_, total_, kRounds<T> ? stored_ : total_, d_, out, lse);
  }

  int rows = 0;

 private:
  int64_t plane() const { return kTile * ld_; }

  // From here on rows have a maximum. What was summed so far is relative to 0, which is as good as any.
  void leave_bounded() {
    bounded_ = false;
    for (int r = 0; r < rows; ++r)
      if (hsum(total_[r]) == 0) m_[r] = kNone<A>;
  }

  template <class F>
  void run(const Workspace<T>& w, const Tile& tile, Mask mask, F&& softmax) {
    const Matrix<T> kt{tile.kt, kTile, plane()}, v{tile.v, ld_, plane()};
    each_part(
        Parts(rows, mask), rows,
        [&](const Part& x, int i) {
          gemm<T>(x.hi - x.lo, ld_, q_ + x.strip * kStrip * ld_, ld_, plane(), kt.from(0, x.lo), w.strip[i].s + x.lo,
                  kTile, false);
        },
        [&](const Part& x, int i, int r) { softmax(x, w.strip[i], r); },
        [&](const Part& x, int i) {
          gemm<T>(ld_, x.hi - x.lo, w.strip[i].p + x.lo, kTile, w.plane, v.from(x.lo, 0), o_ + x.strip * kStrip * ld_,
                  ld_, started_[x.strip]);
          started_[x.strip] = true;
        });
  }

  template <bool masked>
  void bounded(int r, const Strip& strip, const Part& part, uint64_t mask, A bias) {
    constexpr int l = kLanes<A>;
    const int at = r % kStrip * kTile;
    Vec<A> sum{}, stored{};
    for (int c = part.lo; c < part.hi; c += 2 * l) {
      Vec<A> x0 = exp2v<kExpDegree<T>>(load(strip.s + at + c) * scale_ + bias);
      Vec<A> x1 = exp2v<kExpDegree<T>>(load(strip.s + at + c + l) * scale_ + bias);
      if (masked) {
        x0 = select_bits<A>(mask >> c, x0, A(0));
        x1 = select_bits<A>(mask >> (c + l), x1, A(0));
      }
      sum += x0 + x1;
      stored += store_pair<T>(strip.p + at + c, Workspace<T>::plane, x0, x1);
    }
    total_[r] += sum;
    if (kRounds<T>) stored_[r] += stored;
  }

  void running_max(int r, const Strip& strip, uint64_t mask, A bias) {
    const int at = r % kStrip * kTile;
    softmax_row<T>(
        strip.s + at, mask, scale_, bias, &m_[r], &total_[r],
        [&](A keep) {
          for (int j = 0; j < ld_ && started_[r / kStrip]; j += kLanes<A>)
            store(o_ + r * ld_ + j, load(o_ + r * ld_ + j) * keep);
          if (kRounds<T>) stored_[r] *= keep;
        },
        [&](int c, Vec<A> x0, Vec<A> x1) {
          const Vec<A> stored = store_pair<T>(strip.p + at + c, Workspace<T>::plane, x0, x1);
          if (kRounds<T>) stored_[r] += stored;
        });
  }

  int d_ = 0, ld_ = 0;
  bool bounded_ = true, started_[kTile / kStrip];  // started: a strip's sums of values have been written
  A scale_ = 0, norm_ = 0;
  E* q_;
  A *o_, *m_;
  Vec<A>*total_, *stored_;  // sums of probabilities, and of them as they were rounded to be multiplied
};

template <class T>
struct GradKey {
  using A = Acc<T>;
  using E = Operand<T>;

  // Queries and their output gradients, both twice, packed, and what belongs to each query.
  struct Tile {
    E *qt, *q, *dot, *dout;
    A *lse, *delta;
    A* dq;  // [ld, 64], transposed: where their own gradient is summed up, without the scale
    void take(Arena& arena, int d) {
      const int64_t n = kTile * round_up(d, kPad<T>) * kPlanes<T>;
      qt = arena.take<E>(n), q = arena.take<E>(n), dot = arena.take<E>(n), dout = arena.take<E>(n);
      lse = arena.take<A>(kTile), delta = arena.take<A>(kTile);
    }
    // lse and delta are indexed as the queries are.
    void pack(const RowSet<T>& queries, const RowSet<T>& douts, const A* all_lse, const A* all_delta, int d) {
      const int ld = int(round_up(d, kPad<T>));
      pack_transposed(queries, d, qt, ld);
      pack_b(queries, d, q, ld);
      pack_transposed(douts, d, dot, ld);
      pack_b(douts, d, dout, ld);
      for (int c = 0; c < kTile; ++c) {
        const bool exists = c < queries.count;
        lse[c] = exists ? all_lse[queries.index[c]] * A(kLog2e) : A(0);
        delta[c] = exists ? all_delta[queries.index[c]] : A(0);
      }
    }
  };

  void take(Arena& arena, int d) {
    d_ = d, ld_ = int(round_up(d, kPad<T>));
    k_ = arena.take<E>(kTile * ld_ * kPlanes<T>), v_ = arena.take<E>(kTile * ld_ * kPlanes<T>);
    kt_ = arena.take<E>(kTile * ld_ * kPlanes<T>);
    dk_ = arena.take<A>(kTile * ld_), dv_ = arena.take<A>(kTile * ld_);
  }

  void begin(const RowSet<T>& k, const RowSet<T>& v, double scale) {
    rows = k.count;
    scale_ = A(scale);
    pack_a(k, int(round_up(rows, 16)), d_, k_, ld_, plane());
    pack_a(v, int(round_up(rows, 16)), d_, v_, ld_, plane());
    static_assert(sizeof(E) * kPlanes<T> <= sizeof(A), "dk has room for a packed tile");
    pack_a_transposed(k, d_, kt_, ld_, reinterpret_cast<E*>(dk_));
    std::memset(static_cast<void*>(dk_), 0, sizeof(A) * kTile * ld_);
    std::memset(static_cast<void*>(dv_), 0, sizeof(A) * kTile * ld_);
  }

  void step(const Workspace<T>& w, const Tile& tile, Mask mask, double bias_) {
    const A bias = A(bias_ * kLog2e);
    const Parts parts(rows, mask);
    const Matrix<T> qt{tile.qt, kTile, plane()}, dot{tile.dot, kTile, plane()};
    const Matrix<T> q{tile.q, ld_, plane()}, dout{tile.dout, ld_, plane()};
    each_part(
        parts, rows,
        [&](const Part& x, int i) {
          const int64_t at = x.strip * kStrip * ld_, n = x.hi - x.lo;
          gemm<T>(n, ld_, k_ + at, ld_, plane(), qt.from(0, x.lo), w.strip[i].s + x.lo, kTile, false);
          gemm<T>(n, ld_, v_ + at, ld_, plane(), dot.from(0, x.lo), w.strip[i].dp + x.lo, kTile, false);
        },
        [&](const Part& x, int i, int r) { gradients(w, tile, x, w.strip[i], r, mask, bias); },
        [&](const Part& x, int i) {
          const int64_t at = x.strip * kStrip * ld_, n = x.hi - x.lo;
          gemm<T>(ld_, n, w.ds + x.strip * w.plane + x.lo, kTile, w.ds_plane, q.from(x.lo, 0), dk_ + at, ld_, true);
          gemm<T>(ld_, n, w.strip[i].p + x.lo, kTile, w.plane, dout.from(x.lo, 0), dv_ + at, ld_, true);
        });
    add_dq(w, tile.dq, parts);
  }

  // Accumulators of row r, dk still to be multiplied by the scale.
  A* dk(int r) { return dk_ + r * ld_; }
  A* dv(int r) { return dv_ + r * ld_; }
  void finish(int r, T* dk_out, T* dv_out) {
    write_row(dk(r), scale_, d_, dk_out);
    write_row(dv(r), A(1), d_, dv_out);
  }

  int rows = 0;

 private:
  int64_t plane() const { return kTile * ld_; }

  // Row r of scores s and dout-products dp, to probabilities p = 2^(s - lse) and score gradients p (dp - delta).
  void gradients(const Workspace<T>& w, const Tile& tile, const Part& part, const typename Workspace<T>::Strip& strip,
                 int r, Mask mask, A bias) {
    constexpr int l = kLanes<A>;
    const A scale = scale_ * A(kLog2e);
    for (int c = part.lo; c < part.hi; c += 2 * l) {
      const int at = r % kStrip * kTile + c;
      Vec<A> p[2], ds[2];
      for (int i = 0; i < 2; ++i) {
        p[i] = exp2v<kExpDegree<T>>(load(strip.s + at + i * l) * scale + (bias - load(tile.lse + c + i * l)));
        ds[i] = p[i] * (load(strip.dp + at + i * l) - load(tile.delta + c + i * l));
        if (mask) {
          p[i] = select_bits<A>(mask[r] >> (c + i * l), p[i], A(0));
          ds[i] = select_bits<A>(mask[r] >> (c + i * l), ds[i], A(0));
        }
      }
      store_pair<T>(strip.p + at, w.plane, p[0], p[1]);
      store_pair<T>(w.ds + r * kTile + c, w.ds_plane, ds[0], ds[1]);
    }
  }

  // dq += k^T ds, by halves of the rows unless both have the same columns.
  void add_dq(const Workspace<T>& w, A* dq, const Parts& parts) {
    Part strips[kTile / kStrip], halves[2];  // without columns: lo 64, hi 0
    for (Part& x : strips) x = {0, kTile, 0};
    for (int i = 0; i < parts.count; ++i) strips[parts.at[i].strip] = parts.at[i];
    for (int h = 0; h < 2; ++h) {
      const Part &a = strips[2 * h], &b = strips[2 * h + 1];
      halves[h] = {0, a.lo < b.lo ? a.lo : b.lo, a.hi > b.hi ? a.hi : b.hi};
    }
    const bool alike = halves[0].lo == halves[1].lo && halves[0].hi == halves[1].hi;
    for (int row = 0, depth = alike ? kTile : 32; row < kTile; row += depth) {
      const int lo = halves[row / 32].lo, hi = halves[row / 32].hi;
      if (lo >= hi) continue;
      for (int r = row; r < row + depth; ++r) {
        const Part x = r < rows ? strips[r / kStrip] : Part{0, kTile, 0};
        if (x.lo > lo) clear(w, r, lo, x.lo < hi ? x.lo : hi);
        if (x.hi < hi && x.lo < hi) clear(w, r, x.hi, hi);
      }
      const Matrix<T> ds = a_to_b<T>(w.ds, row, depth, lo, hi, w.ds_pairs);
      for (int j = 0; j < ld_; j += kStrip)
        gemm<T>(hi - lo, depth, kt_ + j * kTile + row, kTile, plane(), ds, dq + j * kTile + lo, kTile, true);
    }
  }
  void clear(const Workspace<T>& w, int r, int lo, int hi) {
    for (int i = 0; i < kPlanes<T>; ++i)
      std::memset(static_cast<void*>(w.ds + i * w.ds_plane + r * kTile + lo), 0, sizeof(E) * (hi - lo));
  }

  int d_ = 0, ld_ = 0;
  A scale_ = 0;
  E *k_, *v_, *kt_;
  A *dk_, *dv_;
};

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

// Defines the exported kernel `name`: items [begin, end), each by function<T> of the tensors' dtype.
#define COGVIEW_TILE_KERNEL(name, Args, function)                     \
  void name(const Args& a, int64_t begin, int64_t end, int slot) {    \
    [[maybe_unused]] AmxScope amx;                                    \
    char* scratch = a.scratch.of(slot);                               \
    for (int64_t item = begin; item < end; ++item) switch (a.dtype) { \
        case Dtype::f64:                                              \
          function<double>(a, item, scratch);                         \
          break;                                                      \
        case Dtype::f32:                                              \
          function<float>(a, item, scratch);                          \
          break;                                                      \
        case Dtype::bf16:                                             \
          function<BFloat16>(a, item, scratch);                       \
          break;                                                      \
        case Dtype::f16:                                              \
          function<Half>(a, item, scratch);                           \
          break;                                                      \
      }                                                               \
  }
