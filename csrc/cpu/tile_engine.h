// The online-softmax tile engine that every attention operator shares.
//
// An owner is up to 64 rows whose result is being summed up, a tile up to 64 columns that are packed once and shown to
// every owner of a group that sees them. Three passes: Forward (rows are queries, columns keys), GradQuery (the same)
// and GradKey (rows are keys, columns queries), so every gradient has one owner: no atomics, bitwise repeatable.
// Scores are kept in units of log2.
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
// zero, which is right for GradKey, while Forward and GradQuery have to be told.
using Mask = const uint64_t*;

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

// Strips of an owner's rows in a pipeline: while strip u is in vectors, the products `before` of the next one and
// `after` of the last one are under way, so that no product waits for what has just been written. f(strip, row) takes a
// row.
template <class Before, class F, class After>
inline void each_strip(int rows, Before&& before, F&& f, After&& after) {
  const int strips = (rows + kStrip - 1) / kStrip;
  before(0);
  for (int u = 0; u < strips; ++u) {
    if (u + 1 < strips) before(u + 1);
    for (int r = u * kStrip; r < rows && r < (u + 1) * kStrip; ++r) f(u, r);
    if (u > 0) after(u - 1);
  }
  after(strips - 1);
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

// Writes a row of the output and returns its log-sum-exp: zeros and -inf for a row that saw nothing. `weight` is the
// sum of the probabilities that were multiplied, `total` of those that were not rounded for it.
template <class T>
inline Acc<T> finish_row(const Acc<T>* o, Acc<T> m, Vec<Acc<T>> total, Vec<Acc<T>> weight, int d, T* out) {
  using A = Acc<T>;
  const A sum = hsum(total);
  write_row(o, sum == 0 ? A(0) : 1 / hsum(weight), d, out);
  return sum == 0 ? kNone<A> : A(kLn2) * m + std::log(sum);
}

// sum(x * y)
template <class T>
inline Acc<T> row_dot(const T* x, const T* y, int d) {
  Vec<Acc<T>> sum{};
  each<Acc<T>>(d, [&](int64_t j, auto n) { sum += load(x + j, n) * load(y + j, n); });
  return hsum(sum);
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
    std::memset(static_cast<void*>(o_), 0, sizeof(A) * kTile * ld_);
    norm_ = 0, bounded_ = true;
    for (int r = 0; r < rows; ++r) {
      total_[r] = stored_[r] = Vec<A>{}, m_[r] = 0;
      norm_ = vmax(row_dot(q.row(r), q.row(r), d_), norm_);
    }
  }

  void step(const Workspace<T>& w, const Tile& tile, Mask mask, double bias_) {
    const A bias = A(bias_ * kLog2e);
    // no score is larger than the product of the norms (Cauchy-Schwarz); false for NaN
    if (bounded_ && !(std::sqrt(norm_ * tile.norm) * std::abs(scale_) + std::abs(bias) < A(kBounded))) leave_bounded();
    if (!bounded_)
      run(w, tile, [&](int r, const Strip& x) { running_max(r, x, mask ? mask[r] : ~uint64_t(0), bias); });
    else if (mask)
      run(w, tile, [&](int r, const Strip& x) { bounded<true>(r, x, mask[r], bias); });
    else
      run(w, tile, [&](int r, const Strip& x) { bounded<false>(r, x, 0, bias); });
  }

  // Writes row r of the output, and returns its log-sum-exp.
  A finish(int r, T* out) const {
    return finish_row(o_ + r * ld_, m_[r], total_[r], kRounds<T> ? stored_[r] : total_[r], d_, out);
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
  void run(const Workspace<T>& w, const Tile& tile, F&& softmax) {
    each_strip(
        rows,
        [&](int u) {
          gemm<T>(kTile, ld_, q_ + u * kStrip * ld_, ld_, plane(), tile.kt, w.strip[u & 1].s, kTile, false);
        },
        [&](int u, int r) { softmax(r, w.strip[u & 1]); },
        [&](int u) {
          gemm<T>(ld_, kTile, w.strip[u & 1].p, kTile, w.plane, tile.v, o_ + u * kStrip * ld_, ld_, true);
        });
  }

  template <bool masked>
  void bounded(int r, const Strip& strip, uint64_t mask, A bias) {
    constexpr int l = kLanes<A>;
    const int at = r % kStrip * kTile;
    Vec<A> sum{}, stored{};
    for (int c = 0; c < kTile; c += 2 * l) {
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
          for (int j = 0; j < ld_; j += kLanes<A>) store(o_ + r * ld_ + j, load(o_ + r * ld_ + j) * keep);
          if (kRounds<T>) stored_[r] *= keep;
        },
        [&](int c, Vec<A> x0, Vec<A> x1) {
          const Vec<A> stored = store_pair<T>(strip.p + at + c, Workspace<T>::plane, x0, x1);
          if (kRounds<T>) stored_[r] += stored;
        });
  }

  int d_ = 0, ld_ = 0;
  bool bounded_ = true;
  A scale_ = 0, norm_ = 0;
  E* q_;
  A *o_, *m_;
  Vec<A>*total_, *stored_;  // sums of probabilities, and of them as they were rounded to be multiplied
};

// Row r of scores s and dout-products dp, to score gradients p (dp - delta) with p = 2^(s + offset), and where wanted
// the probabilities p; offset and delta by column.
template <bool want_p, class T, class Offset, class Delta>
inline void gradients(const Workspace<T>& w, int r, Mask mask, Acc<T> scale, Offset&& offset, Delta&& delta) {
  using A = Acc<T>;
  constexpr int l = kLanes<A>;
  const auto& strip = w.strip[r / kStrip & 1];
  for (int c = 0; c < kTile; c += 2 * l) {
    const int at = r % kStrip * kTile + c;
    Vec<A> p[2], ds[2];
    for (int i = 0; i < 2; ++i) {
      p[i] = exp2v<kExpDegree<T>>(load(strip.s + at + i * l) * scale + offset(c + i * l));
      ds[i] = p[i] * (load(strip.dp + at + i * l) - delta(c + i * l));
      if (mask) {
        p[i] = select_bits<A>(mask[r] >> (c + i * l), p[i], A(0));
        ds[i] = select_bits<A>(mask[r] >> (c + i * l), ds[i], A(0));
      }
    }
    if (want_p) store_pair<T>(strip.p + at, w.plane, p[0], p[1]);
    store_pair<T>(w.ds + r * kTile + c, w.ds_plane, ds[0], ds[1]);
  }
}

template <class T>
struct GradQuery {
  using A = Acc<T>;
  using E = Operand<T>;

  // Keys twice and values, packed.
  struct Tile {
    E *kt, *k, *vt;
    uint64_t valid = 0;
    void take(Arena& arena, int d) {
      const int64_t n = kTile * round_up(d, kPad<T>) * kPlanes<T>;
      kt = arena.take<E>(n), k = arena.take<E>(n), vt = arena.take<E>(n);
    }
    void pack(const RowSet<T>& keys, const RowSet<T>& values, int d) {
      const int ld = int(round_up(d, kPad<T>));
      pack_transposed(keys, d, kt, ld);
      pack_b(keys, d, k, ld);
      pack_transposed(values, d, vt, ld);
    }
  };

  void take(Arena& arena, int d) {
    d_ = d, ld_ = int(round_up(d, kPad<T>));
    q_ = arena.take<E>(kTile * ld_ * kPlanes<T>), do_ = arena.take<E>(kTile * ld_ * kPlanes<T>);
    dq_ = arena.take<A>(kTile * ld_), lse_ = arena.take<A>(kTile), delta_ = arena.take<A>(kTile);
  }

  void begin(const RowSet<T>& q, const RowSet<T>& dout, double scale) {
    rows = q.count;
    scale_ = A(scale);
    pack_a(q, int(round_up(rows, 16)), d_, q_, ld_, plane());
    pack_a(dout, int(round_up(rows, 16)), d_, do_, ld_, plane());
    std::memset(static_cast<void*>(dq_), 0, sizeof(A) * kTile * ld_);
  }

  // lse of row r as the forward gave it; delta = sum(dout * out) - dlse.
  void set_row(int r, A lse, A delta) { lse_[r] = lse * A(kLog2e), delta_[r] = delta; }

  void step(const Workspace<T>& w, const Tile& tile, Mask mask, double bias_) {
    const A scale = scale_ * A(kLog2e), bias = A(bias_ * kLog2e);
    each_strip(
        rows,
        [&](int u) {
          const int64_t at = u * kStrip * ld_;
          gemm<T>(kTile, ld_, q_ + at, ld_, plane(), tile.kt, w.strip[u & 1].s, kTile, false);
          gemm<T>(kTile, ld_, do_ + at, ld_, plane(), tile.vt, w.strip[u & 1].dp, kTile, false);
        },
        [&](int, int r) {
          const Vec<A> offset = splat(bias - lse_[r]), delta = splat(delta_[r]);
          gradients<false, T>(w, r, mask, scale, [&](int) { return offset; }, [&](int) { return delta; });
        },
        [&](int u) {
          gemm<T>(ld_, kTile, w.ds + u * w.plane, kTile, w.ds_plane, tile.k, dq_ + u * kStrip * ld_, ld_, true);
        });
  }

  void finish(int r, T* dq) const { write_row(dq_ + r * ld_, scale_, d_, dq); }

  int rows = 0;

 private:
  int64_t plane() const { return kTile * ld_; }

  int d_ = 0, ld_ = 0;
  A scale_ = 0;
  E *q_, *do_;
  A *dq_, *lse_, *delta_;
};

template <class T>
struct GradKey {
  using A = Acc<T>;
  using E = Operand<T>;

  // Queries and their output gradients, both twice, packed, and what belongs to each query.
  struct Tile {
    E *qt, *q, *dot, *dout;
    A *lse, *delta;
    A* dq = nullptr;  // [ld, 64], transposed: where their own gradient is summed up, without the scale; or null
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
    const A scale = scale_ * A(kLog2e), bias = A(bias_ * kLog2e);
    each_strip(
        rows,
        [&](int u) {
          const int64_t at = u * kStrip * ld_;
          gemm<T>(kTile, ld_, k_ + at, ld_, plane(), tile.qt, w.strip[u & 1].s, kTile, false);
          gemm<T>(kTile, ld_, v_ + at, ld_, plane(), tile.dot, w.strip[u & 1].dp, kTile, false);
        },
        [&](int, int r) {
          gradients<true, T>(
              w, r, mask, scale, [&](int c) { return bias - load(tile.lse + c); },
              [&](int c) { return load(tile.delta + c); });
        },
        [&](int u) {
          const int64_t at = u * kStrip * ld_;
          gemm<T>(ld_, kTile, w.ds + u * w.plane, kTile, w.ds_plane, tile.q, dk_ + at, ld_, true);
          gemm<T>(ld_, kTile, w.strip[u & 1].p, kTile, w.plane, tile.dout, dv_ + at, ld_, true);
        });
    if (!tile.dq) return;
    for (int i = 0; i < kPlanes<T> && rows < kTile; ++i)
      std::memset(static_cast<void*>(w.ds + i * w.ds_plane + rows * kTile), 0, sizeof(E) * (kTile - rows) * kTile);
    const E* ds = a_to_b<T>(w.ds, w.ds_pairs);
    for (int j = 0; j < ld_; j += kStrip)
      gemm<T>(kTile, kTile, kt_ + j * kTile, kTile, plane(), ds, tile.dq + j * kTile, kTile, true);
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

  int d_ = 0, ld_ = 0;
  A scale_ = 0;
  E *k_, *v_, *kt_;
  A *dk_, *dv_;
};

// Rows of the transpose of acc [ld, 64] times a factor, in the tensor's dtype.
template <class T>
void write_transposed(const Acc<T>* acc, Acc<T> factor, int rows, int d, T* out, int64_t stride) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  for (int first = 0; first < rows; first += w)
    each<A>(d, [&](int64_t j, auto n) {
      Vec<A> x[w];
      for (int i = 0; i < w; ++i) x[i] = i < n ? load(acc + (j + i) * kTile + first) : Vec<A>{};
      transpose<A>(x);
      for (int i = 0; i < w && first + i < rows; ++i) put(out + (first + i) * stride + j, x[i] * factor, n);
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
