#include "pb_relax_softmax.h"

#include <cmath>
#include <limits>

#include "loops.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Bit i is mask[i * stride].
inline uint64_t mask_bits(const bool* mask, int64_t stride, int n) {
  uint64_t bits = 0;
  int i = 0;
  for (; stride == 1 && i + 8 <= n; i += 8) {
    uint64_t bytes;  // of 0 or 1; the product gathers them in its highest byte
    std::memcpy(&bytes, mask + i, sizeof bytes);
    bits |= (bytes * 0x0102040810204080) >> 56 << i;
  }
  for (; i < n; ++i) bits |= uint64_t(mask[i * stride]) << i;
  return bits;
}

template <class T>
void forward_row(const SoftmaxArgs& a, int64_t i) {
  using A = Acc<T>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  constexpr int64_t kKept = 4096;  // exponentials kept in the first-level cache; longer rows compute them again
  const T* x = static_cast<const T*>(a.scores) + a.scores_rows.offset(i);
  T* y = static_cast<T*>(a.out) + a.out_rows.offset(i);
  const bool* mask = a.mask ? a.mask + a.mask_rows.offset(i) : nullptr;
  const int64_t n = a.visible(i);
  uint64_t any = !mask && n > 0;
  const auto visible = [&](int64_t j, auto count) {
    const int lanes = count;
    uint64_t bits = (uint64_t(1) << lanes) - 1;
    Vec<A> v = load(x + j, count);
    if (mask)
      any |= bits = mask_bits(mask + j * a.mask_col_stride, a.mask_col_stride, lanes);
    else if (std::is_same_v<decltype(count), Whole<A>>)
      return v;
    return select_bits<A>(bits, v, kNone);
  };
  Vec<A> peak = splat(kNone);
  each<A>(n, [&](int64_t j, auto count) { peak = vmax(visible(j, count), peak); });
  if (!any) return each<A>(a.cols, [&](int64_t j, auto count) { put(y + j, Vec<A>{}, count); });

  const A shift = hmax(peak), alpha = A(a.alpha);
  const auto exponential = [&](int64_t j, auto count) { return expv((visible(j, count) - shift) * alpha); };
  A buffer[std::is_same_v<T, A> ? 1 : kKept];
  A* kept = buffer;
  if constexpr (std::is_same_v<T, A>) kept = y;
  const bool keep = std::is_same_v<T, A> || n <= kKept;
  const auto total = sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* acc) {
    const Vec<A> e = exponential(j, count);
    if (keep) put(kept + j, e, count);
    acc[0] += e;
  });
  const A inverse = 1 / total.at[0];
  each<A>(n, [&](int64_t j, auto count) {
    put(y + j, (keep ? load(kept + j, count) : exponential(j, count)) * inverse, count);
  });
  // zeros, or NaN where the row is
  each<A>(a.cols - n, [&](int64_t j, auto count) { put(y + n + j, splat(inverse * 0), count); });
}

template <class T>
void backward_row(const SoftmaxArgs& a, int64_t i) {
  using A = Acc<T>;
  const T* y = static_cast<const T*>(a.out) + a.out_rows.offset(i);
  const T* dy = static_cast<const T*>(a.dout) + a.dout_rows.offset(i);
  T* dx = static_cast<T*>(a.grad) + a.grad_rows.offset(i);
  const int64_t n = a.visible(i);
  const auto total =
      sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* acc) { acc[0] += load(y + j, count) * load(dy + j, count); });
  const A inner = total.at[0], alpha = A(a.alpha);
  each<A>(n, [&](int64_t j, auto count) {
    put(dx + j, load(y + j, count) * (load(dy + j, count) - inner) * alpha, count);
  });
  each<A>(a.cols - n, [&](int64_t j, auto count) { put(dx + n + j, Vec<A>{}, count); });
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
