// The online-softmax tile engine that every attention operator shares.
//
// An operator's geometry hands it tiles: up to 64 rows against up to 64 columns by index, one mask word a row, one
// bias. Three passes: Forward (rows are queries, columns keys), GradQuery (the same tiles again) and GradKey (rows
// are keys, columns queries), so every gradient has one owner: no atomics, bitwise repeatable. Narrow is Forward for
// a few rows, where packing keys would cost more than it saves. Scores are kept in units of log2.
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
constexpr int kHalf = kTile / 2;  // rows of scores that are worked on at a time, so that they stay in the L1 cache
template <class A>
constexpr A kNone = -std::numeric_limits<A>::infinity();

// Bits [lo, hi) of a word; both may lie outside of it.
inline uint64_t range_bits(int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo, hi = hi > 64 ? 64 : hi;
  if (lo >= hi) return 0;
  return (hi == 64 ? ~uint64_t(0) : (uint64_t(1) << hi) - 1) & ~((uint64_t(1) << lo) - 1);
}

// Columns of one tile, and which of them each row sees.
struct Tile {
  int64_t index[kTile];
  int count;
  uint64_t mask[kTile];
  double bias;
};

// Rows of accumulators times a factor each, in the tensor's dtype.
template <class T>
inline void write_row(const Acc<T>* acc, Acc<T> factor, int d, T* out) {
  each<Acc<T>>(d, [&](int64_t j, auto n) { put(out + j, load(acc + j) * factor, n); });
}

// One row of scores: the running maximum (in m), and the row's probabilities against it, to p and added to `total`.
// Calls rescale(keep) when the maximum moved.
template <class A, class E, class Rescale>
inline void softmax_row(const A* s, uint64_t mask, A scale, A bias, A& m, Vec<A>& total, E* p, Rescale&& rescale) {
  constexpr int w = kLanes<A>, n = kTile / w;
  Vec<A> x[n], top = splat(kNone<A>);
  for (int c = 0; c < n; ++c) {
    x[c] = select_bits<A>(mask >> (c * w), load(s + c * w) * scale + bias, kNone<A>);
    top = vmax(x[c], top);
  }
  const A peak = hmax(top);
  if (peak > m) {
    if (m != kNone<A>) {
      const A keep = exp2v(splat(m - peak))[0];
      total *= keep;
      rescale(keep);
    }
    m = peak;
  }
  const A base = m == kNone<A> ? A(0) : m;  // masked entries stay exp2(-inf) = 0; a NaN among the others stays NaN
  for (int c = 0; c < n; ++c) {
    x[c] = exp2v(x[c] - base);
    total += x[c];
    store_operand(p + c * w, x[c]);
  }
}

template <class A>
inline A finish_row(A m, Vec<A> total, A* inverse) {
  const A sum = hsum(total);
  *inverse = sum == 0 ? A(0) : 1 / sum;
  return sum == 0 ? kNone<A> : A(kLn2) * m + std::log(sum);
}

template <class T>
class Forward {
 public:
  using A = Acc<T>;
  using E = Operand<T>;
  static int64_t bytes(int d) { return Forward(Arena{nullptr}, d).used_; }

  Forward(Arena arena, int d) : d_(d), ld_(int(round_up(d, kPad<T>))) {
    q_ = arena.take<E>(kTile * ld_), rows_ = arena.take<E>(kTile * ld_);
    kt_ = arena.take<E>(kTile * ld_), vb_ = arena.take<E>(kTile * ld_);
    s_ = arena.take<A>(kHalf * kTile), p_ = arena.take<E>(kHalf * kTile);
    o_ = arena.take<A>(kTile * ld_), total_ = arena.take<Vec<A>>(kTile), m_ = arena.take<A>(kTile);
    used_ = arena.used;
  }

  void begin(const RowSet<T>& q, double scale) {
    rows = q.count;
    padded_ = int(round_up(rows, 16));
    scale_ = A(scale * kLog2e);
    pack_a(q, padded_, d_, q_, ld_);
    std::memset(static_cast<void*>(p_), 0, sizeof(E) * kHalf * kTile);
    std::memset(static_cast<void*>(o_), 0, sizeof(A) * kTile * ld_);
    for (int r = 0; r < kTile; ++r) total_[r] = Vec<A>{}, m_[r] = kNone<A>;
  }

  void step(const T* k, int64_t k_stride, const T* v, int64_t v_stride, const Tile& tile) {
    pack_a(RowSet<T>{k, k_stride, tile.index, tile.count}, kTile, d_, rows_, ld_);
    pack_b_transposed<T>(rows_, ld_, kt_);
    pack_a(RowSet<T>{v, v_stride, tile.index, tile.count}, kTile, d_, rows_, ld_);
    const E* vb = pack_b<T>(rows_, ld_, vb_);
    const A bias = A(tile.bias * kLog2e);
    for (int first = 0; first < rows; first += kHalf) {
      const int m = padded_ - first < kHalf ? padded_ - first : kHalf,
                end = first + kHalf < rows ? first + kHalf : rows;
      gemm(m, kTile, ld_, q_ + first * ld_, ld_, kt_, kTile, s_, kTile, false);
      for (int r = first; r < end; ++r) {
        const auto rescale = [&](A keep) {
          for (int j = 0; j < ld_; j += kLanes<A>) store(o_ + r * ld_ + j, load(o_ + r * ld_ + j) * keep);
        };
        const int at = (r - first) * kTile;
        softmax_row(s_ + at, tile.mask[r], scale_, bias, m_[r], total_[r], p_ + at, rescale);
      }
      gemm(m, ld_, kTile, p_, kTile, vb, ld_, o_ + first * ld_, ld_, true);
    }
  }

  // Writes row r of the output, and returns its log-sum-exp.
  A finish(int r, T* out) {
    A inverse;
    const A lse = finish_row(m_[r], total_[r], &inverse);
    write_row(o_ + r * ld_, inverse, d_, out);
    return lse;
  }

  int rows = 0;

 private:
  int d_, ld_, padded_ = 0;
  A scale_ = 0;
  E *q_, *rows_, *kt_, *vb_, *p_;
  A *s_, *o_, *m_;
  Vec<A>* total_;
  int64_t used_;
};

constexpr int kNarrow = 4;  // up to so many rows Narrow is the faster one

template <class T>
class Narrow {
 public:
  using A = Acc<T>;
  static int64_t bytes(int d) { return Narrow(Arena{nullptr}, d).used_; }

  Narrow(Arena arena, int d) : d_(d), ld_(int(round_up(d, kLanes<A>))) {
    q_ = arena.take<A>(kNarrow * ld_), o_ = arena.take<A>(kNarrow * ld_), s_ = arena.take<A>(kTile);
    used_ = arena.used;
  }

  void begin(const RowSet<T>& q, double scale) {
    rows = q.count;
    scale_ = A(scale * kLog2e);
    for (int r = 0; r < rows; ++r) {
      each<Acc<T>>(d_, [&](int64_t j, auto n) {
        store(q_ + r * ld_ + j, load(q.row(r) + j, n));
        store(o_ + r * ld_ + j, Vec<A>{});
      });
      total_[r] = Vec<A>{}, m_[r] = kNone<A>;
    }
  }

  void step(const T* k, int64_t k_stride, const T* v, int64_t v_stride, const Tile& tile) {
    for (int r = 0; r < rows; ++r) {
      if (!tile.mask[r]) continue;
      A *q = q_ + r * ld_, *o = o_ + r * ld_;
      for (int c = 0; c < kTile; ++c) {
        s_[c] = 0;
        if (!(tile.mask[r] >> c & 1)) continue;
        Vec<A> dot{};
        const T* key = k + tile.index[c] * k_stride;
        each<Acc<T>>(d_, [&](int64_t j, auto n) { dot += load(q + j) * load(key + j, n); });
        s_[c] = hsum(dot);
      }
      const auto rescale = [&](A keep) {
        for (int j = 0; j < ld_; j += kLanes<A>) store(o + j, load(o + j) * keep);
      };
      softmax_row(s_, tile.mask[r], scale_, A(tile.bias * kLog2e), m_[r], total_[r], s_, rescale);
      for (int c = 0; c < tile.count; ++c) {
        if (!(tile.mask[r] >> c & 1)) continue;
        const T* value = v + tile.index[c] * v_stride;
        each<Acc<T>>(d_, [&](int64_t j, auto n) { store(o + j, load(o + j) + load(value + j, n) * s_[c]); });
      }
    }
  }

  A finish(int r, T* out) {
    A inverse;
    const A lse = finish_row(m_[r], total_[r], &inverse);
    write_row(o_ + r * ld_, inverse, d_, out);
    return lse;
  }

  int rows = 0;

 private:
  int d_, ld_;
  A scale_ = 0;
  A *q_, *o_, *s_, m_[kNarrow];
  Vec<A> total_[kNarrow];
  int64_t used_;
};

// From scores s and dout-products dp to probabilities and score gradients: p = 2^(s - lse), ds = p (dp - delta).
// A bit that is not set makes both 0.
template <class A>
struct Probabilities {
  Vec<A> p, ds;
};
template <class A>
inline Probabilities<A> backward_vector(Vec<A> s, Vec<A> dp, uint64_t bits, A scale, A bias, Vec<A> lse, Vec<A> delta) {
  const Vec<A> p = select_bits<A>(bits, exp2v(s * scale + (bias - lse)), A(0));
  return {p, select_bits<A>(bits, p * (dp - delta), A(0))};
}

template <class T>
class GradQuery {
 public:
  using A = Acc<T>;
  using E = Operand<T>;
  static int64_t bytes(int d) { return GradQuery(Arena{nullptr}, d).used_; }

  GradQuery(Arena arena, int d) : d_(d), ld_(int(round_up(d, kPad<T>))) {
    q_ = arena.take<E>(kTile * ld_), do_ = arena.take<E>(kTile * ld_);
    rows_ = arena.take<E>(kTile * ld_), kb_ = arena.take<E>(kTile * ld_);
    kt_ = arena.take<E>(kTile * ld_), vt_ = arena.take<E>(kTile * ld_);
    s_ = arena.take<A>(kHalf * kTile), dp_ = arena.take<A>(kHalf * kTile), ds_ = arena.take<E>(kHalf * kTile);
    dq_ = arena.take<A>(kTile * ld_), lse_ = arena.take<A>(kTile), delta_ = arena.take<A>(kTile);
    used_ = arena.used;
  }

  void begin(const RowSet<T>& q, const RowSet<T>& dout, double scale) {
    rows = q.count;
    padded_ = int(round_up(rows, 16));
    scale_ = A(scale);
    pack_a(q, padded_, d_, q_, ld_);
    pack_a(dout, padded_, d_, do_, ld_);
    std::memset(static_cast<void*>(ds_), 0, sizeof(E) * kHalf * kTile);
    std::memset(static_cast<void*>(dq_), 0, sizeof(A) * kTile * ld_);
  }

  // lse of row r as the forward gave it; delta = sum(dout * out) - dlse.
  void set_row(int r, A lse, A delta) { lse_[r] = lse * A(kLog2e), delta_[r] = delta; }

  void step(const T* k, int64_t k_stride, const T* v, int64_t v_stride, const Tile& tile) {
    constexpr int w = kLanes<A>;
    pack_a(RowSet<T>{v, v_stride, tile.index, tile.count}, kTile, d_, rows_, ld_);
    pack_b_transposed<T>(rows_, ld_, vt_);
    pack_a(RowSet<T>{k, k_stride, tile.index, tile.count}, kTile, d_, rows_, ld_);
    pack_b_transposed<T>(rows_, ld_, kt_);
    const E* kb = pack_b<T>(rows_, ld_, kb_);
    const A scale = scale_ * A(kLog2e), bias = A(tile.bias * kLog2e);
    for (int first = 0; first < rows; first += kHalf) {
      const int m = padded_ - first < kHalf ? padded_ - first : kHalf,
                end = first + kHalf < rows ? first + kHalf : rows;
      gemm(m, kTile, ld_, q_ + first * ld_, ld_, kt_, kTile, s_, kTile, false);
      gemm(m, kTile, ld_, do_ + first * ld_, ld_, vt_, kTile, dp_, kTile, false);
      for (int r = first; r < end; ++r)
        for (int c = 0; c < kTile; c += w) {
          const int at = (r - first) * kTile + c;
          const auto g = backward_vector<A>(load(s_ + at), load(dp_ + at), tile.mask[r] >> c, scale, bias,
                                            splat(lse_[r]), splat(delta_[r]));
          store_operand(ds_ + at, g.ds);
        }
      gemm(m, ld_, kTile, ds_, kTile, kb, ld_, dq_ + first * ld_, ld_, true);
    }
  }

  void finish(int r, T* dq) { write_row(dq_ + r * ld_, scale_, d_, dq); }

  int rows = 0;

 private:
  int d_, ld_, padded_ = 0;
  A scale_ = 0;
  E *q_, *do_, *rows_, *kt_, *vt_, *kb_, *ds_;
  A *s_, *dp_, *dq_, *lse_, *delta_;
  int64_t used_;
};

template <class T>
class GradKey {
 public:
  using A = Acc<T>;
  using E = Operand<T>;
  static int64_t bytes(int d) { return GradKey(Arena{nullptr}, d).used_; }

  GradKey(Arena arena, int d) : d_(d), ld_(int(round_up(d, kPad<T>))) {
    k_ = arena.take<E>(kTile * ld_), v_ = arena.take<E>(kTile * ld_);
    q_rows_ = arena.take<E>(kTile * ld_), qt_ = arena.take<E>(kTile * ld_), qb_ = arena.take<E>(kTile * ld_);
    do_rows_ = arena.take<E>(kTile * ld_), dot_ = arena.take<E>(kTile * ld_), dob_ = arena.take<E>(kTile * ld_);
    s_ = arena.take<A>(kHalf * kTile), dp_ = arena.take<A>(kHalf * kTile);
    p_ = arena.take<E>(kHalf * kTile), ds_ = arena.take<E>(kHalf * kTile);
    dk_ = arena.take<A>(kTile * ld_), dv_ = arena.take<A>(kTile * ld_);
    used_ = arena.used;
  }

  void begin(const RowSet<T>& k, const RowSet<T>& v, double scale) {
    rows = k.count;
    padded_ = int(round_up(rows, 16));
    scale_ = A(scale);
    pack_a(k, padded_, d_, k_, ld_);
    pack_a(v, padded_, d_, v_, ld_);
    std::memset(static_cast<void*>(p_), 0, sizeof(E) * kHalf * kTile);
    std::memset(static_cast<void*>(ds_), 0, sizeof(E) * kHalf * kTile);
    std::memset(static_cast<void*>(dk_), 0, sizeof(A) * kTile * ld_);
    std::memset(static_cast<void*>(dv_), 0, sizeof(A) * kTile * ld_);
  }

  // lse and delta are indexed as the queries are.
  void step(const T* q, int64_t q_stride, const T* dout, int64_t dout_stride, const A* lse, const A* delta,
            const Tile& tile) {
    constexpr int w = kLanes<A>;
    alignas(64) A lse2[kTile] = {}, del[kTile] = {};
    for (int c = 0; c < tile.count; ++c) lse2[c] = lse[tile.index[c]] * A(kLog2e), del[c] = delta[tile.index[c]];
    pack_a(RowSet<T>{q, q_stride, tile.index, tile.count}, kTile, d_, q_rows_, ld_);
    pack_b_transposed<T>(q_rows_, ld_, qt_);
    const E* qb = pack_b<T>(q_rows_, ld_, qb_);
    pack_a(RowSet<T>{dout, dout_stride, tile.index, tile.count}, kTile, d_, do_rows_, ld_);
    pack_b_transposed<T>(do_rows_, ld_, dot_);
    const E* dob = pack_b<T>(do_rows_, ld_, dob_);
    const A scale = scale_ * A(kLog2e), bias = A(tile.bias * kLog2e);
    for (int first = 0; first < rows; first += kHalf) {
      const int m = padded_ - first < kHalf ? padded_ - first : kHalf,
                end = first + kHalf < rows ? first + kHalf : rows;
      gemm(m, kTile, ld_, k_ + first * ld_, ld_, qt_, kTile, s_, kTile, false);
      gemm(m, kTile, ld_, v_ + first * ld_, ld_, dot_, kTile, dp_, kTile, false);
      for (int r = first; r < end; ++r)
        for (int c = 0; c < kTile; c += w) {
          const int at = (r - first) * kTile + c;
          const auto g = backward_vector<A>(load(s_ + at), load(dp_ + at), tile.mask[r] >> c, scale, bias,
                                            load(lse2 + c), load(del + c));
          store_operand(p_ + at, g.p);
          store_operand(ds_ + at, g.ds);
        }
      gemm(m, ld_, kTile, ds_, kTile, qb, ld_, dk_ + first * ld_, ld_, true);
      gemm(m, ld_, kTile, p_, kTile, dob, ld_, dv_ + first * ld_, ld_, true);
    }
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
  int d_, ld_, padded_ = 0;
  A scale_ = 0;
  E *k_, *v_, *q_rows_, *qt_, *qb_, *do_rows_, *dot_, *dob_, *p_, *ds_;
  A *s_, *dp_, *dk_, *dv_;
  int64_t used_;
};

// delta of a row: sum(dout * out) - dlse.
template <class T>
inline Acc<T> row_delta(const T* dout, const T* out, int d, Acc<T> dlse) {
  Vec<Acc<T>> sum{};
  each<Acc<T>>(d, [&](int64_t j, auto n) { sum += load(dout + j, n) * load(out + j, n); });
  return hsum(sum) - dlse;
}

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
