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
Input<T> branch_of(const NormArgs& a, int64_t i, Acc<T>* buffer) {
  const Acc<T>* factors = nullptr;
  if (a.dropout)
    factors = dropout_factors(a.seed, a.dropout_threshold, Acc<T>(a.dropout_scale), i * a.cols, a.cols, buffer);
  return {row_of<T>(a.branch, a.branch_rows, i), factors};
}

template <class A>
A* scratch_row(const NormArgs& a, int slot, int k) {
  return static_cast<A*>(a.scratch) + (int64_t(slot) * kScratchRows + k) * a.scratch_cols;
}

// The largest |x|, NaN if there is one: without their sign, floats are ordered as their bits are.
template <class A, class F>
A peak_of(int64_t n, F&& x) {
  using I = VecInt<A>;
  constexpr auto magnitude = std::numeric_limits<typename VecOf<A>::Lane>::max();
  I peak{};
  each<A>(n, [&](int64_t j, auto count) { peak = vmax(peak, bits_as<I>(x(j, count)) & magnitude); });

  return bits_as<A>(hmax(peak));
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

template <class A>
struct Statistics {
  A power, mean, rstd;  // of x * power
};

template <class A, class F>
Statistics<A> statistics(const NormArgs& a, const Norm& norm, int64_t i, F&& x) {
  const int64_t n = a.cols;
  A c = 1, power = 1;
  if (a.relax != Relax::none) {
    c = a.relax == Relax::row ? peak_of<A>(n, x) : A(norm.peak) / 8;
    if (c == 0) c = 1;
    power = power_for(c);
  }
  const A mean =
      sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* total) { total[0] += x(j, count) * power; }).at[0] / A(n);
  const A variance = sums<A, 1>(n,
                                [&](int64_t j, auto count, Vec<A>* total) {
                                  const Vec<A> centred = first<A>(x(j, count) * power - mean, count);
                                  total[0] += centred * centred;
                                })
                         .at[0] /
                     A(n);
  const A unit = c * power;
  const A rstd = 1 / std::sqrt(variance + A(a.eps) * unit * unit);
  static_cast<A*>(norm.mean)[i] = mean / power;
  static_cast<A*>(norm.rstd)[i] = rstd * power;
  return {power, mean, rstd};
}

// f(column, how many, normalised vector) for the whole row.
template <class A, class F, class G>
void normalise(const NormArgs& a, const Norm& norm, int64_t i, F&& x, G&& f) {
  const Statistics<A> s = statistics<A>(a, norm, i, x);
  const A *weight = static_cast<const A*>(norm.weight), *bias = static_cast<const A*>(norm.bias);
  each<A>(a.cols, [&](int64_t j, auto count) {
    f(j, count, (x(j, count) * s.power - s.mean) * s.rstd * load(weight + j, count) + load(bias + j, count));
  });
}

template <class T>
void forward_rows(const NormArgs& a, int64_t begin, int64_t end, int slot) {
  using A = Acc<T>;
  for (int64_t i = begin; i < end; ++i) {
    T* h = row_of<T>(a.h, a.h_rows, i);
    if (a.branch) {
      const T* residual = row_of<T>(a.residual, a.residual_rows, i);
      normalise<A>(a, a.post, i, branch_of<T>(a, i, scratch_row<A>(a, slot, 0)),
                   [&](int64_t j, auto count, Vec<A> y) { put(h + j, load(residual + j, count) + y, count); });
      if (!a.x) static_cast<A*>(a.peaks)[i] = peak_of<A>(a.cols, Input<T>{h, nullptr});  // while h is in the cache
    }
    if (a.x) {
      T* x = row_of<T>(a.x, a.x_rows, i);
      normalise<A>(a, a.pre, i, Input<T>{h, nullptr}, [&](int64_t j, auto count, Vec<A> y) { put(x + j, y, count); });
    }
  }
}

template <class T>
void peak_rows(const NormArgs& a, int64_t begin, int64_t end, int slot) {
  using A = Acc<T>;
  for (int64_t i = begin; i < end; ++i) {
    const Input<T> x = a.branch ? branch_of<T>(a, i, scratch_row<A>(a, slot, 0))
                                : Input<T>{row_of<T>(static_cast<const void*>(a.h), a.h_rows, i), nullptr};
    static_cast<A*>(a.peaks)[i] = peak_of<A>(a.cols, x);
  }
}

// Gradient through one norm: of its parameters, added to the block's sums, and of its input, passed to f(column, how
// many, gradient). x and dy give vectors of the row; `weighted` is a buffer, and may be where dy reads.
template <class A, class X, class DY, class F>
void norm_backward(const NormArgs& a, const Norm& norm, int64_t i, int64_t block, A* weighted, X&& x, DY&& dy, F&& f) {
  const A* weight = static_cast<const A*>(norm.weight);
  A *dweight = static_cast<A*>(norm.dweight) + block * a.cols, *dbias = static_cast<A*>(norm.dbias) + block * a.cols;
  const A rstd = static_cast<const A*>(norm.rstd)[i], twice_rstd = rstd * 2;
  const A half_mean = static_cast<const A*>(norm.mean)[i] / 2;
  // halves: the difference of two huge numbers does not overflow
  const auto normalised = [&](int64_t j, auto count) { return (x(j, count) * A(0.5) - half_mean) * twice_rstd; };
  const auto total = sums<A, 2>(a.cols, [&](int64_t j, auto count, Vec<A>* acc) {
    const Vec<A> d = dy(j, count), y = normalised(j, count), g = d * load(weight + j, count);
    put(weighted + j, g, count);
    put(dweight + j, load(dweight + j, count) + d * y, count);
    put(dbias + j, load(dbias + j, count) + d, count);
    acc[0] += g;
    acc[1] += g * y;
  });
  const A mean_g = total.at[0] / A(a.cols), mean_gy = total.at[1] / A(a.cols);
  each<A>(a.cols, [&](int64_t j, auto count) {
    f(j, count, (load(weighted + j, count) - mean_g - normalised(j, count) * mean_gy) * rstd);
  });
}

template <class A>
void zero_sums(const NormArgs& a, const Norm& norm, int64_t block) {
  std::memset(static_cast<A*>(norm.dweight) + block * a.cols, 0, size_t(a.cols) * sizeof(A));
  std::memset(static_cast<A*>(norm.dbias) + block * a.cols, 0, size_t(a.cols) * sizeof(A));
}

template <class T>
void backward_row(const NormArgs& a, int64_t i, int64_t block, int slot) {
  using A = Acc<T>;
  const T* dh = a.dh ? row_of<T>(a.dh, a.dh_rows, i) : nullptr;
  T* dresidual = row_of<T>(a.dresidual, a.dresidual_rows, i);
  A* wide = scratch_row<A>(a, slot, 0);  // in the end the gradient of h, not rounded
  const auto write = [&](int64_t j, auto count, Vec<A> d) {
    if (dh) d += load(dh + j, count);
    put(dresidual + j, d, count);
    if (a.branch) put(wide + j, d, count);
  };
  if (a.dx) {
    const T* dx = row_of<T>(a.dx, a.dx_rows, i);
    norm_backward<A>(
        a, a.pre, i, block, wide, Input<T>{row_of<T>(static_cast<const void*>(a.h), a.h_rows, i), nullptr},
        [&](int64_t j, auto count) { return load(dx + j, count); }, write);
  } else {
    each<A>(a.cols, [&](int64_t j, auto count) { write(j, count, Vec<A>{}); });
  }
  if (!a.branch) return;
  const Input<T> branch = branch_of<T>(a, i, scratch_row<A>(a, slot, 1));
  T* dbranch = row_of<T>(a.dbranch, a.dbranch_rows, i);
  norm_backward<A>(
      a, a.post, i, block, wide, branch, [&](int64_t j, auto count) { return load(wide + j, count); },
      [&](int64_t j, auto count, Vec<A> d) {
        put(dbranch + j, branch.factors ? d * load(branch.factors + j, count) : d, count);
      });
}

template <class T>
void backward_blocks(const NormArgs& a, int64_t begin, int64_t end, int slot) {
  for (int64_t block = begin; block < end; ++block) {
    zero_sums<Acc<T>>(a, a.pre, block);
    if (a.branch) zero_sums<Acc<T>>(a, a.post, block);
    const int64_t from = block * a.block_rows, to = from + a.block_rows < a.rows ? from + a.block_rows : a.rows;
    for (int64_t i = from; i < to; ++i) backward_row<T>(a, i, block, slot);
  }
}

}  // namespace

#define COGVIEW_BY_DTYPE(kernel)                    \
  switch (a.dtype) {                                \
    case Dtype::f64:                                \
      return kernel<double>(a, begin, end, slot);   \
    case Dtype::f32:                                \
      return kernel<float>(a, begin, end, slot);    \
    case Dtype::bf16:                               \
      return kernel<BFloat16>(a, begin, end, slot); \
    case Dtype::f16:                                \
      return kernel<Half>(a, begin, end, slot);     \
  }

void layer_norm_peaks(const NormArgs& a, int64_t begin, int64_t end, int slot) { COGVIEW_BY_DTYPE(peak_rows) }
void sandwich_layer_norm_fwd(const NormArgs& a, int64_t begin, int64_t end, int slot) { COGVIEW_BY_DTYPE(forward_rows) }
void sandwich_layer_norm_bwd(const NormArgs& a, int64_t begin, int64_t end, int slot) {
  COGVIEW_BY_DTYPE(backward_blocks)
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
