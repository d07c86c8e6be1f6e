// LayerNorm and the fused Sandwich-LN step, a row at a time.
//
// Memory. Rows lie at any offsets, their elements beside each other, aligned to an element only; parameters, means,
// rstds and peaks are contiguous.
//   forward   reads branch and residual; writes h, then x from h as it was rounded; mean and rstd of each norm, and of
//             the first half alone peaks. Every pass but the first is over what is in cache.
//   backward  reads dh, dx, h, branch, mean and rstd; writes dresidual and dbranch once, and a block's sums of dweight
//             and dbias to its own row of them.
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
Input<T> branch_of(const NormPlan& a, int64_t i, Acc<T>* buffer) {
  const Acc<T>* factors = nullptr;
  if (a.dropout)
    factors = dropout_factors(*a.seed, a.dropout_threshold, Acc<T>(a.dropout_scale), i * a.cols, a.cols, buffer);
  return {row_of<T>(a.branch, a.branch_rows, i), factors};
}

template <class A>
A* scratch_row(const NormPlan& a, int slot, int k) {
  return static_cast<A*>(a.scratch) + (int64_t(slot) * kScratchRows + k) * a.scratch_cols;
}

// A row's sum, and its largest |element|, NaN if there is one.
template <class A>
struct Row {
  A sum, peak;
};

// Of x(column, how many).
template <class A, class X>
Row<A> measure(int64_t n, X&& x) {
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
Normalised<A, X> normalise(const NormPlan& a, const Norm& norm, int64_t i, Row<A> row, X x) {
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

// T: of branch and x; R: of residual and h.
template <class T, class R>
void forward_rows(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  using A = Acc<T>;
  const int64_t n = a.cols;
  void* buffer = buffer_row(a, slot);
  for (int64_t i = begin; i < end; ++i) {
    R* h = row_of<R>(a.h, a.h_rows, i);
    T* x = a.x ? row_of<T>(a.x, a.x_rows, i) : nullptr;
    const int64_t next = i + 1 < end ? i + 1 : i;
    Input<R> own{h, nullptr};  // what the second norm reads
    Row<A> row;
    if (a.branch) {
      const R* residual = row_of<R>(a.residual, a.residual_rows, i);
      const Ahead ahead = row_of<T>(a.branch, a.branch_rows, next);
      R* to = a.stream ? static_cast<R*>(buffer) : h;
      const Input<T> branch = branch_of<T>(a, i, scratch_row<A>(a, slot, kFactors));
      const auto y = normalise(a, a.post, i, measure<A>(n, branch), branch);
      row = measure<A>(n, [&](int64_t j, auto count) {
        ahead.fetch(j);
        put(to + j, load(residual + j, count) + y(j, count), count);
        return load(to + j, count);  // as rounded
      });
      if (a.stream) stream_row(h, to, n);
      if (!x) static_cast<A*>(a.peaks)[i] = row.peak;
      own.p = to;
    } else {
      row = measure<A>(n, own);
    }
    if (!x) continue;
    const Ahead ahead = a.branch ? row_of<R>(a.residual, a.residual_rows, next)
                                 : row_of<R>(static_cast<const void*>(a.h), a.h_rows, next);
    const auto y = normalise(a, a.pre, i, row, own);
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
        a.branch ? measure<A>(a.cols, branch_of<T>(a, i, scratch_row<A>(a, slot, kFactors))).peak
                 : measure<A>(a.cols, Input<R>{row_of<R>(static_cast<const void*>(a.h), a.h_rows, i), nullptr}).peak;
  }
}

// Gradient through one norm: of its parameters, added to the block's sums, and of its input, passed to f(column, how
// many, gradient). x and dy give vectors of the row; `weighted` is a buffer, and may be where dy reads. What is read
// next comes to the caches meanwhile: `early` and `late`.
template <class A, class X, class DY, class F>
void norm_backward(const NormPlan& a, const Norm& norm, int64_t i, int64_t block, A* weighted, Ahead early, Ahead late,
                   X&& x, DY&& dy, F&& f) {
  const A* weight = static_cast<const A*>(norm.weight);
  A *dweight = static_cast<A*>(norm.dweight) + block * a.cols, *dbias = static_cast<A*>(norm.dbias) + block * a.cols;
  const A rstd = static_cast<const A*>(norm.rstd)[i], twice_rstd = rstd * 2;
  const A half_mean = static_cast<const A*>(norm.mean)[i] / 2;
  // halves: the difference of two huge numbers does not overflow
  const auto normalised = [&](int64_t j, auto count) { return (x(j, count) * A(0.5) - half_mean) * twice_rstd; };
  const auto total = sums<A, 2>(a.cols, [&](int64_t j, auto count, Vec<A>* acc) {
    early.fetch(j);
    const Vec<A> d = dy(j, count), y = normalised(j, count), g = d * load(weight + j, count);
    put(weighted + j, g, count);
    put(dweight + j, load(dweight + j, count) + d * y, count);
    put(dbias + j, load(dbias + j, count) + d, count);
    acc[0] += g;
    acc[1] += g * y;
  });
  const A mean_g = total.at[0] / A(a.cols), mean_gy = total.at[1] / A(a.cols);
  each<A>(a.cols, [&](int64_t j, auto count) {
    late.fetch(j);
    f(j, count, (load(weighted + j, count) - mean_g - normalised(j, count) * mean_gy) * rstd);
  });
}

template <class A>
void zero_sums(const NormPlan& a, const Norm& norm, int64_t block) {
  std::memset(static_cast<A*>(norm.dweight) + block * a.cols, 0, size_t(a.cols) * sizeof(A));
  std::memset(static_cast<A*>(norm.dbias) + block * a.cols, 0, size_t(a.cols) * sizeof(A));
}

template <class T, class R>
void backward_row(const NormPlan& a, int64_t i, int64_t next, int64_t block, int slot) {
  using A = Acc<T>;
  const auto h = [&](int64_t k) { return row_of<R>(static_cast<const void*>(a.h), a.h_rows, k); };
  const R* dh = a.dh ? row_of<R>(a.dh, a.dh_rows, i) : nullptr;
  R* dresidual = row_of<R>(a.dresidual, a.dresidual_rows, i);
  void* buffer = buffer_row(a, slot);
  R* sum = a.stream ? static_cast<R*>(buffer) : dresidual;
  A* wide = scratch_row<A>(a, slot, kWide);  // in the end the gradient of h, not rounded
  const auto write = [&](int64_t j, auto count, Vec<A> d) {
    if (dh) d += load(dh + j, count);
    put(sum + j, d, count);
    if (a.branch) put(wide + j, d, count);
  };
  if (a.dx) {
    const T* dx = row_of<T>(a.dx, a.dx_rows, i);
    const Ahead early = a.branch ? Ahead(row_of<T>(a.branch, a.branch_rows, i)) : Ahead(h(next));
    const Ahead late = a.dh       ? Ahead(row_of<R>(a.dh, a.dh_rows, next))
                       : a.branch ? early
                                  : Ahead(row_of<T>(a.dx, a.dx_rows, next));
    norm_backward<A>(
        a, a.pre, i, block, wide, early, late, Input<R>{h(i), nullptr},
        [&](int64_t j, auto count) { return load(dx + j, count); }, write);
  } else {
    each<A>(a.cols, [&](int64_t j, auto count) { write(j, count, Vec<A>{}); });
  }
  if (a.stream) stream_row(dresidual, sum, a.cols);
  if (!a.branch) return;
  const Input<T> branch = branch_of<T>(a, i, scratch_row<A>(a, slot, kFactors));
  T* dbranch = row_of<T>(a.dbranch, a.dbranch_rows, i);
  T* to = a.stream ? static_cast<T*>(buffer) : dbranch;
  norm_backward<A>(
      a, a.post, i, block, wide, h(next), a.dx ? Ahead(row_of<T>(a.dx, a.dx_rows, next)) : Ahead(h(next)), branch,
      [&](int64_t j, auto count) { return load(wide + j, count); },
      [&](int64_t j, auto count, Vec<A> d) {
        put(to + j, branch.factors ? d * load(branch.factors + j, count) : d, count);
      });
  if (a.stream) stream_row(dbranch, to, a.cols);
}

template <class T, class R>
void backward_blocks(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  for (int64_t block = begin; block < end; ++block) {
    zero_sums<Acc<T>>(a, a.pre, block);
    if (a.branch) zero_sums<Acc<T>>(a, a.post, block);
    const int64_t from = block * a.block_rows, to = from + a.block_rows < a.rows ? from + a.block_rows : a.rows;
    for (int64_t i = from; i < to; ++i) backward_row<T, R>(a, i, i + 1 < to ? i + 1 : i, block, slot);
  }
  if (a.stream) stream_fence();
}

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
  by_dtypes(a, [&](auto x, auto h) { forward_rows<decltype(x), decltype(h)>(a, begin, end, slot); });
}
void sandwich_layer_norm_bwd(const NormPlan& a, int64_t begin, int64_t end, int slot) {
  by_dtypes(a, [&](auto x, auto h) { backward_blocks<decltype(x), decltype(h)>(a, begin, end, slot); });
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
