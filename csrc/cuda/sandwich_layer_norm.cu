// LayerNorm and the fused Sandwich-LN step, a row for each team of threads.
//
// Memory. Rows lie at any offsets, their elements beside each other; parameters and statistics are contiguous. Where
// rows are aligned to packs, they are read and written a pack at a time, else an element. While a row stays in
// registers, everything is read once and written once; longer rows are read again in each pass, mostly from cache.
//   forward   reads branch and residual; writes h, x, mean and rstd of each norm, and with a tensor's peak the largest
//             magnitude by atomicMax, which no order changes.
//   backward  reads dh, dx, h, branch, mean and rstd; writes dresidual and dbranch; each block adds up the gradients of
//             weights and biases over its rows in shared memory and writes them to its own row of the partial sums,
//             which `total` adds up in their order.
#include "sandwich_layer_norm.h"

#include "norm_row.cuh"

namespace cogview::cuda {
namespace {

constexpr int kThreads = 512;  // of a block at most: 128 registers each

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
template <class T, class R, bool kAligned, int kPacks, bool kBranch>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  constexpr int W = kPackWidth<R>;
  using A = Acc<T>;
  using J = Column<kPacks>;
  __shared__ Slots<A> slots;
  const RowTeam team(team_size);
  const J cols = a.cols;
  Bits<A> peak = 0;
  const bool emit = kBranch && a.relax == Relax::tensor && !a.x;
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
  const auto normalise = [&](const Norm& norm, const Statistics<A>& s, J j) {
    const int left = elements<W, kAligned>(cols, j);
    load_weights<T, kAligned>(norm.weight, j, left, a.wide_weights, weight);
    load_weights<T, kAligned>(norm.bias, j, left, a.wide_weights, bias);
    for (int l = 0; l < W; ++l) v[l] = (v[l] * s.power - s.mean) * s.rstd * weight[l] + bias[l];
  };
  if constexpr (kBranch) {
    Branch<T, W, kAligned, kPacks> branch;
    branch.read(team, row_of<T>(a.branch, a.branch_rows, i), cols);
    h.read(team, row_of<R>(a.residual, a.residual_rows, i), cols);
    branch.drop(a, team, i);
    A other[W];
    const auto dropped = keep([&](int k, J j, A(&x)[W]) {
      branch(k, j, x);
      branch.factors(a, i, k, j, other);
      for (int l = 0; l < W; ++l) x[l] *= other[l];
    });
    const Statistics<A> s = statistics<W, kAligned, kPacks>(a, a.post, a.post_peak, i, team, slots, dropped);
    team.each_pack<W, kPacks>(cols, [&](int k, J j) {
      dropped(k, j, v);
      normalise(a.post, s, j);
      h(k, j, other);
      for (int l = 0; l < W; ++l) v[l] += other[l];
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
    const Statistics<A> s = statistics<W, kAligned, kPacks>(a, a.pre, a.pre_peak, i, team, slots, whole);
    team.each_pack<W, kPacks>(cols, [&](int k, J j) {
      whole(k, j, v);
      normalise(a.pre, s, j);
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
    Branch<T, W, kAligned, 0> part;
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

// Sums over a team's rows of the gradients of one norm's weight and bias: not in registers, which leaves room for three
// blocks on a multiprocessor. Every thread has columns of its own. kPacks > 0: places of its own in shared memory, at
// constant distances, where the 16 bytes of a warp's lanes lie side by side. kPacks = 0: rows in shared memory, or this
// block's rows of the partial sums.
template <class A, int W, int kPacks, bool kBranch>
struct ParameterSums {
  static constexpr int P = W * sizeof(A) > 16 ? 16 / sizeof(A) : W;  // elements of an access
  static constexpr int kRow = W * 32, kAll = (kBranch ? 4 : 2) * kRow;
  using J = Column<kPacks>;
  A *dweight, *dbias;

  // `memory` is this team's if kPacks = 0, else the block's.
  __device__ ParameterSums(const LayerNormArgs& a, const Norm& norm, A* memory, bool post) {
    if constexpr (kPacks > 0) {
      dweight = memory + place(threadIdx.x) + (post ? 2 * kRow : 0);
      dbias = dweight + kRow;
    } else {
      dweight = memory ? memory + (post ? 2 * a.scratch_cols : 0) : partial(a, norm.dweight);
      dbias = memory ? dweight + a.scratch_cols : partial(a, norm.dbias);
    }
  }
  static __device__ int place(int thread) { return thread / 32 * (kPacks * kAll) + thread % 32 * P; }
  // This block's row of partial sums.
  static __device__ A* partial(const LayerNormArgs& a, void* sums) {
    return static_cast<A*>(sums) + blockIdx.x * a.scratch_cols;
  }
  // Whole packs: in single elements the lanes' would be four to a bank.
  static __device__ Pack<A, P>& at(A* row, int k, J j, int q) {
    return *reinterpret_cast<Pack<A, P>*>(row + (kPacks ? k * kAll + q * 32 * P : j + q * P));
  }
  __device__ void clear(int k, J j) {
    const A zeros[P] = {};
    for (int q = 0; q < W; q += P) at(dweight, k, j, q / P) = at(dbias, k, j, q / P) = Pack<A, P>::of(zeros);
  }
  __device__ void add(int k, J j, const A (&dy)[W], const A (&y)[W]) {
    for (int q = 0; q < W; q += P) {
      A weight[P], bias[P];
      at(dweight, k, j, q / P).to(weight);
      at(dbias, k, j, q / P).to(bias);
      for (int l = 0; l < P; ++l) {
        weight[l] += dy[q + l] * y[q + l];
        bias[l] += dy[q + l];
      }
      at(dweight, k, j, q / P) = Pack<A, P>::of(weight);
      at(dbias, k, j, q / P) = Pack<A, P>::of(bias);
    }
  }
  // By the first team of a block, the sums of its teams in their order. They are `next` elements apart.
  __device__ void write(const LayerNormArgs& a, const Norm& norm, const RowTeam& team, int64_t next) const {
    const int thread = threadIdx.x, teams = blockDim.x / team.size;
    if (thread >= team.size) return;
#pragma unroll 1
    for (int which = 0; which < 2; ++which)
      team.each_pack<W, kPacks>(static_cast<J>(a.cols), [&](int k, J j) {
        for (int q = 0; q < W; q += P) {
          A* mine = which ? dbias : dweight;
          A sum[P], more[P];
          at(mine, k, j, q / P).to(sum);
#pragma unroll 1
          for (int t = 1; t < teams; ++t) {
            at(mine + (kPacks ? place(thread + t * team.size) - place(thread) : t * next), k, j, q / P).to(more);
            for (int l = 0; l < P; ++l) sum[l] += more[l];
          }
          store(partial(a, which ? norm.dbias : norm.dweight) + j + q, Pack<A, P>::of(sum));
        }
      });
  }
};

// Statistics of a norm at one row.
template <class A>
struct Moments {
  A mean, rstd;

  __device__ void read(const Norm& norm, int64_t i) {
    mean = static_cast<const A*>(norm.mean)[i];
    rstd = static_cast<const A*>(norm.rstd)[i];
  }
};

// Gradient through one norm: x, dy and each(k, j, gradient) by packs.
template <class T, bool kAligned, int kPacks, bool kBranch, int W, class A, class X, class DY, class F>
__device__ void norm_backward(const LayerNormArgs& a, const Norm& norm, const Moments<A>& at, const RowTeam& team,
                              ParameterSums<A, W, kPacks, kBranch>& sums, WarpValues<A> (&warps)[2], X x, DY dy,
                              F each) {
  using J = Column<kPacks>;
  constexpr int kKept = kPacks ? kPacks : 1;
  const J cols = a.cols;
  const A half_mean = at.mean / 2, twice_rstd = at.rstd * 2;
  A y[kKept][W], g[kKept][W], d[W];
  const auto see = [&](int k, J j) {
    A weight[W];
    x(k, j, y[k]);
    dy(k, j, d);
    load_weights<T, kAligned>(norm.weight, j, elements<W, kAligned>(cols, j), a.wide_weights, weight);
    for (int l = 0; l < W; ++l) {
      // halves: the difference of two huge numbers does not overflow
      y[k][l] = (y[k][l] * A(0.5) - half_mean) * twice_rstd;
      g[k][l] = d[l] * weight[l];
    }
  };
  A total[2] = {};
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    see(k, j);
    sums.add(k, j, d, y[k]);
    for (int l = 0; l < W; ++l) {
      total[0] += g[k][l];
      total[1] += g[k][l] * y[k][l];
    }
  });
  team.reduce(total, A(0), Sum<A>(), warps);
  const A mean_g = total[0] / A(cols), mean_gy = total[1] / A(cols);
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    if (kPacks == 0) see(k, j);
    for (int l = 0; l < W; ++l) d[l] = (g[k][l] - mean_g - y[k][l] * mean_gy) * at.rstd;
    each(k, j, d);
  });
}

template <class T, class R, bool kAligned, int kPacks, bool kBranch>
__global__ void __launch_bounds__(kThreads, 1)
    backward(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  constexpr int W = kPackWidth<R>, kKept = kPacks ? kPacks : 1;
  using A = Acc<T>;
  using J = Column<kPacks>;
  __shared__ WarpValues<A> warps[2][2][2];
  const RowTeam team(team_size);
  const J cols = a.cols;
  // of a team: sums, and a gradient that is not rounded
  constexpr int kTeamRows = (kBranch ? 4 : 2) + 1;
  A* memory = kPacks || a.sums_in_shared ? static_cast<A*>(dynamic_shared()) : nullptr;
  if (kPacks == 0 && memory) memory += threadIdx.x / team.size * kTeamRows * a.scratch_cols;
  ParameterSums<A, W, kPacks, kBranch> pre(a, a.pre, memory, false), post(a, kBranch ? a.post : a.pre, memory, kBranch);
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    pre.clear(k, j);
    if (kBranch) post.clear(k, j);
  });
  A* const row = kPacks == 0 && memory ? memory + (kTeamRows - 1) * a.scratch_cols
                                       : static_cast<A*>(a.scratch) + blockIdx.x * a.scratch_cols;
  int turn = 0;
  for (int64_t i = team.row; i < rows; i += team.step, turn ^= 1) {
    RowPart<R, W, kAligned, kPacks> h, dh;
    RowPart<T, W, kAligned, kPacks> dx;
    Branch<T, W, kAligned, kPacks> branch;
    Moments<A> pre_moments, post_moments;
    if (a.dx) {
      dx.read(team, row_of<T>(a.dx, a.dx_rows, i), cols);
      h.read(team, row_of<R>(static_cast<const void*>(a.h), a.h_rows, i), cols);
      pre_moments.read(a.pre, i);
    }
    if (kBranch && a.dh) dh.read(team, row_of<R>(a.dh, a.dh_rows, i), cols);
    if (kBranch) {
      branch.read(team, row_of<T>(a.branch, a.branch_rows, i), cols);
      post_moments.read(a.post, i);
    }
    // the next row comes as far as L2 meanwhile, where it takes no registers
    const int64_t following = i + team.step;
    if (kPacks > 0 && following < rows) {
      const auto fetch = [&](const auto* row) {
        team.each_pack<W, kPacks>(cols, [&](int, J j) { prefetch(row + j); });
      };
      if (a.dx) {
        fetch(row_of<T>(a.dx, a.dx_rows, following));
        fetch(row_of<R>(static_cast<const void*>(a.h), a.h_rows, following));
      }
      if (kBranch && a.dh) fetch(row_of<R>(a.dh, a.dh_rows, following));
      if (kBranch) fetch(row_of<T>(a.branch, a.branch_rows, following));
    }

    R* dresidual = row_of<R>(a.dresidual, a.dresidual_rows, i);
    // the gradient of h, not rounded: in registers, or in shared memory or this block's row of the scratch
    A kept[kKept][W];
    const auto wide = [&](int k, J j, int l) -> A& { return kPacks ? kept[k][l] : row[j + l]; };
    const auto finish = [&](int k, J j, A(&d)[W]) {
      A other[W];
      if (kBranch && a.dh) dh(k, j, other);
      for (int l = 0; l < W; ++l) {
        if (kBranch && a.dh) d[l] += other[l];
        if (kBranch) wide(k, j, l) = d[l];
      }
      store<kAligned>(dresidual + j, narrow<R>(d), elements<W, kAligned>(cols, j));
    };
    if (a.dx) {
      norm_backward<T, kAligned, kPacks, kBranch>(a, a.pre, pre_moments, team, pre, warps[0][turn], h, dx, finish);
    } else {
      team.each_pack<W, kPacks>(cols, [&](int k, J j) {
        A none[W] = {};
        finish(k, j, none);
      });
    }
    if constexpr (kBranch) {
      branch.drop(a, team, i);
      T* dbranch = row_of<T>(a.dbranch, a.dbranch_rows, i);
      A factor[W];
      norm_backward<T, kAligned, kPacks, kBranch>(
          a, a.post, post_moments, team, post, warps[1][turn],
          [&](int k, J j, A(&x)[W]) {
            branch(k, j, x);
            branch.factors(a, i, k, j, factor);
            for (int l = 0; l < W; ++l) x[l] *= factor[l];
          },
          [&](int k, J j, A(&d)[W]) {
            for (int l = 0; l < W; ++l) d[l] = wide(k, j, l);
          },
          [&](int k, J j, A(&d)[W]) {
            branch.factors(a, i, k, j, factor);
            for (int l = 0; l < W; ++l) d[l] *= factor[l];
            store<kAligned>(dbranch + j, narrow<T>(d), elements<W, kAligned>(cols, j));
          });
    }
  }
  __syncthreads();
  if (kPacks == 0 && !memory) return;  // that is where they are
  pre.write(a, a.pre, team, kTeamRows * a.scratch_cols);
  if (kBranch) post.write(a, a.post, team, kTeamRows * a.scratch_cols);
}

// The blocks' sums, added up in a fixed order; weight and bias of one norm or of two.
constexpr int kColumns = 32, kParts = 16;

template <class T>
__global__ void __launch_bounds__(kColumns* kParts) total(const __grid_constant__ LayerNormArgs a, int64_t blocks) {
  using A = Acc<T>;
  __shared__ A parts[kParts][kColumns];
  const int part = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const int64_t j = int64_t(blockIdx.x) * kColumns + column;
  const Norm& norm = blockIdx.y < 2 ? a.pre : a.post;
  const A* sums = static_cast<const A*>(blockIdx.y % 2 ? norm.dbias : norm.dweight);
  void* const to =
      blockIdx.y < 2 ? (blockIdx.y ? a.dpre_bias : a.dpre_weight) : (blockIdx.y == 2 ? a.dpost_weight : a.dpost_bias);
  A sum = 0;
  if (j < a.cols)
    for (int64_t block = part; block < blocks; block += kParts) sum += sums[block * a.scratch_cols + j];
  parts[part][column] = sum;
  __syncthreads();
  if (part > 0 || j >= a.cols) return;
  for (int p = 1; p < kParts; ++p) sum += parts[p][column];
  if (a.wide_weights)
    static_cast<A*>(to)[j] = sum;
  else
    static_cast<T*>(to)[j] = narrow<T>(sum);
}

// Of each tensor of a row in a thread, as many as registers allow.
constexpr int kForwardPacks = 5, kBackwardPacks = 2;

using Kernel = void (*)(LayerNormArgs, int64_t, int);

// What is not aligned is read again in each pass.
template <class T, class R, bool kBranch>
Kernel forward_kernel(bool aligned, bool fits) {
  if (!aligned) return forward<T, R, kPackWidth<R> == 1, 0, kBranch>;
  return fits ? forward<T, R, true, kForwardPacks, kBranch> : forward<T, R, true, 0, kBranch>;
}
template <class T, class R, bool kBranch>
Kernel backward_kernel(bool aligned, bool fits) {
  if (!aligned) return backward<T, R, kPackWidth<R> == 1, 0, kBranch>;
  return fits ? backward<T, R, true, kBackwardPacks, kBranch> : backward<T, R, true, 0, kBranch>;
}
template <class T, bool kBranch>
Kernel peak_kernel(bool aligned) {
  return aligned ? peaks<T, true, kBranch> : peaks<T, kPackWidth<T> == 1, kBranch>;
}

// To packs of W elements.
template <int W, class T, class R>
bool all_aligned(const LayerNormArgs& a) {
  bool yes = a.cols % W == 0;
  const auto rows = [&](const void* data, const Rows& rows, int size) { yes &= !data || aligned(data, rows, W, size); };
  rows(a.branch, a.branch_rows, sizeof(T));
  rows(a.residual, a.residual_rows, sizeof(R));
  rows(a.h, a.h_rows, sizeof(R));
  rows(a.x, a.x_rows, sizeof(T));
  rows(a.dh, a.dh_rows, sizeof(R));
  rows(a.dx, a.dx_rows, sizeof(T));
  rows(a.dresidual, a.dresidual_rows, sizeof(R));
  rows(a.dbranch, a.dbranch_rows, sizeof(T));
  for (const void* weight : {a.post.weight, a.post.bias, a.pre.weight, a.pre.bias})
    yes &= reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  return yes;
}

struct BackwardLaunch : RowLaunch {
  Kernel kernel;
  cudaError_t error = cudaSuccess;

  template <class T, class R>
  BackwardLaunch(LayerNormArgs& a, int64_t rows, T, R)
      : RowLaunch(rows, a.cols, kPackWidth<R> * kBackwardPacks, kThreads) {
    constexpr int W = kPackWidth<R>;
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    constexpr size_t kOther = 4096;  // the kernel's own
    const bool aligned = all_aligned<W, T, R>(a);
    const int sums = a.branch ? 4 : 2;
    const size_t kept = threads * size_t(sums) * kBackwardPacks * W * sizeof(Acc<T>);
    const size_t whole = threads / team * (sums + 1) * a.scratch_cols * sizeof(Acc<T>);
    fits = fits && aligned && kept + kOther <= size_t(most);
    a.sums_in_shared = fits || whole + kOther <= size_t(most);
    shared = fits ? kept : a.sums_in_shared ? whole : 0;
    kernel = a.branch ? backward_kernel<T, R, true>(aligned, fits) : backward_kernel<T, T, false>(aligned, fits);
    if (error == cudaSuccess && shared)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error == cudaSuccess) error = persist(kernel);
  }
};

// Calls f with a value of each of the two types.
template <class F>
cudaError_t by_dtypes(const LayerNormArgs& a, F f) {
  return by_dtype(a.dtype, [&](auto x) {
    if constexpr (sizeof x == 2)
      if (a.residual_dtype == Dtype::f32) return f(x, float{});
    return f(x, x);
  });
}

}  // namespace

cudaError_t layer_norm_peak(const LayerNormArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtype(a.dtype, [&](auto one) {
    using T = decltype(one);
    RowLaunch launch(rows, a.cols, 4 * kPackWidth<T>, kThreads);
    const bool aligned = all_aligned<kPackWidth<T>, T, T>(a);
    const Kernel kernel = a.branch ? peak_kernel<T, true>(aligned) : peak_kernel<T, false>(aligned);
    cudaError_t error = cudaMemsetAsync(a.branch ? a.post_peak : a.pre_peak, 0, sizeof(Acc<T>), stream);
    if (error == cudaSuccess) error = launch.persist(kernel);
    return error == cudaSuccess ? launch(kernel, a, rows, stream) : error;
  });
}

cudaError_t sandwich_layer_norm_fwd(const LayerNormArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtypes(a, [&](auto one, auto other) {
    using T = decltype(one);
    using R = decltype(other);
    RowLaunch launch(rows, a.cols, kForwardPacks * kPackWidth<R>, kThreads);
    const bool aligned = all_aligned<kPackWidth<R>, T, R>(a), fits = launch.fits;
    const Kernel kernel =
        a.branch ? forward_kernel<T, R, true>(aligned, fits) : forward_kernel<T, R, false>(aligned, fits);
    cudaError_t error = cudaSuccess;
    if (a.relax == Relax::tensor && !a.x) error = cudaMemsetAsync(a.pre_peak, 0, sizeof(Acc<T>), stream);
    return error == cudaSuccess ? launch(kernel, a, rows, stream) : error;
  });
}

cudaError_t sandwich_layer_norm_bwd_blocks(const LayerNormArgs& args, int64_t rows, int64_t* blocks) {
  return by_dtypes(args, [&](auto one, auto other) {
    LayerNormArgs a = args;
    const BackwardLaunch launch(a, rows, one, other);
    *blocks = launch.blocks;
    return launch.error;
  });
}

cudaError_t sandwich_layer_norm_bwd(const LayerNormArgs& args, int64_t rows, cudaStream_t stream) {
  return by_dtypes(args, [&](auto one, auto other) {
    using T = decltype(one);
    LayerNormArgs a = args;
    const BackwardLaunch launch(a, rows, one, other);
    const cudaError_t error = launch.error == cudaSuccess ? launch(launch.kernel, a, rows, stream) : launch.error;
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>((a.cols + kColumns - 1) / kColumns), a.dpost_weight ? 4 : 2);
    return start(total<T>, grid, kColumns * kParts, 0, stream, a, launch.blocks);
  });
}

}  // namespace cogview::cuda
