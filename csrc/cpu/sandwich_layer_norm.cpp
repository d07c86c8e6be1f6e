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
  return dropout_factors(*a.seed, a.dropout_threshold, A(a.dropout_scale), i * a.cols, a.cols, buffer);
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
A* scratch_row(const NormPlan& a, int slot, int k) {
  return static_cast<A*>(a.scratch) + (int64_t(slot) * kScratchRows + k) * a.scratch_cols;
}

// Where a row of results waits to be written around the caches.
void* buffer_row(const NormPlan& a, int slot) {
  return static_cast<char*>(a.scratch) +
         (int64_t(slot) * kScratchRows + kBuffer) * a.scratch_cols * accumulator_bytes(a.dtype);
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
  void* buffer = buffer_row(a, slot);
  for (int64_t i = begin; i < end; ++i) {
    R* h = row_of<R>(a.h, a.h_rows, i);
    T* x = a.x ? row_of<T>(a.x, a.x_rows, i) : nullptr;
    const int64_t next = i + 1 < end ? i + 1 : i;
    Input<R> own = input<R>(h);  // what the second norm reads
    typename K::template Row<A> row;
    if (a.branch) {
      const R* residual = row_of<R>(a.residual, a.residual_rows, i);
      const Ahead ahead = row_of<T>(a.branch, a.branch_rows, next);
      R* to = a.stream ? static_cast<R*>(buffer) : h;
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
    T* to = a.stream ? static_cast<T*>(buffer) : x;  // never ahead of what is read: T is not wider
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

// Gradient through one norm: of its parameters, times `scale` added to the block's sums, and of its input, times
// `scale` passed to f(column, how many, gradient). x and dy give vectors of the row; `weighted` is a buffer, and may be
// where dy reads. What is read next comes to the caches meanwhile: `early` and `late`. Returns the sum of
// dy * weight * normalised x.
template <class K, class A, class X, class DY, class F>
A norm_backward(const NormPlan& a, const Norm& norm, int64_t i, int64_t block, A scale, A* weighted, Ahead early,
                Ahead late, X x, DY&& dy, F&& f) {
  const A* weight = static_cast<const A*>(norm.weight);
  A* dweight = static_cast<A*>(norm.dweight) + block * a.cols;
  [[maybe_unused]] A* dbias = K::kBias ? static_cast<A*>(norm.dbias) + block * a.cols : nullptr;
  const auto normalised = K::template again<A>(norm, i, x);
  const auto total = sums<A, 1 + K::kBias>(a.cols, [&](int64_t j, auto count, Vec<A>* acc) {
    early.fetch(j);
    const Vec<A> d = dy(j, count), y = normalised(j, count), g = d * load(weight + j, count), part = d * scale;
    put(weighted + j, g, count);
    put(dweight + j, load(dweight + j, count) + part * y, count);
    acc[0] += g * y;
    if constexpr (K::kBias) {
      put(dbias + j, load(dbias + j, count) + part, count);
      acc[1] += g;
    }
  });
  const A rstd = static_cast<const A*>(norm.rstd)[i] * scale, mean_gy = total.at[0] / A(a.cols);
  [[maybe_unused]] const A mean_g = K::kBias ? total.at[K::kBias] / A(a.cols) : 0;
  each<A>(a.cols, [&](int64_t j, auto count) {
    late.fetch(j);
    Vec<A> g = load(weighted + j, count);
    if constexpr (K::kBias) g -= mean_g;
    f(j, count, (g - normalised(j, count) * mean_gy) * rstd);
  });
  return total.at[0];
}

template <class A>
void zero_sums(const NormPlan& a, const Norm& norm, int64_t block) {
  for (void* sums : {norm.dweight, norm.dbias})
    if (sums) std::memset(static_cast<A*>(sums) + block * a.cols, 0, size_t(a.cols) * sizeof(A));
}

// Of the branch through its norm, from the gradient d of h.
template <class K, class T>
void branch_backward(const NormPlan& a, int64_t i, int64_t block, int slot, const Acc<T>* d, Ahead early, Ahead late) {
  using A = Acc<T>;
  A *wide = scratch_row<A>(a, slot, kWide), *factors = scratch_row<A>(a, slot, kFactors);
  T* dbranch = row_of<T>(a.dbranch, a.dbranch_rows, i);
  T* to = a.stream ? static_cast<T*>(buffer_row(a, slot)) : dbranch;
  const Input<T> branch = branch_of<T>(a, i, factors);
  const auto through = [&](auto dy) {
    A total = 0;
    if constexpr (K::kBias)
      if (a.drow_scale)  // before the buffer is written
        total = sums<A, 1>(a.cols, [&](int64_t j, auto count, Vec<A>* acc) {
                  acc[0] += dy(j, count) * load(static_cast<const A*>(a.post.bias) + j, count);
                }).at[0];
    total += norm_backward<K>(a, a.post, i, block, scale_of<A>(a, i), wide, early, late, branch, dy,
                              [&](int64_t j, auto count, Vec<A> v) {
                                put(to + j, branch.factors ? v * load(branch.factors + j, count) : v, count);
                              });
    if (a.drow_scale) static_cast<A*>(a.drow_scale)[i] = A(a.branch_scale) * total;
  };
  if (a.dropout_after_norm) {
    const A* kept = factors_of(a, i, factors);
    through([&](int64_t j, auto count) { return load(d + j, count) * load(kept + j, count); });
  } else {
    through([&](int64_t j, auto count) { return load(d + j, count); });
  }
  if (a.stream) stream_row(dbranch, to, a.cols);
}

// Of a branch that is added without a norm.
template <class T>
void added_backward(const NormPlan& a, int64_t i, int slot, const Acc<T>* d) {
  using A = Acc<T>;
  const A* factors = a.dropout ? factors_of(a, i, scratch_row<A>(a, slot, kFactors)) : nullptr;
  const T* branch = a.drow_scale ? row_of<T>(a.branch, a.branch_rows, i) : nullptr;
  T* dbranch = a.dbranch ? row_of<T>(a.dbranch, a.dbranch_rows, i) : nullptr;
  T* to = a.stream ? static_cast<T*>(buffer_row(a, slot)) : dbranch;
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

template <class K, class T, class R>
void backward_row(const NormPlan& a, int64_t i, int64_t next, int64_t block, int slot) {
  using A = Acc<T>;
  const auto h = [&](int64_t k) { return row_of<R>(static_cast<const void*>(a.h), a.h_rows, k); };
  const R* dh = a.dh ? row_of<R>(a.dh, a.dh_rows, i) : nullptr;
  const bool onward = a.dbranch || a.drow_scale;
  A* wide = scratch_row<A>(a, slot, kWide);
  const A* d = wide;  // the gradient of h, not rounded
  if (a.dx) {
    R* dresidual = row_of<R>(a.dresidual, a.dresidual_rows, i);
    R* sum = a.stream ? static_cast<R*>(buffer_row(a, slot)) : dresidual;
    const T* dx = row_of<T>(a.dx, a.dx_rows, i);
    const Ahead early = a.branch ? Ahead(row_of<T>(a.branch, a.branch_rows, i)) : Ahead(h(next));
    const Ahead late = a.dh       ? Ahead(row_of<R>(a.dh, a.dh_rows, next))
                       : a.branch ? early
                                  : Ahead(row_of<T>(a.dx, a.dx_rows, next));
    norm_backward<K>(
        a, a.pre, i, block, A(1), wide, early, late, input(h(i)),
        [&](int64_t j, auto count) { return load(dx + j, count); },
        [&](int64_t j, auto count, Vec<A> v) {
          if (dh) v += load(dh + j, count);
          put(sum + j, v, count);
          if (onward) put(wide + j, v, count);
        });
    if (a.stream) stream_row(dresidual, sum, a.cols);
  } else if constexpr (std::is_same_v<R, A>) {
    d = dh;
  } else {
    each<A>(a.cols, [&](int64_t j, auto count) { put(wide + j, load(dh + j, count), count); });
  }
  if (!onward) return;
  if (!a.post.weight) return added_backward<T>(a, i, slot, d);
  const Ahead late = a.dx ? Ahead(row_of<T>(a.dx, a.dx_rows, next)) : Ahead(row_of<T>(a.branch, a.branch_rows, next));
  branch_backward<K, T>(a, i, block, slot, d, a.dx ? Ahead(h(next)) : Ahead(row_of<R>(a.dh, a.dh_rows, next)), late);
}

template <class K, class T, class R>
void backward_blocks(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  for (int64_t block = begin; block < end; ++block) {
    zero_sums<Acc<T>>(a, a.pre, block);
    zero_sums<Acc<T>>(a, a.post, block);
    const int64_t from = block * a.block_rows, to = from + a.block_rows < a.rows ? from + a.block_rows : a.rows;
    for (int64_t i = from; i < to; ++i) backward_row<K, T, R>(a, i, i + 1 < to ? i + 1 : i, block, slot);
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
