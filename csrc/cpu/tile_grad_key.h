// The backward pass of the tile engine: rows are keys, columns queries.
#pragma once

#include "tile_engine.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

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
        lse[c] = exists ? all_lse[queries.index[c]] * A(kLog2e) : -kNone<A>;  // probability 0
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

  void step(const Workspace<T>& w, const Tile& tile, Mask mask, double bias) { step(w, tile, mask, Uniform<A>(bias)); }
  template <class Bias>
  void step(const Workspace<T>& w, const Tile& tile, Mask mask, const Bias& bias) {
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
  template <class Bias>
  void gradients(const Workspace<T>& w, const Tile& tile, const Part& part, const typename Workspace<T>::Strip& strip,
                 int r, Mask mask, const Bias& bias) {
    constexpr int l = kLanes<A>;
    const A scale = scale_ * A(kLog2e);
    for (int c = part.lo; c < part.hi; c += 2 * l) {
      const int at = r % kStrip * kTile + c;
      Vec<A> p[2], ds[2];
      for (int i = 0; i < 2; ++i) {
        p[i] = exp2v<kExpDegree<T>>(load(strip.s + at + i * l) * scale +
                                    (bias.of(r, c + i * l) - load(tile.lse + c + i * l)));
        ds[i] = p[i] * (load(strip.dp + at + i * l) - load(tile.delta + c + i * l));
        if (mask) {
          p[i] = select_bits<A>(mask[r] >> (c + i * l), p[i], A(0));
          ds[i] = select_bits<A>(mask[r] >> (c + i * l), ds[i], A(0));
        }
        bias.add(r, c + i * l, ds[i]);
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

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
