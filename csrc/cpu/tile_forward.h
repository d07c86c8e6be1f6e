// The forward pass of the tile engine: rows are queries, columns keys.
#pragma once

#include "tile_engine.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

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

  void step(const Workspace<T>& w, const Tile& tile, Mask mask, double bias) { step(w, tile, mask, Uniform<A>(bias)); }
  template <class Bias>
  void step(const Workspace<T>& w, const Tile& tile, Mask mask, const Bias& bias) {
    // no score is larger than the product of the norms (Cauchy-Schwarz); false for NaN
    if (bounded_ && !(std::sqrt(norm_ * tile.norm) * std::abs(scale_) + bias.most < A(kBounded))) leave_bounded();
    if (!bounded_)
      run(w, tile, mask,
          [&](const Part&, const Strip& x, int r) { running_max(r, x, mask ? mask[r] : ~uint64_t(0), bias); });
    else if (mask)
      run(w, tile, mask, [&](const Part& part, const Strip& x, int r) { bounded<true>(r, x, part, mask[r], bias); });
    else
      run(w, tile, mask, [&](const Part& part, const Strip& x, int r) { bounded<false>(r, x, part, 0, bias); });
  }

  // Writes every row r of the output to out(r), and hands its log-sum-exp to lse(r, value); returns what finish_rows
  // does.
  template <class Out, class Lse>
  uint64_t finish(Out&& out, Lse&& lse) const {
    return finish_rows<T>(rows, o_, ld_, m_, total_, kRounds<T> ? stored_ : total_, d_, out, lse);
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

  template <bool masked, class Bias>
  void bounded(int r, const Strip& strip, const Part& part, uint64_t mask, const Bias& bias) {
    constexpr int l = kLanes<A>;
    const int at = r % kStrip * kTile;
    Vec<A> sum{}, stored{};
    for (int c = part.lo; c < part.hi; c += 2 * l) {
      Vec<A> x0 = exp2v<kExpDegree<T>>(load(strip.s + at + c) * scale_ + bias.of(r, c));
      Vec<A> x1 = exp2v<kExpDegree<T>>(load(strip.s + at + c + l) * scale_ + bias.of(r, c + l));
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

  template <class Bias>
  void running_max(int r, const Strip& strip, uint64_t mask, const Bias& bias) {
    const int at = r % kStrip * kTile;
    softmax_row<T>(
        strip.s + at, mask, scale_, [&](int c) { return bias.of(r, c); }, &m_[r], &total_[r],
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

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
