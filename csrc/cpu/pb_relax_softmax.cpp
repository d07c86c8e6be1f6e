// PB-relax softmax, a row at a time.
//
// Memory. Rows lie at any offsets, their elements beside each other, aligned to an element only; of the mask both may
// have any stride, 0 too.
//   forward   reads scores and mask twice, the second time from cache; exponentials wait in scratch; writes out once.
//   backward  reads out and dout twice, the second time from cache; writes grad once.
// With `stream`, results wait in scratch for a whole row and are written around the caches.
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

template <class T, bool masked>
void forward_row(const SoftmaxPlan& a, int64_t i, int64_t next, Acc<T>* kept) {
  using A = Acc<T>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const T *x = static_cast<const T*>(a.scores) + a.scores_rows.offset(i),
          *ahead = static_cast<const T*>(a.scores) + a.scores_rows.offset(next);
  T* y = static_cast<T*>(a.out) + a.out_rows.offset(i);
  const bool* mask = masked ? a.mask + a.mask_rows.offset(i) : nullptr;
  const int64_t n = a.visible(i);
  uint64_t any = !masked && n > 0;
  const auto visible = [&](int64_t j, auto count) {
    const int lanes = count;
    uint64_t bits = (uint64_t(1) << lanes) - 1;
    Vec<A> v = load(x + j, count);
    if constexpr (masked)
      any |= bits = mask_bits(mask + j * a.mask_col_stride, a.mask_col_stride, lanes);
    else if (std::is_same_v<decltype(count), Whole<A>>)
      return v;
    return select_bits<A>(bits, v, kNone);
  };
  Vec<A> peaks[kCopies][1];
  for (auto& peak : peaks) peak[0] = splat(kNone);
  accumulate<A>(n, peaks, [&](int64_t j, auto count, Vec<A>* peak) { *peak = vmax(visible(j, count), *peak); });
  if (!any) return each<A>(a.cols, [&](int64_t j, auto count) { put(y + j, Vec<A>{}, count); });

  const A shift = hmax(vmax(vmax(peaks[0][0], peaks[1][0]), vmax(peaks[2][0], peaks[3][0])));
  const A scale = A(a.alpha * kLog2e);
  const auto total = sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* acc) {
    __builtin_prefetch(ahead + j);
    const Vec<A> e = exp2v<kExpDegree<T>>((visible(j, count) - shift) * scale);
    put(kept + j, e, count);
    acc[0] += e;
  });
  T* to = a.stream ? reinterpret_cast<T*>(kept) : y;  // never ahead of what is read
  const A inverse = 1 / total.at[0];
  each<A>(n, [&](int64_t j, auto count) { put(to + j, load(kept + j, count) * inverse, count); });
  // zeros, or NaN where the row is
  each<A>(a.cols - n, [&](int64_t j, auto count) { put(to + n + j, splat(inverse * 0), count); });
  if (a.stream) stream_row(y, to, a.cols);
}

template <class T>
void backward_row(const SoftmaxPlan& a, int64_t i, int64_t next, Acc<T>* buffer) {
  using A = Acc<T>;
  const T* y = static_cast<const T*>(a.out) + a.out_rows.offset(i);
  const T* dy = static_cast<const T*>(a.dout) + a.dout_rows.offset(i);
  const T *y_ahead = static_cast<const T*>(a.out) + a.out_rows.offset(next),
          *dy_ahead = static_cast<const T*>(a.dout) + a.dout_rows.offset(next);
  T* dx = static_cast<T*>(a.grad) + a.grad_rows.offset(i);
  T* to = a.stream ? reinterpret_cast<T*>(buffer) : dx;
  const int64_t n = a.visible(i);
  const auto total =
      sums<A, 1>(n, [&](int64_t j, auto count, Vec<A>* acc) { acc[0] += load(y + j, count) * load(dy + j, count); });
  const A inner = total.at[0], alpha = A(a.alpha);
  each<A>(n, [&](int64_t j, auto count) {
    __builtin_prefetch(y_ahead + j);
    __builtin_prefetch(dy_ahead + j);
    put(to + j, load(y + j, count) * (load(dy + j, count) - inner) * alpha, count);
  });
  each<A>(a.cols - n, [&](int64_t j, auto count) { put(to + n + j, Vec<A>{}, count); });
  if (a.stream) stream_row(dx, to, a.cols);
}

// row(args, row, the one after it, scratch) for all of a thread's rows.
template <class T, class F>
void each_row(const SoftmaxPlan& a, int64_t begin, int64_t end, int slot, F&& row) {
  const FlushToZero mode;
  Acc<T>* scratch = static_cast<Acc<T>*>(a.scratch) + slot * a.scratch_cols;
  for (int64_t i = begin; i < end; ++i) row(a, i, i + 1 < end ? i + 1 : i, scratch);
  if (a.stream) stream_fence();
}

template <class T>
void forward_rows(const SoftmaxPlan& a, int64_t begin, int64_t end, int slot) {
  each_row<T>(a, begin, end, slot, a.mask ? forward_row<T, true> : forward_row<T, false>);
}
template <class T>
void backward_rows(const SoftmaxPlan& a, int64_t begin, int64_t end, int slot) {
  each_row<T>(a, begin, end, slot, backward_row<T>);
}

}  // namespace

void pb_relax_softmax_fwd(const SoftmaxPlan& a, int64_t begin, int64_t end, int slot) {
  by_dtype(a.dtype, [&](auto x) { forward_rows<decltype(x)>(a, begin, end, slot); });
}
void pb_relax_softmax_bwd(const SoftmaxPlan& a, int64_t begin, int64_t end, int slot) {
  by_dtype(a.dtype, [&](auto x) { backward_rows<decltype(x)>(a, begin, end, slot); });
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
