// Attention of a few rows, as in decoding, where packing keys would cost more than it saves: keys and values are read
// once, where they lie.
#pragma once

#include "arena.h"
#include "operands.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// A tile's keys and values.
template <class T>
struct Columns {
  RowSet<T> keys{}, values{};
};

// show(number, tile, next tile) for n tiles one after another; list(number, index) lists one.
template <class T, class List, class Show>
void each_tile(int64_t n, List&& list, Show&& show) {
  int64_t index[2][kTile];
  Columns<T> tile[2];
  if (n > 0) tile[0] = list(0, index[0]);
  for (int64_t i = 0; i < n; ++i) {
    tile[(i + 1) & 1] = i + 1 < n ? list(i + 1, index[(i + 1) & 1]) : Columns<T>{};
    show(i, tile[i & 1], tile[(i + 1) & 1]);
  }
}

template <class T>
class Narrow {
 public:
  using A = Acc<T>;
  using V = OnVectors<T>;
  using E = Operand<V>;

  void take(Arena& arena, int d) {
    d_ = d, ld_ = int(round_up(d, 32));
    q_ = arena.take<E>(kNarrow * ld_), o_ = arena.take<A>(kNarrow * ld_);
  }
  static int64_t bytes(int d) {
    Arena arena{nullptr};
    Narrow().take(arena, d);
    return arena.used;
  }

  void begin(const RowSet<T>& q, double scale) {
    rows = q.count;
    scale_ = A(scale * kLog2e);
    std::memset(static_cast<void*>(q_), 0, sizeof(E) * kNarrow * ld_);
    std::memset(static_cast<void*>(o_), 0, sizeof(A) * kNarrow * ld_);
    for (int r = 0; r < rows; ++r) {
      if constexpr (kPaired<V>)
        std::memcpy(static_cast<void*>(q_ + r * ld_), q.row(r), d_ * sizeof(E));
      else
        each<A>(d_, [&](int64_t j, auto n) { store(q_ + r * ld_ + j, load(q.row(r) + j, n)); });
      total_[r] = Vec<A>{}, m_[r] = kNone<A>;
    }
  }

  // Fetches the rows of `next`, whose places no hardware can foresee, on the way. `biases` [rows, 64], in log2, or
  // null: what is added to scores besides.
  void step(const Columns<T>& tile, Mask mask, double bias, const Columns<T>& next, const A* biases = nullptr) {
    if (rows == 1)
      step_rows<1>(tile, mask, bias, next, biases);
    else if (rows <= 4)
      step_rows<4>(tile, mask, bias, next, biases);
    else
      step_rows<8>(tile, mask, bias, next, biases);
  }

  // Writes every row r of the output to out(r), and hands its log-sum-exp to lse(r, value); returns what finish_rows
  // does.
  template <class Out, class Lse>
  uint64_t finish(Out&& out, Lse&& lse) const {
    return finish_rows<T>(rows, o_, ld_, m_, total_, total_, d_, out, lse);
  }

  int rows = 0;

 private:
  template <int R>
  void step_rows(const Columns<T>& tile, Mask mask, double bias_, const Columns<T>& next, const A* biases) {
    constexpr int w = kLanes<A>;
    const RowSet<T>&keys = tile.keys, &values = tile.values;
    alignas(64) A s[R][kTile] = {};
    uint64_t any = 0;
    for (int r = 0; r < rows; ++r) any |= mask ? mask[r] : ~uint64_t(0);
    any &= range_bits(0, keys.count);
    for (int first = 0; first < keys.count; first += w) {
      Vec<A> part[R][w] = {};
      for (int c = 0; c < w; ++c) {
        if (first + c < next.keys.count) fetch(next.keys.row(first + c)), fetch(next.values.row(first + c));
        if (any >> first >> c & 1) dots<R>(keys.row(first + c), c, part);
      }
      for (int r = 0; r < R; ++r) store(s[r] + first, sums_of<A>(part[r]));
    }
    for (int c = 0; biases && c < rows * kTile; c += w) store(s[0] + c, load(s[0] + c) * scale_ + load(biases + c));
    const A scale = biases ? A(1) : scale_, bias = A(bias_ * kLog2e);
    for (int r = 0; r < rows; ++r)
      softmax_row<T>(
          s[r], mask ? mask[r] & any : any, scale, [&](int) { return bias; }, &m_[r], &total_[r],
          [&](A keep) {
            for (int j = 0; j < ld_; j += w) store(o_ + r * ld_ + j, load(o_ + r * ld_ + j) * keep);
          },
          [&](int c, Vec<A> x0, Vec<A> x1) { store(s[r] + c, x0), store(s[r] + c + w, x1); });
    constexpr int W = R <= 4 ? 4 : 2;
    int j = 0;
    for (; j + W * w <= d_; j += W * w) add_values<R, W>(values, any, s, j, Whole<A>{});
    each<A>(d_ - j, [&](int64_t i, auto n) { add_values<R, 1>(values, any, s, int(j + i), n); });
  }

  void fetch(const T* row) const {
    for (int j = 0; j < d_; j += int(64 / sizeof(T))) __builtin_prefetch(row + j);
  }

  // Column c of part: products of every row with a key, still to be summed.
  template <int R>
  void dots(const T* key, int c, Vec<A> (*part)[kLanes<A>]) const {
    Vec<A> acc[R];
    COGVIEW_UNROLL(r, R) acc[r] = Vec<A>{};
    if constexpr (kPaired<V>) {
      for (int j = 0; j < d_; j += 32) {
        const Pairs k = load_pairs(key + j, d_ - j);
        COGVIEW_UNROLL(r, R) acc[r] = dot_pairs(acc[r], load_pairs(q_ + r * ld_ + j), k);
      }
    } else {
      each<A>(d_, [&](int64_t j, auto n) {
        const Vec<A> k = load(key + j, n);
        COGVIEW_UNROLL(r, R) acc[r] += load(q_ + r * ld_ + j) * k;
      });
    }
    COGVIEW_UNROLL(r, R) part[r][c] = acc[r];
  }

  // o[:, j ...] += s @ values, W vectors wide.
  template <int R, int W, class N>
  void add_values(const RowSet<T>& values, uint64_t any, const A (*s)[kTile], int j, N n) {
    constexpr int w = kLanes<A>;
    Vec<A> acc[R][W];
    COGVIEW_UNROLL(r, R)
      COGVIEW_UNROLL(i, W) acc[r][i] = Vec<A>{};
    for (int c = 0; c < values.count; ++c) {
      if (!(any >> c & 1)) continue;
      const T* value = values.row(c) + j;
      Vec<A> v[W];
      COGVIEW_UNROLL(i, W) v[i] = load(value + i * w, n);
      COGVIEW_UNROLL(r, R)
        COGVIEW_UNROLL(i, W) acc[r][i] += v[i] * s[r][c];
    }
    COGVIEW_UNROLL(r, R) {
      if (r >= rows) break;
      COGVIEW_UNROLL(i, W) {
        A* o = o_ + r * ld_ + j + i * w;
        store(o, load(o) + acc[r][i]);
      }
    }
  }

  int d_ = 0, ld_ = 0;
  A scale_ = 0;
  E* q_;  // as it is multiplied
  A *o_, m_[kNarrow];
  Vec<A> total_[kNarrow];
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
