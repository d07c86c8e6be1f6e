#include "pb_relax_softmax.h"

#include <cmath>
#include <limits>

#include "vec.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// f(column, vector) over n columns; f returns the vector to store, or nothing.
template <class T, class F>
inline void each(const T* p, int64_t n, F&& f) {
  constexpr int w = kLanes<Acc<T>>;
  int64_t j = 0;
  for (; j + w <= n; j += w) f(j, load(p + j), w);
  if (j < n) f(j, load_partial(p + j, n - j), int(n - j));
}

template <class T>
inline void put(T* p, Vec<Acc<T>> v, int n) {
  if (n == kLanes<Acc<T>>)
    store(p, v);
  else
    store_partial(p, v, n);
}

inline uint64_t mask_bits(const bool* mask, int64_t stride, int n) {
  uint64_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= uint64_t(mask[i * stride]) << i;
  return bits;
}

template <class T>
void forward_row(const SoftmaxArgs& a, int64_t i) {
  using A = Acc<T>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const T* x = static_cast<const T*>(a.scores) + a.scores_rows.offset(i);
  T* y = static_cast<T*>(a.out) + a.out_rows.offset(i);
  const bool* mask = a.mask ? a.mask + a.mask_rows.offset(i) : nullptr;
  const int64_t n = a.visible(i);
  const auto visible = [&](int64_t j, Vec<A> v, int count) {
    const uint64_t bits = (mask ? mask_bits(mask + j * a.mask_col_stride, a.mask_col_stride, count) : ~uint64_t(0)) &
                          ((uint64_t(1) << count) - 1);
    return select_bits<A>(bits, v, kNone);
  };
  Vec<A> peak = splat(kNone);
  each(x, n, [&](int64_t j, Vec<A> v, int count) { peak = vmax(visible(j, v, count), peak); });
  const A shift = hmax(peak) == kNone ? A(0) : hmax(peak);
  const A alpha = A(a.alpha);
  Vec<A> total{};
  each(x, n, [&](int64_t j, Vec<A> v, int count) { total += expv((visible(j, v, count) - shift) * alpha); });
  const A sum = hsum(total);
  const A inverse = sum == 0 ? A(0) : 1 / sum;
  each(x, n, [&](int64_t j, Vec<A> v, int count) {
    put(y + j, expv((visible(j, v, count) - shift) * alpha) * inverse, count);
  });
  for (int64_t j = n; j < a.cols; ++j) y[j] = T{};
}

template <class T>
void backward_row(const SoftmaxArgs& a, int64_t i) {
  using A = Acc<T>;
  const T* y = static_cast<const T*>(a.out) + a.out_rows.offset(i);
  const T* dy = static_cast<const T*>(a.dout) + a.dout_rows.offset(i);
  T* dx = static_cast<T*>(a.grad) + a.grad_rows.offset(i);
  const int64_t n = a.visible(i);
  Vec<A> total{};
  each(y, n, [&](int64_t j, Vec<A> v, int count) { total += v * load_partial(dy + j, count); });
  const A inner = hsum(total), alpha = A(a.alpha);
  each(y, n,
       [&](int64_t j, Vec<A> v, int count) { put(dx + j, v * (load_partial(dy + j, count) - inner) * alpha, count); });
  for (int64_t j = n; j < a.cols; ++j) dx[j] = T{};
}

#define COGVIEW_ROWS(row)                                  \
  for (int64_t i = begin; i < end; ++i) switch (a.dtype) { \
      case Dtype::f64:                                     \
        row<double>(a, i);                                 \
        break;                                             \
      case Dtype::f32:                                     \
        row<float>(a, i);                                  \
        break;                                             \
      case Dtype::bf16:                                    \
        row<BFloat16>(a, i);                               \
        break;                                             \
      case Dtype::f16:                                     \
        row<Half>(a, i);                                   \
        break;                                             \
    }

}  // namespace

void pb_relax_softmax_fwd(const SoftmaxArgs& a, int64_t begin, int64_t end, int) { COGVIEW_ROWS(forward_row) }
void pb_relax_softmax_bwd(const SoftmaxArgs& a, int64_t begin, int64_t end, int) { COGVIEW_ROWS(backward_row) }

}  // namespace COGVIEW_ISA
}  // namespace cogview
