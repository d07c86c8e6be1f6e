// PB-relax softmax, a row of a matrix for each team of threads.
//
// Memory. Rows lie at any offsets, their elements beside each other; of the mask both may have any stride, 0 too. Where
// rows are aligned to packs, they are read and written a pack at a time, else an element.
//   forward   reads scores and mask, writes out; backward reads out and dout, writes grad: once each, while a row stays
//             in registers. Longer rows are read again in each pass, mostly from cache.
#include "pb_relax_softmax.h"

#include <cmath>

#include "pack.cuh"
#include "row_team.cuh"

namespace cogview::cuda {
namespace {

constexpr int kThreads = 512;  // of a block at most: 128 registers each

// Elements of each tensor in a thread: 1088 columns are one warp's, which waits for no other.
template <class T>
constexpr int kKept = 160 / sizeof(Acc<T>);

// kPacks > 0: a thread keeps that many packs in registers, so memory is read once and written once. kPacks = 0:
// rows longer than that are read again for each of the three passes, mostly from cache.
template <class T, bool kAligned, int kPacks>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ SoftmaxArgs a, int64_t rows, int team_size) {
  constexpr int W = kPackWidth<T>;
  using A = Acc<T>;
  const A none = -INFINITY;
  __shared__ WarpValues<A> warps[3][1];
  const RowTeam team(team_size);
  if (team.row >= rows) return;  // whole teams only, and a team of several warps is its block
  const T* x = static_cast<const T*>(a.scores) + a.scores_rows.offset(team.row);
  T* y = static_cast<T*>(a.out) + a.out_rows.offset(team.row);
  const bool* mask = a.mask ? a.mask + a.mask_rows.offset(team.row) : nullptr;
  using J = Column<kPacks>;
  const J n = a.visible(team.row), cols = a.cols;
  const A alpha = A(a.alpha);

  Pack<T, W> raw[kPacks ? kPacks : 1];
  A kept[kPacks ? kPacks : 1][W] = {};
  bool any = !mask && n > 0;
  // kept[k]: the entries from column j, -inf where hidden
  const auto see = [&](int k, J j) {
    const int left = static_cast<int>(min(n - j, J(W)));
    if (kPacks == 0) raw[k] = load<kAligned, W>(x + j, left);
    widen(raw[k], kept[k]);
    for (int l = 0; l < W; ++l)
      if (l >= left) kept[k][l] = none;
    if (!mask) return;
    unsigned char shown[W];
    if constexpr (kAligned && W > 1)
      load<W>(reinterpret_cast<const unsigned char*>(mask) + j).to(shown);
    else
      for (int l = 0; l < W; ++l) shown[l] = l < left && mask[(j + l) * a.mask_col_stride];
    for (int l = 0; l < W; ++l) {
      any |= l < left && shown[l];
      if (!shown[l]) kept[k][l] = none;
    }
  };

  // all loads first, so that they are under way together
  if (kPacks > 0)
    team.each_pack<W, kPacks>(
        n, [&](int k, J j) { raw[k] = load<kAligned, W>(x + j, static_cast<int>(min(n - j, J(W)))); });
  A peak = none;
  team.each_pack<W, kPacks>(n, [&](int k, J j) {
    see(k, j);
    for (int l = 0; l < W; ++l) peak = max(peak, kept[k][l]);
  });
  const auto larger = [](A p, A q) { return max(p, q); };
  peak = team.reduce(peak, none, larger, warps[0]);
  if (peak == none && team.reduce(A(any), A(0), larger, warps[1]) == 0) peak = 0;  // sees nothing: all exp(-inf) = 0

  const auto exponentials = [&](int k, J j) {
    if (kPacks == 0) see(k, j);
    for (int l = 0; l < W; ++l) kept[k][l] = exp((kept[k][l] - peak) * alpha);
  };
  A total = 0;
  team.each_pack<W, kPacks>(n, [&](int k, J j) {
    exponentials(k, j);
    for (int l = 0; l < W; ++l) total += kept[k][l];
  });
  total = team.reduce(total, A(0), [](A p, A q) { return p + q; }, warps[2]);
  const A inverse = total == 0 ? 0 : 1 / total;

  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    if (kPacks == 0) {
      if (j < n)
        exponentials(k, j);
      else
        for (int l = 0; l < W; ++l) kept[k][l] = 0;
    }
    for (int l = 0; l < W; ++l) kept[k][l] *= inverse;  // hidden entries: zeros, or NaN where the row is
    store<kAligned>(y + j, narrow<T>(kept[k]), static_cast<int>(min(cols - j, J(W))));
  });
}

template <class T, bool kAligned, int kPacks>
__global__ void __launch_bounds__(kThreads, 1)
    backward(const __grid_constant__ SoftmaxArgs a, int64_t rows, int team_size) {
  constexpr int W = kPackWidth<T>;
  using A = Acc<T>;
  __shared__ WarpValues<A> warps[1];
  const RowTeam team(team_size);
  if (team.row >= rows) return;
  const T* y = static_cast<const T*>(a.out) + a.out_rows.offset(team.row);
  const T* dy = static_cast<const T*>(a.dout) + a.dout_rows.offset(team.row);
  T* dx = static_cast<T*>(a.grad) + a.grad_rows.offset(team.row);
  using J = Column<kPacks>;
  const J n = a.visible(team.row), cols = a.cols;
  const A alpha = A(a.alpha);

  Pack<T, W> p[kPacks ? kPacks : 1], dp[kPacks ? kPacks : 1];
  A v[W], dv[W];
  const auto read = [&](int k, J j) {
    const int left = static_cast<int>(min(n - j, J(W)));
    p[k] = load<kAligned, W>(y + j, left);
    dp[k] = load<kAligned, W>(dy + j, left);
  };
  if (kPacks > 0) team.each_pack<W, kPacks>(n, read);
  A inner = 0;
  team.each_pack<W, kPacks>(n, [&](int k, J j) {
    if (kPacks == 0) read(k, j);
    const int left = static_cast<int>(min(n - j, J(W)));
    widen(p[k], v);
    widen(dp[k], dv);
    for (int l = 0; l < W; ++l)
      if (l < left) inner += v[l] * dv[l];
  });
  inner = team.reduce(inner, A(0), [](A p, A q) { return p + q; }, warps);

  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    const int left = static_cast<int>(max(min(n - j, J(W)), J(0)));
    if (kPacks == 0 && left > 0) read(k, j);
    widen(p[k], v);
    widen(dp[k], dv);
    for (int l = 0; l < W; ++l) v[l] = l < left ? v[l] * (dv[l] - inner) * alpha : A(0);
    store<kAligned>(dx + j, narrow<T>(v), static_cast<int>(min(cols - j, J(W))));
  });
}

}  // namespace

cudaError_t pb_relax_softmax_fwd(const SoftmaxArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtype(a.dtype, [&](auto one) {
    using T = decltype(one);
    constexpr int kWide = kPackWidth<T>;
    const bool whole = a.cols % kWide == 0 && aligned(a.scores, a.scores_rows, kWide, sizeof(T)) &&
                       aligned(a.out, a.out_rows, kWide, sizeof(T)) &&
                       (!a.mask || (a.mask_col_stride == 1 && aligned(a.mask, a.mask_rows, kWide, 1)));
    const RowLaunch launch(rows, a.cols, kKept<T>, kThreads);
    // what is not aligned is read again in each pass
    const auto kernel = !whole        ? forward<T, kWide == 1, 0>
                        : launch.fits ? forward<T, true, kKept<T> / kWide>
                                      : forward<T, true, 0>;
    return launch(kernel, a, rows, stream);
  });
}

cudaError_t pb_relax_softmax_bwd(const SoftmaxArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtype(a.dtype, [&](auto one) {
    using T = decltype(one);
    constexpr int kWide = kPackWidth<T>;
    const bool whole = a.cols % kWide == 0 && aligned(a.out, a.out_rows, kWide, sizeof(T)) &&
                       aligned(a.dout, a.dout_rows, kWide, sizeof(T)) && aligned(a.grad, a.grad_rows, kWide, sizeof(T));
    const RowLaunch launch(rows, a.cols, kKept<T>, kThreads);
    // what is not aligned is read again in each pass
    const auto kernel = !whole        ? backward<T, kWide == 1, 0>
                        : launch.fits ? backward<T, true, kKept<T> / kWide>
                                      : backward<T, true, 0>;
    return launch(kernel, a, rows, stream);
  });
}

}  // namespace cogview::cuda
