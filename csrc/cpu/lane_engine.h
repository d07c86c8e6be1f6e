// Attention of 16 queries, the lanes, over lists of keys that are read where they lie.
//
// Each lane sees its own of a list's keys, and no key costs more than its own products. Softmax is a running maximum
// and sum for each lane. Scores are kept in units of log2.
#pragma once

#include "arena.h"
#include "lane_gemm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int kListed = 256;  // keys at most

// Keys and values, the lanes that see each, and what is added to its scores (in log2); with `dk` and `dv` where their
// gradients are summed up.
template <class T>
struct KeyList {
  using A = Acc<T>;
  using E = Operand<T>;
  const E *k[kListed], *v[kListed];
  A *dk[kListed], *dv[kListed], bias[kListed];
  uint16_t lanes[kListed];
  int count = 0;
  // In place of `bias`: a number for each lane (in log2), and where its gradient is summed up.
  bool tables = false;
  const A* table[kListed];
  A* dtable[kListed];

  // Products are of 8 keys: as many more that no lane sees, whose gradients go to `nowhere`.
  void pad(A* nowhere) {
    for (; count % 8; ++count) {
      k[count] = k[0], v[count] = v[0], dk[count] = dv[count] = nowhere, bias[count] = 0, lanes[count] = 0;
      if (tables) table[count] = table[0], dtable[count] = dtable[0];
    }
  }
};

// What is added to the scores of key i in vector v.
template <bool tables, class T>
inline auto bias_of(const KeyList<T>& keys, int i, int v) {
  if constexpr (tables)
    return load(keys.table[i] + v * kLanes<Acc<T>>);
  else
    return keys.bias[i];
}

// A number for each lane.
template <class A>
struct PerLane {
  static constexpr int n = kLaneVecs<A>, l = kLanes<A>;
  Vec<A> at[n];
  void fill(A x) {
    for (Vec<A>& v : at) v = splat(x);
  }
  void read(const A* x) {
    COGVIEW_UNROLL(v, n) at[v] = load(x + v * l);
  }
  void write(A* x) const {
    COGVIEW_UNROLL(v, n) store(x + v * l, at[v]);
  }
};

template <class T>
struct LaneForward {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int n = kLaneVecs<A>, l = kLanes<A>;

  void take(Arena& arena, int d) {
    d_ = d, ld_ = int(round_up(d, kRowPad<T>));
    rows_ = arena.take<E>(kQueries * ld_), packed_ = arena.take<A>(kQueries * ld_), o_ = arena.take<A>(kQueries * ld_);
    p_ = arena.take<A>(kListed * kQueries);
  }

  void begin(const RowSet<T>& q, double scale) {
    count_ = q.count, scale_ = A(scale * kLog2e), started_ = false;
    pack_a(q, kQueries, d_, rows_, ld_, 0);
    pack_queries<T>(rows_, ld_, packed_);
    std::memset(static_cast<void*>(o_), 0, sizeof(A) * kQueries * ld_);
    for (int r = 0; r < kQueries; ++r) out_[r] = o_ + r * ld_;
    top_.fill(kNone<A>), total_.fill(0), stored_.fill(0);
  }

  void step(KeyList<T>& keys) {
    if (!keys.count) return;
    keys.pad(nullptr);
    const PerLane<A> top = keys.tables ? scores<true>(keys) : scores<false>(keys);
    if (started_) rescale(top);
    started_ = true, top_ = top;
    // masked scores stay exp2(-inf) = 0, also for a lane without a maximum; NaN stays NaN
    PerLane<A> base = top;
    for (Vec<A>& x : base.at) x = x == kNone<A> ? splat(A(0)) : x;
    PerLane<A> total = total_, stored = stored_;
    for (int i = 0; i < keys.count; i += 2) probabilities(i, base, total, stored);
    total_ = total, stored_ = stored;
    add_products<T, 1, kQueries>(kQueries, keys.count / kUnit<T>, keys.v, p_, out_, ld_);
    keys.count = 0;
  }

  // Writes every query's output to out(lane), and hands its log-sum-exp to lse(lane, value): zeros and -inf if it saw
  // nothing. Returns what finish_rows does.
  template <class Out, class Lse>
  uint64_t finish(Out&& out, Lse&& lse) const {
    A total[kQueries], inverse[kQueries], logs[kQueries];
    total_.write(total);
    PerLane<A> log, factor;
    COGVIEW_UNROLL(v, n) {
      log.at[v] = top_.at[v] * A(kLn2) + logv(total_.at[v]);
      factor.at[v] = A(1) / (kPaired<T> ? stored_ : total_).at[v];
    }
    log.write(logs), factor.write(inverse);
    uint64_t spoilt = 0;
    for (int r = 0; r < count_; ++r) {
      if (total[r] == 0)
        std::memset(static_cast<void*>(out(r)), 0, d_ * sizeof(T));
      else
        write_row(o_ + r * ld_, inverse[r], d_, out(r));
      lse(r, total[r] == 0 ? kNone<A> : logs[r]);
      spoilt |= uint64_t(!finite_row(o_ + r * ld_, d_)) << r;
    }
    return spoilt;
  }

 private:
  // To p_; returns the maxima.
  template <bool tables>
  PerLane<A> scores(const KeyList<T>& keys) {
    PerLane<A> top = top_;
    for (int i = 0; i < keys.count; i += kBlockKeys) {
      Vec<A> s[kBlockKeys][n];
      dots<T, kBlockKeys>(keys.k + i, packed_, ld_ / kUnit<T>, s);
      COGVIEW_UNROLL(c, kBlockKeys)
        COGVIEW_UNROLL(v, n) {
          const Vec<A> x = select_bits<A>(keys.lanes[i + c] >> (v * l),
                                          s[c][v] * scale_ + bias_of<tables>(keys, i + c, v), kNone<A>);
          store(p_ + (i + c) * kQueries + v * l, x);
          top.at[v] = vmax(x, top.at[v]);
        }
    }
    return top;
  }

  // What was summed so far, to new maxima.
  void rescale(const PerLane<A>& top) {
    PerLane<A> keep;
    COGVIEW_UNROLL(v, n) {
      const Vec<A> before = top_.at[v];
      keep.at[v] = before == top.at[v] ? splat(A(1)) : exp2v(before - top.at[v]);
      total_.at[v] *= keep.at[v], stored_.at[v] *= keep.at[v];
    }
    A factor[kQueries];
    keep.write(factor);
    for (int r = 0; r < kQueries; ++r)
      if (factor[r] != 1)
        for (int j = 0; j < ld_; j += l) store(out_[r] + j, load(out_[r] + j) * factor[r]);
  }

  // Keys i and i + 1, in place.
  void probabilities(int i, const PerLane<A>& top, PerLane<A>& total, PerLane<A>& stored) const {
    Vec<A> x[2][n];
    COGVIEW_UNROLL(c, 2)
      COGVIEW_UNROLL(v, n) {
        x[c][v] = exp2v<kExpDegree<T>>(load(p_ + (i + c) * kQueries + v * l) - top.at[v]);
        total.at[v] += x[c][v];
      }
    if constexpr (kPaired<T>) {
      const Pairs pairs = interleave_halves(to_pairs(x[0][0], x[1][0]));
      store_pairs(p_ + i / 2 * kQueries, pairs);
      stored.at[0] = dot_pairs(stored.at[0], pairs, ones());
    } else {
      COGVIEW_UNROLL(c, 2)
        COGVIEW_UNROLL(v, n) store(p_ + (i + c) * kQueries + v * l, x[c][v]);
    }
  }

  int d_ = 0, ld_ = 0, count_ = 0;
  bool started_ = false;
  A scale_ = 0;
  E* rows_;
  A *packed_, *o_, *p_, *out_[kQueries];
  PerLane<A> top_, total_, stored_;  // stored: of the probabilities as they were rounded to be multiplied
};

template <class T>
struct LaneBackward {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int n = kLaneVecs<A>, l = kLanes<A>;

  void take(Arena& arena, int d) {
    d_ = d, ld_ = int(round_up(d, kRowPad<T>));
    q_ = arena.take<E>(kQueries * ld_), dout_ = arena.take<E>(kQueries * ld_);
    packed_q_ = arena.take<A>(kQueries * ld_), packed_dout_ = arena.take<A>(kQueries * ld_);
    dq_ = arena.take<A>(kQueries * ld_), nowhere_ = arena.take<A>(ld_);
    p_ = arena.take<E>(kListed * kQueries), ds_ = arena.take<E>(kListed * kQueries);
    ds_pairs_ = kPaired<T> ? arena.take<A>(kListed / 2 * kQueries) : nullptr;
  }

  // lse and delta are indexed as the queries are.
  void begin(const RowSet<T>& q, const RowSet<T>& dout, const A* lse, const A* delta, double scale) {
    count_ = q.count, scale_ = A(scale);
    pack_a(q, kQueries, d_, q_, ld_, 0), pack_a(dout, kQueries, d_, dout_, ld_, 0);
    pack_queries<T>(q_, ld_, packed_q_), pack_queries<T>(dout_, ld_, packed_dout_);
    std::memset(static_cast<void*>(dq_), 0, sizeof(A) * kQueries * ld_);
    A minus_lse[kQueries], deltas[kQueries];
    for (int r = 0; r < kQueries; ++r) {
      q_rows_[r] = q_ + r * ld_, dout_rows_[r] = dout_ + r * ld_, out_[r] = dq_ + r * ld_;
      minus_lse[r] = r < count_ ? -lse[r] * A(kLog2e) : A(0), deltas[r] = r < count_ ? delta[r] : A(0);
    }
    minus_lse_.read(minus_lse), delta_.read(deltas);
  }

  // Adds to the gradients of the queries (and the tables), and of the keys and the values; in units of 1 / scale those
  // of queries and keys.
  void step(KeyList<T>& keys, bool to_queries, bool to_keys) {
    if (!keys.count) return;
    keys.pad(nowhere_);
    if (keys.tables)
      for (int i = 0; i < keys.count; i += kBlockKeys) gradients<true>(keys, i, to_queries);
    else
      for (int i = 0; i < keys.count; i += kBlockKeys) gradients<false>(keys, i, false);
    const A* ds = kPaired<T> ? ds_pairs_ : reinterpret_cast<const A*>(ds_);
    if (to_queries) add_products<T, 1, kQueries>(kQueries, keys.count / kUnit<T>, keys.k, ds, out_, ld_);
    if (to_keys) {
      constexpr int across = kQueries / kUnit<T>;
      add_products<T, across, 1>(keys.count, across, dout_rows_, reinterpret_cast<const A*>(p_), keys.dv, ld_);
      add_products<T, across, 1>(keys.count, across, q_rows_, reinterpret_cast<const A*>(ds_), keys.dk, ld_);
    }
    keys.count = 0;
  }

  template <class Out>
  void finish(Out&& dq) const {
    for (int r = 0; r < count_; ++r) write_row(dq_ + r * ld_, scale_, d_, dq(r));
  }

 private:
  // Probabilities p = 2^(s - lse) and score gradients p (dp - delta) of a block of keys.
  template <bool tables>
  void gradients(const KeyList<T>& keys, int first, bool to_tables) {
    Vec<A> p[kBlockKeys][n], ds[kBlockKeys][n];
    const int units = ld_ / kUnit<T>;
    dots<T, kBlockKeys>(keys.k + first, packed_q_, units, p);
    const A scale = scale_ * A(kLog2e);
    COGVIEW_UNROLL(c, kBlockKeys)
      COGVIEW_UNROLL(v, n) {
        const Vec<A> x =
            exp2v<kExpDegree<T>>(p[c][v] * scale + (minus_lse_.at[v] + bias_of<tables>(keys, first + c, v)));
        p[c][v] = select_bits<A>(keys.lanes[first + c] >> (v * l), x, A(0));
      }
    dots<T, kBlockKeys>(keys.v + first, packed_dout_, units, ds);
    COGVIEW_UNROLL(c, kBlockKeys)
      COGVIEW_UNROLL(v, n)
        ds[c][v] = select_bits<A>(keys.lanes[first + c] >> (v * l), p[c][v] * (ds[c][v] - delta_.at[v]), A(0));
    if (tables && to_tables)
      for (int c = 0; c < kBlockKeys; ++c)
        COGVIEW_UNROLL(v, n) {
          A* sum = keys.dtable[first + c] + v * l;
          store(sum, load(sum) + ds[c][v]);
        }
    const auto at = [&](int c) { return (first + c) * kQueries; };
    if constexpr (kPaired<T>) {
      for (int c = 0; c < kBlockKeys; c += 2) {
        const Pairs rows = to_pairs(ds[c][0], ds[c + 1][0]);
        store_pairs(p_ + at(c), to_pairs(p[c][0], p[c + 1][0]));
        store_pairs(ds_ + at(c), rows);
        store_pairs(ds_pairs_ + at(c) / 2, interleave_halves(rows));
      }
    } else {
      COGVIEW_UNROLL(c, kBlockKeys)
        COGVIEW_UNROLL(v, n) store(p_ + at(c) + v * l, p[c][v]), store(ds_ + at(c) + v * l, ds[c][v]);
    }
  }

  int d_ = 0, ld_ = 0, count_ = 0;
  A scale_ = 0;
  E *q_, *dout_, *p_, *ds_;
  A *packed_q_, *packed_dout_, *dq_, *ds_pairs_, *nowhere_, *out_[kQueries];
  const E *q_rows_[kQueries], *dout_rows_[kQueries];
  PerLane<A> minus_lse_, delta_;
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
