// LayerNorm, RMSNorm and the fused step of a transformer, a row at a time. The kind of norm is a policy, LayerNorm or
// RmsNorm: what is measured of a row, how it is normalised, and the gradient.
//
// Memory. Rows lie at any offsets, their elements beside each other, aligned to an element only; parameters,
// statistics, peaks and scales of rows are contiguous.
//   forward   reads branch and residual; writes h, then x from h as it was rounded; the statistics of each norm, and of
//             the first half alone peaks. Every pass but the first is over what is in cache.
//   backward  reads dh, dx, h, branch and statistics; writes dresidual and dbranch once, the scale's gradient, and a
//             block's sums of dweight and dbias to its own row of them.
// With `stream`, results wait in scratch for a whole row and are written around the caches.
#include "sandwich_layer_norm.h"

#include <cmath>
#include <limits>

#include "loops.h"
#include "philox.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <class T>
const T* row_of(const void* p, const Rows& rows, int64_t i) {
  return static_cast<const T*>(p) + rows.offset(i);
}
template <class T>
T* row_of(void* p, const Rows& rows, int64_t i) {
  return static_cast<T*>(p) + rows.offset(i);
}

// A row that is read next: to the second cache, the first is full of this row and the parameters.
struct Ahead {
  const char* row;
  int64_t size;  // of an element

  Ahead() = default;
  template <class T>
  Ahead(const T* row) : row(reinterpret_cast<const char*>(row)), size(sizeof(T)) {}
  void fetch(int64_t j) const { __builtin_prefetch(row + j * size, 0, 2); }
};

// A row as the norm sees it: elements, times the factors of dropout where there is dropout.
template <class T>
struct Input {
  using Element = T;
  using A = Acc<T>;
  const T* p;
  const A* factors;
  template <class N>
  Vec<A> operator()(int64_t j, N n) const {
    const Vec<A> v = load(p + j, n);
    return factors ? v * load(factors + j, n) : v;
  }
};

template <class T>
Input<T> input(const T* row) {
  return {row, nullptr};
}

// Factors of dropout of row i.
template <class A>
const A* factors_of(const NormPlan& a, int64_t i, A* buffer) {
  const int64_t seed = a.seed[i / a.rows_per_seed], at = i % a.rows_per_seed * a.cols;
  return dropout_factors(seed, a.dropout_threshold, A(a.dropout_scale), at, a.cols, buffer);
}

// As the post-norm reads it, or what is without one.
template <class T>
Input<T> branch_of(const NormPlan& a, int64_t i, Acc<T>* buffer) {
  const bool dropped = a.dropout && !a.dropout_after_norm;
  return {row_of<T>(a.branch, a.branch_rows, i), dropped ? factors_of(a, i, buffer) : nullptr};
}

template <class A>
A scale_of(const NormPlan& a, int64_t i) {
  return A(a.branch_scale) * (a.row_scale ? static_cast<const A*>(a.row_scale)[i] : A(1));
}

template <class A>
A* scratch_row(const NormPlan& a, int slot, ScratchRow kind, int r = 0) {
  return static_cast<A*>(a.scratch) + (int64_t(slot) * kScratchRows + kind * kGroup + r) * a.scratch_cols;
}

// Where a row of results waits to be written around the caches.
template <class T>
T* buffer_row(const NormPlan& a, int slot, int r = 0) {
  return reinterpret_cast<T*>(scratch_row<Acc<T>>(a, slot, kBuffer, r));
}

// The power of two that brings c near 1: exact, so LN(x / c) is LN(x * power) with eps * (c * power)^2.
template <class A>
A power_for(A c) {
  constexpr int mantissa = std::numeric_limits<A>::digits - 1;
  constexpr int64_t top = 2 * std::numeric_limits<A>::max_exponent - 2;  // the exponent field of 1 is half of it
  typename VecOf<A>::Lane bits = bits_as<typename VecOf<A>::Lane>(c);
  const int64_t field = top - (bits >> mantissa);
  bits = typename VecOf<A>::Lane(field < 1 ? 1 : field) << mantissa;
  return bits_as<A>(bits);
}

// ---- the kinds ----

struct LayerNorm {
  static constexpr bool kBias = true;

  // A row's sum, and its largest |element|, NaN if there is one.
  template <class A>
  struct Row {
    A sum, peak;
  };

  // Of x(column, how many).
  template <class A, class X>
  static Row<A> measure(int64_t n, X&& x) {
    using I = VecInt<A>;  // without their sign, floats are ordered as their bits are
    constexpr auto magnitude = std::numeric_limits<typename VecOf<A>::Lane>::max();
    I peak{};
    const auto total = sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* acc) {
      const Vec<A> v = x(j, count);
      peak = vmax(peak, bits_as<I>(v) & magnitude);
      acc[0] += v;
    });
    return {total.at[0], bits_as<A>(hmax(peak))};
  }

  // The norm of a row x, as a function of column and how many.
  template <class A, class X>
  struct Normalised {
    X x;
    A power, mean, rstd;
    const A *weight, *bias;
    template <class N>
    Vec<A> operator()(int64_t j, N n) const {
      return (x(j, n) * power - mean) * rstd * load(weight + j, n) + load(bias + j, n);
    }
  };

  template <class A, class X>
  static Normalised<A, X> normalise(const NormPlan& a, const Norm& norm, int64_t i, Row<A> row, X x) {
    const int64_t n = a.cols;
    A c = 1, power = 1;
    if (a.relax != Relax::none) {
      constexpr A limit = A(0x1p32);
      c = a.relax == Relax::row ? row.peak : A(a.peak) / 8;
      if (c == 0) c = 1;
      if (!(c > 1 / limit && c < limit)) {  // squares could overflow, or vanish
        power = power_for(c);
        row.sum = sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* sum) { sum[0] += x(j, count) * power; }).at[0];
      }
    }
    const A mean = row.sum / A(n);
    const auto squares = sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* total) {
      const Vec<A> centred = first<A>(x(j, count) * power - mean, count);
      total[0] += centred * centred;
    });
    const A unit = c * power, rstd = 1 / std::sqrt(squares.at[0] / A(n) + A(a.eps) * unit * unit);
    static_cast<A*>(norm.mean)[i] = mean / power;
    static_cast<A*>(norm.rstd)[i] = rstd * power;
    return {x, power, mean, rstd, static_cast<const A*>(norm.weight), static_cast<const A*>(norm.bias)};
  }

  // The normalised row again, as the backward needs it.
  template <class A, class X>
  struct Again {
    X x;
    A half_mean, twice_rstd;  // halves: the difference of two huge numbers does not overflow
    template <class N>
    Vec<A> operator()(int64_t j, N n) const {
      return (x(j, n) * A(0.5) - half_mean) * twice_rstd;
    }
  };
  template <class A, class X>
  static Again<A, X> again(const Norm& norm, int64_t i, X x) {
    return {x, static_cast<const A*>(norm.mean)[i] / 2, static_cast<const A*>(norm.rstd)[i] * 2};
  }
};

// kRound: before the weight, to the input's dtype.
template <bool kRound>
struct RmsNorm {
  static constexpr bool kBias = false;

  template <class A>
  struct Row {
    A squares;
  };

  template <class A, class X>
  static Row<A> measure(int64_t n, X&& x) {
    return {sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* acc) {
              const Vec<A> v = x(j, count);
              acc[0] += v * v;
            }).at[0]};
  }

  template <class A, class X>
  struct Normalised {
    X x;
    A rstd;
    const A* weight;
    template <class N>
    Vec<A> operator()(int64_t j, N n) const {
      const Vec<A> v = x(j, n) * rstd;
      return (kRound ? rounded<typename X::Element>(v) : v) * load(weight + j, n);
    }
  };

  template <class A, class X>
  static Normalised<A, X> normalise(const NormPlan& a, const Norm& norm, int64_t i, Row<A> row, X x) {
    const A rstd = 1 / std::sqrt(row.squares / A(a.cols) + A(a.eps));
    static_cast<A*>(norm.rstd)[i] = rstd;
    return {x, rstd, static_cast<const A*>(norm.weight)};
  }

  template <class A, class X>
  struct Again {
    X x;
    A rstd;
    template <class N>
    Vec<A> operator()(int64_t j, N n) const {
      return x(j, n) * rstd;
    }
  };
  template <class A, class X>
  static Again<A, X> again(const Norm& norm, int64_t i, X x) {
    return {x, static_cast<const A*>(norm.rstd)[i]};
  }
};

// ---- forward ----

// T: of branch and x; R: of residual and h.
template <class K, class T, class R>
void forward_rows(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  using A = Acc<T>;
  const int64_t n = a.cols;
  for (int64_t i = begin; i < end; ++i) {
    R* h = row_of<R>(a.h, a.h_rows, i);
    T* x = a.x ? row_of<T>(a.x, a.x_rows, i) : nullptr;
    const int64_t next = i + 1 < end ? i + 1 : i;
    Input<R> own = input<R>(h);  // what the second norm reads
    typename K::template Row<A> row;
    if (a.branch) {
      const R* residual = row_of<R>(a.residual, a.residual_rows, i);
      const Ahead ahead = row_of<T>(a.branch, a.branch_rows, next);
      R* to = a.stream ? buffer_row<R>(a, slot) : h;
      A* factors = scratch_row<A>(a, slot, kFactors);
      const Input<T> branch = branch_of<T>(a, i, factors);
      const A scale = scale_of<A>(a, i);
      const auto add = [&](auto y) {
        return K::template measure<A>(n, [&](int64_t j, auto count) {
          ahead.fetch(j);
          put(to + j, load(residual + j, count) + y(j, count) * scale, count);
          return load(to + j, count);  // as rounded
        });
      };
      if (a.post.weight) {
        const auto y = K::normalise(a, a.post, i, K::template measure<A>(n, branch), branch);
        if (a.dropout_after_norm) {
          const A* kept = factors_of(a, i, factors);
          row = add([&](int64_t j, auto count) { return y(j, count) * load(kept + j, count); });
        } else {
          row = add(y);
        }
      } else {
        row = add(branch);
      }
      if (a.stream) stream_row(h, to, n);
      if constexpr (std::is_same_v<K, LayerNorm>)
        if (!x && a.peaks) static_cast<A*>(a.peaks)[i] = row.peak;
      own.p = to;
    } else {
      row = K::template measure<A>(n, own);
    }
    if (!x) continue;
    const Ahead ahead = a.branch ? row_of<R>(a.residual, a.residual_rows, next)
                                 : row_of<R>(static_cast<const void*>(a.h), a.h_rows, next);
    const auto y = K::normalise(a, a.pre, i, row, own);
    T* to = a.stream ? buffer_row<T>(a, slot) : x;  // never ahead of what is read: T is not wider
    each<A>(n, [&](int64_t j, auto count) {
      ahead.fetch(j);
      put(to + j, y(j, count), count);
    });
    if (a.stream) stream_row(x, to, n);
  }
  if (a.stream) stream_fence();
}

template <class T, class R>
void peak_rows(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  using A = Acc<T>;
  for (int64_t i = begin; i < end; ++i) {
    static_cast<A*>(a.peaks)[i] =
        a.branch ? LayerNorm::measure<A>(a.cols, branch_of<T>(a, i, scratch_row<A>(a, slot, kFactors))).peak
                 : LayerNorm::measure<A>(a.cols, input(row_of<R>(static_cast<const void*>(a.h), a.h_rows, i))).peak;
  }
}

// ---- backward ----

// Of G rows from i on; null where there is no tensor.
template <class T, int G>
struct RowSet {
  T* at[G];
  template <class V>
  RowSet(V* base, const Rows& rows, int64_t i) {
    for (int r = 0; r < G; ++r) at[r] = base ? row_of<std::remove_const_t<T>>(base, rows, i + r) : nullptr;
  }
  T* operator[](int r) const { return at[r]; }
};

template <int G>
struct AheadSet {
  Ahead rows[G];
  template <class T>
  AheadSet(const RowSet<T, G>& set) {
    for (int r = 0; r < G; ++r) rows[r] = set[r];
  }
  void fetch(int r, int64_t j) const { rows[r].fetch(j); }
};

// Gradient through one norm of G rows: of its parameters, times the rows' `scale` added to the block's sums, and of its
// input x, times `scale` passed to f(row, column, how many, gradient). Rows are taken together so that parameters and
// their sums come from the second cache once for all of them. `weighted` are buffers, and may be where dy reads. What
// is read next comes to the caches meanwhile: `early` and `late`. To `products`: sums of dy * weight * normalised x.
template <class K, int G, class A, class X, class DY, class F>
void norm_backward(const NormPlan& a, const Norm& norm, int64_t i, int64_t block, const A (&scale)[G], const X (&x)[G],
                   A* const (&weighted)[G], AheadSet<G> early, AheadSet<G> late, A (&products)[G], DY&& dy, F&& f) {
  constexpr int S = 1 + K::kBias;
  const A* weight = static_cast<const A*>(norm.weight);
  A* dweight = static_cast<A*>(norm.dweight) + block * a.cols;
  [[maybe_unused]] A* dbias = K::kBias ? static_cast<A*>(norm.dbias) + block * a.cols : nullptr;
  typename K::template Again<A, X> normalised[G];
  for (int r = 0; r < G; ++r) normalised[r] = K::template again<A>(norm, i + r, x[r]);
  const auto total = sums<A, G * S, 2>(a.cols, [&](int64_t j, auto count, Vec<A>* acc) {
    const Vec<A> w = load(weight + j, count);
    Vec<A> dw = load(dweight + j, count), db{};
    if constexpr (K::kBias) db = load(dbias + j, count);
    COGVIEW_UNROLL(r, G) {
      early.fetch(r, j);
      const Vec<A> d = dy(r, j, count), y = normalised[r](j, count), g = d * w, part = d * scale[r];
      put(weighted[r] + j, g, count);
      dw += part * y;
      acc[r * S] += g * y;
      if constexpr (K::kBias) {
        db += part;
        acc[r * S + 1] += g;
      }
    }
    put(dweight + j, dw, count);
    if constexpr (K::kBias) put(dbias + j, db, count);
  });
  A rstd[G], mean_gy[G], mean_g[G];
  for (int r = 0; r < G; ++r) {
    products[r] = total.at[r * S];
    mean_gy[r] = total.at[r * S] / A(a.cols);
    mean_g[r] = K::kBias ? total.at[r * S + K::kBias] / A(a.cols) : 0;
    rstd[r] = static_cast<const A*>(norm.rstd)[i + r] * scale[r];
  }
  each<A>(a.cols, [&](int64_t j, auto count) {
    COGVIEW_UNROLL(r, G) {
      late.fetch(r, j);
      Vec<A> g = load(weighted[r] + j, count);
      if constexpr (K::kBias) g -= mean_g[r];
      f(r, j, count, (g - normalised[r](j, count) * mean_gy[r]) * rstd[r]);
    }
  });
}

// Of G branches through their norm, from the gradients d of h.
template <class K, int G, class T>
void branch_backward(const NormPlan& a, int64_t i, int64_t block, int slot, const Acc<T>* const (&d)[G],
                     Acc<T>* const (&wide)[G], AheadSet<G> early, AheadSet<G> late) {
  using A = Acc<T>;
  const RowSet<T, G> dbranch(a.dbranch, a.dbranch_rows, i);
  Input<T> branch[G];
  T* to[G];
  A scale[G], products[G];
  for (int r = 0; r < G; ++r) {
    branch[r] = branch_of<T>(a, i + r, scratch_row<A>(a, slot, kFactors, r));
    to[r] = a.stream ? buffer_row<T>(a, slot, r) : dbranch[r];
    scale[r] = scale_of<A>(a, i + r);
  }
  const auto through = [&](auto dy) {
    A biased[G]{};
    if constexpr (K::kBias)
      for (int r = 0; r < G && a.drow_scale; ++r)  // before the buffers are written
        biased[r] = sums<A, 1>(a.cols, [&](int64_t j, auto count, Vec<A>* acc) {
                      acc[0] += dy(r, j, count) * load(static_cast<const A*>(a.post.bias) + j, count);
                    }).at[0];
    norm_backward<K>(a, a.post, i, block, scale, branch, wide, early, late, products, dy,
                     [&](int r, int64_t j, auto count, Vec<A> v) {
                       const A* factors = branch[r].factors;
                       put(to[r] + j, factors ? v * load(factors + j, count) : v, count);
                     });
    for (int r = 0; r < G; ++r) {
      if (a.stream) stream_row(dbranch[r], to[r], a.cols);
      if (a.drow_scale) static_cast<A*>(a.drow_scale)[i + r] = A(a.branch_scale) * (products[r] + biased[r]);
    }
  };
  if (a.dropout_after_norm) {
    const A* kept[G];
    for (int r = 0; r < G; ++r) kept[r] = factors_of(a, i + r, scratch_row<A>(a, slot, kFactors, r));
    through([&](int r, int64_t j, auto count) { return load(d[r] + j, count) * load(kept[r] + j, count); });
  } else {
    through([&](int r, int64_t j, auto count) { return load(d[r] + j, count); });
  }
}

// Of a branch that is added without a norm.
template <class T>
void added_backward(const NormPlan& a, int64_t i, int slot, const Acc<T>* d) {
  using A = Acc<T>;
  const A* factors = a.dropout ? factors_of(a, i, scratch_row<A>(a, slot, kFactors)) : nullptr;
  const T* branch = a.drow_scale ? row_of<T>(a.branch, a.branch_rows, i) : nullptr;
  T* dbranch = a.dbranch ? row_of<T>(a.dbranch, a.dbranch_rows, i) : nullptr;
  T* to = a.stream ? buffer_row<T>(a, slot) : dbranch;
  const A scale = scale_of<A>(a, i);
  const auto total = sums<A, 1>(a.cols, [&](int64_t j, auto count, Vec<A>* acc) {
    Vec<A> v = load(d + j, count);
    if (factors) v *= load(factors + j, count);
    if (branch) acc[0] += v * load(branch + j, count);
    if (dbranch) put(to + j, v * scale, count);
  });
  if (branch) static_cast<A*>(a.drow_scale)[i] = A(a.branch_scale) * total.at[0];
  if (dbranch && a.stream) stream_row(dbranch, to, a.cols);
}

// `next`: a row from which on as many are read next.
template <class K, class T, class R, int G>
void backward_rows(const NormPlan& a, int64_t i, int64_t next, int64_t block, int slot) {
  using A = Acc<T>;
  const RowSet<const R, G> dh(a.dh, a.dh_rows, i), next_dh(a.dh, a.dh_rows, next);
  const RowSet<const R, G> h(a.h, a.h_rows, i), next_h(a.h, a.h_rows, next);
  const RowSet<const T, G> next_dx(a.dx, a.dx_rows, next);
  const bool onward = a.dbranch || a.drow_scale;
  A* wide[G];
  const A* d[G];  // the gradients of h, not rounded
  for (int r = 0; r < G; ++r) d[r] = wide[r] = scratch_row<A>(a, slot, kWide, r);
  if (a.dx) {
    const RowSet<const T, G> dx(a.dx, a.dx_rows, i), branch(a.branch, a.branch_rows, i);
    const RowSet<R, G> dresidual(a.dresidual, a.dresidual_rows, i);
    Input<R> x[G];
    R* to[G];
    A ones[G], products[G];
    for (int r = 0; r < G; ++r) {
      x[r] = input(h[r]);
      to[r] = a.stream ? buffer_row<R>(a, slot, r) : dresidual[r];
      ones[r] = 1;
    }
    const AheadSet<G> early = a.branch ? AheadSet<G>(branch) : AheadSet<G>(next_h);
    const AheadSet<G> late = a.dh ? AheadSet<G>(next_dh) : a.branch ? early : AheadSet<G>(next_dx);
    norm_backward<K>(
        a, a.pre, i, block, ones, x, wide, early, late, products,
        [&](int r, int64_t j, auto count) { return load(dx[r] + j, count); },
        [&](int r, int64_t j, auto count, Vec<A> v) {
          if (a.dh) v += load(dh[r] + j, count);
          put(to[r] + j, v, count);
          if (onward) put(wide[r] + j, v, count);
        });
    if (a.stream)
      for (int r = 0; r < G; ++r) stream_row(dresidual[r], to[r], a.cols);
  } else {
    for (int r = 0; r < G; ++r)
      if constexpr (std::is_same_v<R, A>)
        d[r] = dh[r];
      else
        each<A>(a.cols, [&](int64_t j, auto count) { put(wide[r] + j, load(dh[r] + j, count), count); });
  }
  if (!onward) return;
  if (!a.post.weight) {
    for (int r = 0; r < G; ++r) added_backward<T>(a, i + r, slot, d[r]);
  } else if (a.dx) {
    branch_backward<K, G, T>(a, i, block, slot, d, wide, next_h, next_dx);
  } else {
    const RowSet<const T, G> next_branch(a.branch, a.branch_rows, next);
    branch_backward<K, G, T>(a, i, block, slot, d, wide, next_dh, next_branch);
  }
}

template <class K, class T, class R>
void backward_blocks(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  const bool together = a.cols <= 8192;  // longer rows would push each other out of the second cache
  for (int64_t block = begin; block < end; ++block) {
    for (const Norm& norm : {a.pre, a.post})
      for (void* sums : {norm.dweight, norm.dbias})
        if (sums) std::memset(static_cast<Acc<T>*>(sums) + block * a.cols, 0, size_t(a.cols) * sizeof(Acc<T>));
    const int64_t from = block * a.block_rows, to = from + a.block_rows < a.rows ? from + a.block_rows : a.rows;
    int64_t i = from;
    for (; together && i + kGroup <= to; i += kGroup)
      backward_rows<K, T, R, kGroup>(a, i, i + 2 * kGroup <= to ? i + kGroup : i, block, slot);
    for (; i < to; ++i) backward_rows<K, T, R, 1>(a, i, i + 1 < to ? i + 1 : i, block, slot);
  }
  if (a.stream) stream_fence();
}

// ---- choice ----

// Calls f with a value of each of the two types.
template <class F>
void by_dtypes(const NormPlan& a, F&& f) {
  by_dtype(a.dtype, [&](auto x) {
    if constexpr (sizeof x == 2)
      if (a.residual_dtype == Dtype::f32) return f(x, float{});
    f(x, x);
  });
}

}  // namespace

void layer_norm_peaks(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  by_dtypes(a, [&](auto x, auto h) { peak_rows<decltype(x), decltype(h)>(a, begin, end, slot); });
}
void sandwich_layer_norm_fwd(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  by_dtypes(a, [&](auto x, auto h) {
    using T = decltype(x);
    using R = decltype(h);
    if (!a.rms) return forward_rows<LayerNorm, T, R>(a, begin, end, slot);
    if constexpr (sizeof x == 2)  // others are not rounded
      if (a.round_before_weight) return forward_rows<RmsNorm<true>, T, R>(a, begin, end, slot);
    forward_rows<RmsNorm<false>, T, R>(a, begin, end, slot);
  });
}
void sandwich_layer_norm_bwd(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  by_dtypes(a, [&](auto x, auto h) {
    using T = decltype(x);
    using R = decltype(h);
    a.rms ? backward_blocks<RmsNorm<false>, T, R>(a, begin, end, slot)
          : backward_blocks<LayerNorm, T, R>(a, begin, end, slot);
  });
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
