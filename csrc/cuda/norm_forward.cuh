// The forward of LayerNorm, RMSNorm and the step of a transformer, a row for each team of threads.
//
// Memory. Rows lie at any offsets, their elements beside each other; parameters and statistics are contiguous. Where
// rows are aligned to packs, they are read and written a pack at a time, else an element. While a row stays in
// registers, everything is read once and written once; longer rows are read again in each pass, mostly from cache.
// Reads branch and residual; writes h, x, mean and rstd of each norm, and with a tensor's peak the largest magnitude by
// atomicMax, which no order changes. What a step lacks is neither read nor written.
#pragma once

#include "norm_row.cuh"

namespace cogview::cuda {
namespace {

// The largest magnitude that any team of the grid has seen; most find a larger one there, and leave it.
template <class A>
__device__ void publish(const RowTeam& team, Bits<A> peak, WarpValues<Bits<A>> (&warps)[1], void* to) {
  peak = team.reduce(peak, Bits<A>(0), Largest<Bits<A>>(), warps);
  Bits<A>* const largest = static_cast<Bits<A>*>(to);
  if (team.rank == 0 && peak > *static_cast<volatile Bits<A>*>(largest)) atomicMax(largest, peak);
}

// T: of branch and x; R: of residual and h, as wide or wider, and packs have as many elements as 16 bytes hold of it.
// kPacks > 0: a thread keeps that many packs in registers, so memory is read once and written once. kPacks = 0: longer
// rows are read again in each pass, from cache.
template <class T, class R, bool kAligned, int kPacks, bool kBranch, bool kRms>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  constexpr int W = kPackWidth<R>;
  using A = Acc<T>;
  using J = Column<kPacks>;
  __shared__ Slots<A> slots;
  const RowTeam team(team_size);
  const J cols = a.cols;
  Bits<A> peak = 0;
  const bool emit = kBranch && !kRms && a.relax == Relax::tensor && !a.x && a.pre_peak;
  const int64_t i = team.row;
  if (i >= rows) return;  // whole teams only, and a team of several warps is its block
  RowPart<R, W, kAligned, kPacks> h;
  R* h_row = row_of<R>(a.h, a.h_rows, i);
  A v[W], weight[W], bias[W], kept[kPacks ? kPacks : 1][W];
  // a row in A: worked out once, or, kPacks = 0, whenever it is used
  const auto keep = [&](auto row) {
    if constexpr (kPacks > 0) team.each_pack<W, kPacks>(cols, [&](int k, J j) { row(k, j, kept[k]); });
    return [=, &kept](int k, J j, A(&x)[W]) {
      if constexpr (kPacks > 0)
        for (int l = 0; l < W; ++l) x[l] = kept[k][l];
      else
        row(k, j, x);
    };
  };
  const auto normalise = [&](const Norm& norm, const Statistics<A>& s, J j, auto like) {
    const int left = elements<W, kAligned>(cols, j);
    load_weights<T, kAligned>(norm.weight, j, left, a.wide_weights, weight);
    for (int l = 0; l < W; ++l) weight[l] += A(a.weight_offset);
    if constexpr (kRms) {
      for (int l = 0; l < W; ++l) v[l] *= s.rstd;
      if (a.round_before_weight) widen(narrow<decltype(like)>(v), v);
      for (int l = 0; l < W; ++l) v[l] *= weight[l];
    } else {
      load_weights<T, kAligned>(norm.bias, j, left, a.wide_weights, bias);
      for (int l = 0; l < W; ++l) v[l] = (v[l] * s.power - s.mean) * s.rstd * weight[l] + bias[l];
    }
  };
  if constexpr (kBranch) {
    Branch<T, W, kAligned, kPacks> branch(a, i);
    branch.read(team, row_of<T>(a.branch, a.branch_rows, i), cols);
    h.read(team, row_of<R>(a.residual, a.residual_rows, i), cols);
    branch.drop(a, team, i);
    A other[W];
    const bool before = a.dropout && !a.dropout_after_norm;
    const auto dropped = keep([&](int k, J j, A(&x)[W]) {
      branch(k, j, x);
      if (!before) return;
      branch.factors(a, i, k, j, other);
      for (int l = 0; l < W; ++l) x[l] *= other[l];
    });
    Statistics<A> s;
    if (a.post.weight) s = statistics<kRms, W, kAligned, kPacks>(a, a.post, a.post_peak, i, team, slots, dropped);
    const A scale = row_scale<A>(a, i);
    team.each_pack<W, kPacks>(cols, [&](int k, J j) {
      dropped(k, j, v);
      if (a.post.weight) normalise(a.post, s, j, T());
      if (a.dropout_after_norm) {
        branch.factors(a, i, k, j, other);
        for (int l = 0; l < W; ++l) v[l] *= other[l];
      }
      h(k, j, other);
      for (int l = 0; l < W; ++l) v[l] = other[l] + scale * v[l];
      h.kept[k] = narrow<R>(v);
      store<kAligned>(h_row + j, h.kept[k], elements<W, kAligned>(cols, j));
      widen(h.kept[k], v);
      if (emit)
        for (int l = 0; l < W; ++l) peak = Largest<Bits<A>>()(peak, magnitude(v[l]));
    });
    h.from = h_row;
  } else {
    h.read(team, h_row, cols);
  }
  if (!kBranch || a.x) {
    T* x_row = row_of<T>(a.x, a.x_rows, i);
    const auto whole = keep(h);
    const Statistics<A> s = statistics<kRms, W, kAligned, kPacks>(a, a.pre, a.pre_peak, i, team, slots, whole);
    team.each_pack<W, kPacks>(cols, [&](int k, J j) {
      whole(k, j, v);
      normalise(a.pre, s, j, R());
      store<kAligned>(x_row + j, narrow<T>(v), elements<W, kAligned>(cols, j));
    });
  }
  if (emit) publish<A>(team, peak, slots.peak, a.pre_peak);
}

template <class T, bool kAligned, bool kBranch>
__global__ void __launch_bounds__(kThreads, 1)
    peaks(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  constexpr int W = kPackWidth<T>;
  using A = Acc<T>;
  __shared__ WarpValues<Bits<A>> warps[1];
  const RowTeam team(team_size);
  Bits<A> peak = 0;
  for (int64_t i = team.row; i < rows; i += team.step) {
    Branch<T, W, kAligned, 0> part(a, i);
    part.read(team, kBranch ? row_of<T>(a.branch, a.branch_rows, i) : row_of<T>(a.h, a.h_rows, i), a.cols);
    team.each_pack<W, 0>(a.cols, [&](int k, int64_t j) {
      A v[W], factor[W];
      part(k, j, v);
      part.factors(a, i, k, j, factor);
      for (int l = 0; l < W; ++l) peak = Largest<Bits<A>>()(peak, magnitude(kBranch ? v[l] * factor[l] : v[l]));
    });
  }
  publish<A>(team, peak, warps, kBranch ? a.post_peak : a.pre_peak);
}

}  // namespace
}  // namespace cogview::cuda
