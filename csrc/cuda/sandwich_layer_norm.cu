#include "sandwich_layer_norm.h"

#include "norm_row.cuh"

namespace cogview::cuda {
namespace {

constexpr int kThreads = 512;  // of a block at most: 128 registers each

// The largest magnitude that any thread of the grid has seen.
template <class A>
__device__ void publish(Bits<A> peak, void* to) {
  for (int d = 16; d > 0; d /= 2) peak = Largest<Bits<A>>()(peak, __shfl_xor_sync(~0u, peak, d));
  if (threadIdx.x % 32 == 0 && peak) atomicMax(static_cast<Bits<A>*>(to), peak);
}

// kPacks > 0: a thread keeps that many packs of W in registers, so memory is read once and written once. kPacks = 0:
// longer rows are read again in each pass, from cache.
template <class T, int W, int kPacks, bool kBranch>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  using A = Acc<T>;
  using J = Column<kPacks>;
  __shared__ Slots<A> slots;
  const RowTeam team(team_size);
  const J cols = a.cols;
  Bits<A> peak = 0;
  const bool emit = kBranch && a.relax == Relax::tensor && !a.x;
  for (int64_t i = team.row; i < rows; i += team.step) {
    RowPart<T, W, kPacks> h;
    T* h_row = row_of<T>(a.h, a.h_rows, i);
    A v[W], weight[W], bias[W];
    const auto normalise = [&](const Norm& norm, const Statistics<A>& s, J j) {
      load_weights<T>(norm.weight, j, a.wide_weights, weight);
      load_weights<T>(norm.bias, j, a.wide_weights, bias);
      for (int l = 0; l < W; ++l) v[l] = (v[l] * s.power - s.mean) * s.rstd * weight[l] + bias[l];
    };
    if constexpr (kBranch) {
      Branch<T, W, kPacks> branch;
      branch.read(team, row_of<T>(a.branch, a.branch_rows, i), cols);
      h.read(team, row_of<T>(a.residual, a.residual_rows, i), cols);
      branch.drop(a, team, i);
      A other[W];
      const auto dropped = [&](int k, J j, A(&x)[W]) {
        branch(k, j, x);
        branch.factors(a, i, k, j, other);
        for (int l = 0; l < W; ++l) x[l] *= other[l];
      };
      const Statistics<A> s = statistics<W, kPacks>(a, a.post, a.post_peak, i, team, slots, dropped);
      team.each_pack<W, kPacks>(cols, [&](int k, J j) {
        dropped(k, j, v);
        normalise(a.post, s, j);
        h(k, j, other);
        Pack<T, W>& sum = h.kept[k];
        for (int l = 0; l < W; ++l) {
          sum.at[l] = narrow<T>(other[l] + v[l]);
          if (emit) peak = Largest<Bits<A>>()(peak, magnitude(widen(sum.at[l])));
        }
        store(h_row + j, sum);
      });
      h.from = h_row;
    } else {
      h.read(team, h_row, cols);
    }
    if (!kBranch || a.x) {
      T* x_row = row_of<T>(a.x, a.x_rows, i);
      const Statistics<A> s = statistics<W, kPacks>(a, a.pre, a.pre_peak, i, team, slots, h);
      team.each_pack<W, kPacks>(cols, [&](int k, J j) {
        h(k, j, v);
        normalise(a.pre, s, j);
        Pack<T, W> out;
        for (int l = 0; l < W; ++l) out.at[l] = narrow<T>(v[l]);
        store(x_row + j, out);
      });
    }
  }
  if (emit) publish<A>(peak, a.pre_peak);
}

template <class T, int W, bool kBranch>
__global__ void __launch_bounds__(kThreads, 1)
    peaks(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  using A = Acc<T>;
  const RowTeam team(team_size);
  Bits<A> peak = 0;
  for (int64_t i = team.row; i < rows; i += team.step) {
    Branch<T, W, 0> part;
    part.read(team, kBranch ? row_of<T>(a.branch, a.branch_rows, i) : row_of<T>(a.h, a.h_rows, i), a.cols);
    team.each_pack<W, 0>(a.cols, [&](int k, int64_t j) {
      A v[W], factor[W];
      part(k, j, v);
      part.factors(a, i, k, j, factor);
      for (int l = 0; l < W; ++l) peak = Largest<Bits<A>>()(peak, magnitude(kBranch ? v[l] * factor[l] : v[l]));
    });
  }
  publish<A>(peak, kBranch ? a.post_peak : a.pre_peak);
}

// Sums over a block's rows of the gradients of weight and bias: in registers, or, kPacks = 0, in shared memory where
// they fit and in this block's row of the partial sums where not. Every thread has columns of its own.
template <class A, int W, int kPacks>
struct ParameterSums {
  A dweight[kPacks ? kPacks : 1][W] = {}, dbias[kPacks ? kPacks : 1][W] = {};
  A *weight_row, *bias_row;  // of the partial sums
  A *weight_memory, *bias_memory;

  __device__ ParameterSums(const Norm& norm, int64_t cols, const RowTeam& team, A* shared)
      : weight_row(static_cast<A*>(norm.dweight) + blockIdx.x * cols),
        bias_row(static_cast<A*>(norm.dbias) + blockIdx.x * cols),
        weight_memory(shared ? shared : weight_row),
        bias_memory(shared ? shared + cols : bias_row) {
    if constexpr (kPacks == 0)
      team.each_pack<W, 0>(cols, [&](int, int64_t j) {
        for (int l = 0; l < W; ++l) weight_memory[j + l] = bias_memory[j + l] = 0;
      });
  }
  __device__ void add(int k, Column<kPacks> j, const A (&dy)[W], const A (&y)[W]) {
    for (int l = 0; l < W; ++l) {
      (kPacks ? dweight[k][l] : weight_memory[j + l]) += dy[l] * y[l];
      (kPacks ? dbias[k][l] : bias_memory[j + l]) += dy[l];
    }
  }
  __device__ void write(Column<kPacks> cols, const RowTeam& team, A* shared) {
    if constexpr (kPacks > 0) {
      combine(cols, team, shared, dweight, weight_row);
      combine(cols, team, shared, dbias, bias_row);
    } else if (weight_memory != weight_row) {
      team.each_pack<W, 0>(cols, [&](int, int64_t j) {
        for (int l = 0; l < W; ++l) weight_row[j + l] = weight_memory[j + l], bias_row[j + l] = bias_memory[j + l];
      });
    }
  }

 private:
  // Teams of one block in their order.
  __device__ void combine(int cols, const RowTeam& team, A* shared, const A (&mine)[kPacks ? kPacks : 1][W], A* row) {
    const int teams = blockDim.x / team.size, number = threadIdx.x / team.size;
    for (int t = 0; t < teams; ++t) {
      if (number == t)
        team.each_pack<W, kPacks>(cols, [&](int k, int j) {
          for (int l = 0; l < W; ++l) {
            const A sum = t ? shared[j + l] + mine[k][l] : mine[k][l];
            (t + 1 < teams ? shared : row)[j + l] = sum;
          }
        });
      __syncthreads();
    }
  }
};

// Gradient through one norm: x, dy and each(k, j, gradient) by packs.
template <class T, int W, int kPacks, class A, class X, class DY, class F>
__device__ void norm_backward(const LayerNormArgs& a, const Norm& norm, int64_t i, const RowTeam& team,
                              ParameterSums<A, W, kPacks>& sums, A (&warps)[2][32], X x, DY dy, F each) {
  using J = Column<kPacks>;
  const J cols = a.cols;
  const A rstd = static_cast<const A*>(norm.rstd)[i], twice_rstd = rstd * 2;
  const A half_mean = static_cast<const A*>(norm.mean)[i] / 2;
  A y[W], d[W], weight[W];
  const auto see = [&](int k, J j) {
    x(k, j, y);
    dy(k, j, d);
    load_weights<T>(norm.weight, j, a.wide_weights, weight);
    // halves: the difference of two huge numbers does not overflow
    for (int l = 0; l < W; ++l) y[l] = (y[l] * A(0.5) - half_mean) * twice_rstd;
  };
  A total[2] = {};
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    see(k, j);
    sums.add(k, j, d, y);
    for (int l = 0; l < W; ++l) {
      total[0] += d[l] * weight[l];
      total[1] += d[l] * weight[l] * y[l];
    }
  });
  team.reduce(total, A(0), Sum<A>(), warps);
  const A mean_g = total[0] / A(cols), mean_gy = total[1] / A(cols);
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    see(k, j);
    for (int l = 0; l < W; ++l) d[l] = (d[l] * weight[l] - mean_g - y[l] * mean_gy) * rstd;
    each(k, j, d);
  });
}

template <class T, int W, int kPacks, bool kBranch>
__global__ void __launch_bounds__(kThreads, 1)
    backward(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  using A = Acc<T>;
  using J = Column<kPacks>;
  constexpr int kKept = kPacks ? kPacks : 1;
  __shared__ A warps[2][2][2][32];
  __shared__ A teams[kPacks ? 32 * kPacks * W : 1];
  extern __shared__ double memory[];
  A* const shared = kPacks == 0 && a.sums_in_shared ? reinterpret_cast<A*>(memory) : nullptr;
  const RowTeam team(team_size);
  const J cols = a.cols;
  ParameterSums<A, W, kPacks> pre(a.pre, cols, team, shared);
  ParameterSums<A, W, kPacks> post(kBranch ? a.post : a.pre, cols, team,
                                   shared && kBranch ? shared + 2 * cols : shared);
  int turn = 0;
  for (int64_t i = team.row; i < rows; i += team.step, turn ^= 1) {
    RowPart<T, W, kPacks> h, dx, dh;
    Branch<T, W, kPacks> branch;
    if (a.dx) {
      dx.read(team, row_of<T>(a.dx, a.dx_rows, i), cols);
      h.read(team, row_of<T>(static_cast<const void*>(a.h), a.h_rows, i), cols);
    }
    if (a.dh) dh.read(team, row_of<T>(a.dh, a.dh_rows, i), cols);
    if (kBranch) branch.read(team, row_of<T>(a.branch, a.branch_rows, i), cols);

    T* dresidual = row_of<T>(a.dresidual, a.dresidual_rows, i);
    // the gradient of h, not rounded: in registers, or in this block's row of the scratch
    A kept[kKept][W], *row = static_cast<A*>(a.scratch) + blockIdx.x * a.scratch_cols;
    const auto wide = [&](int k, J j, int l) -> A& { return kPacks ? kept[k][l] : row[j + l]; };
    const auto finish = [&](int k, J j, A(&d)[W]) {
      A other[W];
      if (a.dh) dh(k, j, other);
      Pack<T, W> out;
      for (int l = 0; l < W; ++l) {
        if (a.dh) d[l] += other[l];
        if (kBranch) wide(k, j, l) = d[l];
        out.at[l] = narrow<T>(d[l]);
      }
      store(dresidual + j, out);
    };
    if (a.dx) {
      norm_backward<T>(a, a.pre, i, team, pre, warps[0][turn], h, dx, finish);
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
      norm_backward<T>(
          a, a.post, i, team, post, warps[1][turn],
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
            Pack<T, W> out;
            for (int l = 0; l < W; ++l) out.at[l] = narrow<T>(d[l] * factor[l]);
            store(dbranch + j, out);
          });
    }
  }
  __syncthreads();
  pre.write(cols, team, teams);
  if (kBranch) post.write(cols, team, teams);
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
    for (int64_t block = part; block < blocks; block += kParts) sum += sums[block * a.cols + j];
  parts[part][column] = sum;
  __syncthreads();
  if (part > 0 || j >= a.cols) return;
  for (int p = 1; p < kParts; ++p) sum += parts[p][column];
  if (a.wide_weights)
    static_cast<A*>(to)[j] = sum;
  else
    static_cast<T*>(to)[j] = narrow<T>(sum);
}

// Of each tensor of a row, in a thread. What does not come in packs is read again in each pass, from cache.
constexpr int kForwardPacks = 4;
constexpr size_t kStaticShared = 2048;

template <class T>
bool wide_rows(const LayerNormArgs& a) {
  constexpr int W = kPackWidth<T>, size = sizeof(T);
  bool yes = a.cols % W == 0;
  const auto rows = [&](const void* data, const Rows& rows) { yes &= !data || aligned(data, rows, W, size); };
  rows(a.branch, a.branch_rows);
  rows(a.residual, a.residual_rows);
  rows(a.h, a.h_rows);
  rows(a.x, a.x_rows);
  rows(a.dh, a.dh_rows);
  rows(a.dx, a.dx_rows);
  rows(a.dresidual, a.dresidual_rows);
  rows(a.dbranch, a.dbranch_rows);
  for (const void* weight : {a.post.weight, a.post.bias, a.pre.weight, a.pre.bias})
    yes &= reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  return yes;
}

using Kernel = void (*)(LayerNormArgs, int64_t, int);

template <class T, bool kBranch>
Kernel forward_kernel(bool wide, bool fits) {
  if constexpr (kPackWidth<T> > 1) {
    if (wide) return fits ? forward<T, kPackWidth<T>, kForwardPacks, kBranch> : forward<T, kPackWidth<T>, 0, kBranch>;
  }
  return forward<T, 1, 0, kBranch>;
}

// One more pack where there is one norm only.
template <class T, bool kBranch>
constexpr int kBackwardPacks = sizeof(T) == 2 ? (kBranch ? 1 : 2) : (kBranch ? 2 : 4);

template <class T, bool kBranch>
Kernel backward_kernel(bool wide, bool fits) {
  if constexpr (kPackWidth<T> > 1) {
    if (wide)
      return fits ? backward<T, kPackWidth<T>, kBackwardPacks<T, kBranch>, kBranch>
                  : backward<T, kPackWidth<T>, 0, kBranch>;
  }
  return backward<T, 1, 0, kBranch>;
}

struct BackwardLaunch : RowLaunch {
  Kernel kernel;
  cudaError_t error = cudaSuccess;

  template <class T>
  BackwardLaunch(LayerNormArgs& a, int64_t rows, T)
      : RowLaunch(rows, a.cols, kPackWidth<T> * (a.branch ? kBackwardPacks<T, true> : kBackwardPacks<T, false>),
                  kThreads) {
    const bool wide = wide_rows<T>(a);
    kernel = a.branch ? backward_kernel<T, true>(wide, fits) : backward_kernel<T, false>(wide, fits);
    if (!wide || kPackWidth<T> == 1 || !fits) {  // sums in memory
      whole_blocks(rows);
      int device = 0, most = 0;
      error = cudaGetDevice(&device);
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      const size_t bytes = a.cols * (a.branch ? 4 : 2) * sizeof(Acc<T>);
      a.sums_in_shared = bytes + kStaticShared <= size_t(most);
      if (a.sums_in_shared) shared = bytes;
      if (error == cudaSuccess && bytes > 32768 && a.sums_in_shared)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    }
    if (error == cudaSuccess) error = persist(kernel);
  }
};

}  // namespace

cudaError_t layer_norm_peak(const LayerNormArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtype(a.dtype, [&](auto one) {
    using T = decltype(one);
    constexpr int W = kPackWidth<T>;
    const bool wide = wide_rows<T>(a);
    const auto kernel =
        a.branch ? (wide ? peaks<T, W, true> : peaks<T, 1, true>) : (wide ? peaks<T, W, false> : peaks<T, 1, false>);
    RowLaunch launch(rows, a.cols, 4 * W, kThreads);
    cudaError_t error = cudaMemsetAsync(a.branch ? a.post_peak : a.pre_peak, 0, sizeof(Acc<T>), stream);
    if (error == cudaSuccess) error = launch.persist(kernel);
    return error == cudaSuccess ? launch(kernel, a, rows, stream) : error;
  });
}

cudaError_t sandwich_layer_norm_fwd(const LayerNormArgs& a, int64_t rows, cudaStream_t stream) {
  return by_dtype(a.dtype, [&](auto one) {
    using T = decltype(one);
    const bool wide = wide_rows<T>(a);
    RowLaunch launch(rows, a.cols, kForwardPacks * kPackWidth<T>, kThreads);
    const Kernel kernel =
        a.branch ? forward_kernel<T, true>(wide, launch.fits) : forward_kernel<T, false>(wide, launch.fits);
    cudaError_t error = launch.persist(kernel);
    if (error == cudaSuccess && a.relax == Relax::tensor && !a.x)
      error = cudaMemsetAsync(a.pre_peak, 0, sizeof(Acc<T>), stream);
    return error == cudaSuccess ? launch(kernel, a, rows, stream) : error;
  });
}

cudaError_t sandwich_layer_norm_bwd_blocks(const LayerNormArgs& args, int64_t rows, int64_t* blocks) {
  return by_dtype(args.dtype, [&](auto one) {
    LayerNormArgs a = args;
    const BackwardLaunch launch(a, rows, one);
    *blocks = launch.blocks;
    return launch.error;
  });
}

cudaError_t sandwich_layer_norm_bwd(const LayerNormArgs& args, int64_t rows, cudaStream_t stream) {
  return by_dtype(args.dtype, [&](auto one) {
    using T = decltype(one);
    LayerNormArgs a = args;
    const BackwardLaunch launch(a, rows, one);
    cudaError_t error = launch.error == cudaSuccess ? launch(launch.kernel, a, rows, stream) : launch.error;
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>((a.cols + kColumns - 1) / kColumns), a.branch ? 4 : 2);
    total<T><<<grid, kColumns * kParts, 0, stream>>>(a, launch.blocks);
    return cudaGetLastError();
  });
}

}  // namespace cogview::cuda
