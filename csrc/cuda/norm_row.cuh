// What the forward and the backward of a norm share: a row's parts in registers, dropout, statistics.
#pragma once

#include <cmath>
#include <limits>

#include "pack.cuh"
#include "philox.cuh"
#include "row_team.cuh"
#include "sandwich_layer_norm.h"

namespace cogview::cuda {
namespace {

constexpr int kThreads = 512;  // of a block at most: 128 registers each

// Without their sign, floats are ordered as their bits are, NaN last.
template <class A>
using Bits = std::conditional_t<sizeof(A) == 8, unsigned long long, unsigned>;

template <class A>
__device__ Bits<A> bits_of(A x) {
  Bits<A> bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class A>
__device__ A from_bits(Bits<A> bits) {
  A x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
template <class A>
__device__ Bits<A> magnitude(A x) {
  return bits_of(x) & (~Bits<A>(0) >> 1);
}

template <class T>
__device__ const T* row_of(const void* p, const Rows& rows, int64_t i) {
  return static_cast<const T*>(p) + rows.offset(i);
}
template <class T>
__device__ T* row_of(void* p, const Rows& rows, int64_t i) {
  return static_cast<T*>(p) + rows.offset(i);
}

// How many elements the pack at column j has.
template <int W, bool kAligned, class J>
__device__ int elements(J cols, J j) {
  return kAligned ? W : static_cast<int>(min(cols - j, J(W)));
}

// A pack of [cols] parameters, in the rows' dtype or in their own.
template <class T, bool kAligned, int W>
__device__ void load_weights(const void* p, int64_t j, int left, bool wide, Acc<T> (&out)[W]) {
  using A = Acc<T>;
  if (std::is_same_v<T, A> || wide) {
    constexpr int P = W * sizeof(A) > 16 ? 16 / sizeof(A) : W;
    for (int q = 0; q < W; q += P) {
      A part[P];
      load<kAligned, P>(static_cast<const A*>(p) + j + q, left - q).to(part);
      for (int l = 0; l < P; ++l) out[q + l] = part[l];
    }
  } else {
    widen(load<kAligned, W>(static_cast<const T*>(p) + j, left), out);
  }
}

// This thread's packs of W elements of a row: read once into registers, or, kPacks = 0, from memory whenever they are
// used.
template <class T, int W, bool kAligned, int kPacks>
struct RowPart {
  using J = Column<kPacks>;
  Pack<T, W> kept[kPacks ? kPacks : 1];
  const T* from;
  J cols;

  __device__ void read(const RowTeam& team, const T* row, J n) {
    from = row;
    cols = n;
    if constexpr (kPacks > 0)
      team.each_pack<W, kPacks>(
          n, [&](int k, int j) { kept[k] = load<kAligned, W>(row + j, elements<W, kAligned>(n, j)); });
  }
  __device__ void operator()(int k, J j, Acc<T> (&v)[W]) const {
    if constexpr (kPacks > 0) {
      widen(kept[k], v);
    } else {  // not through the read-only path: this kernel may have written it
      if constexpr (kAligned) {
        const Pack<T, W> pack{reinterpret_cast<const Pack<T, W>*>(from + j)->bits};  // in one access
        widen(pack, v);
      } else {
        T at[W];
        for (int l = 0; l < W; ++l) at[l] = l < cols - j ? from[j + l] : narrow<T>(0);
        widen(Pack<T, W>::of(at), v);
      }
    }
  }
};

// The branch after dropout. Which elements are kept is worked out once, or, kPacks = 0, whenever they are used.
template <class T, int W, bool kAligned, int kPacks>
struct Branch : RowPart<T, W, kAligned, kPacks> {
  static_assert(kPacks * W <= 64);
  std::conditional_t<kPacks * W <= 32, uint32_t, uint64_t> bits;
  int sample;  // whose seed drops row i

  // Of one seed nothing is divided. Before anything is read: a division takes registers.
  __device__ Branch(const LayerNormArgs& a, int64_t i)
      : sample(a.rows_per_seed < a.rows ? static_cast<int>(i / a.rows_per_seed) : 0) {}

  __device__ uint32_t kept_at(const LayerNormArgs& a, int64_t i, int64_t j) const {
    return kept_bits<W>(__ldg(a.seed + sample), a.dropout_threshold, (i - sample * a.rows_per_seed) * a.cols + j);
  }
  __device__ void drop(const LayerNormArgs& a, const RowTeam& team, int64_t i) {
    bits = ~decltype(bits)(0);
    if constexpr (kPacks > 0)
      if (a.dropout) {
        bits = 0;
#pragma unroll 1
        for (int k = 0; k < kPacks; ++k)
          bits |= decltype(bits)(kept_at(a, i, (team.rank + k * team.size) * W)) << (k * W);
      }
  }
  __device__ void factors(const LayerNormArgs& a, int64_t i, int k, Column<kPacks> j, Acc<T> (&f)[W]) const {
    uint32_t mine;
    if constexpr (kPacks > 0)
      mine = static_cast<uint32_t>(bits >> (k * W));
    else
      mine = a.dropout ? kept_at(a, i, j) : ~0u;
    const Acc<T> scale = a.dropout ? Acc<T>(a.dropout_scale) : Acc<T>(1);
    for (int l = 0; l < W; ++l) f[l] = mine >> l & 1 ? scale : Acc<T>(0);
  }
};

template <class A>
struct Sum {
  __device__ A operator()(A p, A q) const { return p + q; }
};
template <class V>
struct Largest {
  __device__ V operator()(V p, V q) const { return p < q ? q : p; }
};

// The power of two that brings c near 1: exact, so LN(x / c) is LN(x * power) with eps * (c * power)^2.
template <class A>
__device__ A power_for(A c) {
  constexpr int mantissa = std::numeric_limits<A>::digits - 1;
  constexpr int64_t top = 2 * std::numeric_limits<A>::max_exponent - 2;  // the exponent field of 1 is half of it
  const int64_t field = top - static_cast<int64_t>(bits_of(c) >> mantissa);
  return from_bits<A>(Bits<A>(field < 1 ? 1 : field) << mantissa);
}

template <class A>
struct Statistics {
  A power, mean, rstd;  // of x * power
};

template <class A>
struct Slots {  // of reductions
  WarpValues<Bits<A>> peak[1];
  WarpValues<A> mean[1], variance[1];
};

// What the branch of row i is multiplied with.
template <class A>
__device__ A row_scale(const LayerNormArgs& a, int64_t i) {
  const A scale = A(a.branch_scale);
  return a.row_scale ? scale * static_cast<const A*>(a.row_scale)[i] : scale;
}

// x(k, j, v) gives a pack of the norm's input.
template <bool kRms, int W, bool kAligned, int kPacks, class A, class X>
__device__ Statistics<A> statistics(const LayerNormArgs& a, const Norm& norm, const void* common_peak, int64_t i,
                                    const RowTeam& team, Slots<A>& slots, X x) {
  using J = Column<kPacks>;
  const J cols = a.cols;
  A c = 1, power = 1, v[W];
  if constexpr (kRms) {
    A squares = 0;
    team.each_pack<W, kPacks>(cols, [&](int k, J j) {
      x(k, j, v);
      for (int l = 0; l < W; ++l) squares += v[l] * v[l];  // 0 behind the row
    });
    const bool second = &norm == &a.pre;  // its slots are not those of the reduction before
    squares = team.reduce(squares, A(0), Sum<A>(), second ? slots.mean : slots.variance) / A(cols);
    const A rstd = 1 / sqrt(squares + A(a.eps));
    if (team.rank == 0) static_cast<A*>(norm.rstd)[i] = rstd;
    return {1, 0, rstd};
  }
  if (a.relax == Relax::row) {
    Bits<A> peak = 0;
    team.each_pack<W, kPacks>(cols, [&](int k, J j) {
      x(k, j, v);
      for (int l = 0; l < W; ++l) peak = Largest<Bits<A>>()(peak, magnitude(v[l]));
    });
    c = from_bits<A>(team.reduce(peak, Bits<A>(0), Largest<Bits<A>>(), slots.peak));
  } else if (a.relax == Relax::tensor) {
    c = *static_cast<const A*>(common_peak) / 8;
  }
  if (c == 0) c = 1;
  if (a.relax != Relax::none) power = power_for(c);
  A mean = 0;
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    x(k, j, v);
    for (int l = 0; l < W; ++l) mean += v[l] * power;
  });
  mean = team.reduce(mean, A(0), Sum<A>(), slots.mean) / A(cols);
  A variance = 0;
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    x(k, j, v);
    const int left = elements<W, kAligned>(cols, j);
    for (int l = 0; l < W; ++l)
      if (l < left) variance += (v[l] * power - mean) * (v[l] * power - mean);
  });
  variance = team.reduce(variance, A(0), Sum<A>(), slots.variance) / A(cols);
  const A unit = c * power;
  const A rstd = 1 / sqrt(variance + A(a.eps) * unit * unit);
  if (team.rank == 0) {
    static_cast<A*>(norm.mean)[i] = mean / power;
    static_cast<A*>(norm.rstd)[i] = rstd * power;
  }
  return {power, mean, rstd};
}

}  // namespace
}  // namespace cogview::cuda
