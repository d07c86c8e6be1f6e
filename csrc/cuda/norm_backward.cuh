// The backward of LayerNorm, RMSNorm and the step of a transformer, a row for each team of threads.
//
// Memory. As of the forward. Reads dh, dx, h, branch, mean and rstd; writes dresidual, dbranch and drow_scale; each
// block adds up the gradients of weights and biases over its rows in shared memory and writes them to its own row of
// the partial sums, which `total` adds up in their order. What a step lacks is neither read nor written.
#pragma once

#include "norm_row.cuh"

namespace cogview::cuda {
namespace {

// Sums over a team's rows of the gradients of one norm's weight and bias: not in registers, which leaves room for three
// blocks on a multiprocessor. Every thread has columns of its own. kPacks > 0: places of its own in shared memory, at
// constant distances, where the 16 bytes of a warp's lanes lie side by side. kPacks = 0: rows in shared memory, or this
// block's rows of the partial sums.
template <class A, int W, int kPacks, bool kBranch, bool kRms>
struct ParameterSums {
  static constexpr int P = W * sizeof(A) > 16 ? 16 / sizeof(A) : W;  // elements of an access
  static constexpr int kEach = kRms ? 1 : 2, kRow = W * 32, kAll = (kBranch ? 2 : 1) * kEach * kRow;
  using J = Column<kPacks>;
  A *dweight, *dbias;

  // `memory` is this team's if kPacks = 0, else the block's.
  __device__ ParameterSums(const LayerNormArgs& a, const Norm& norm, A* memory, bool post) {
    if constexpr (kPacks > 0) {
      dweight = memory + place(threadIdx.x) + (post ? kEach * kRow : 0);
      dbias = dweight + kRow;
    } else {
      dweight = memory ? memory + (post ? kEach * a.scratch_cols : 0) : partial(a, norm.dweight);
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
    for (int q = 0; q < W; q += P) {
      at(dweight, k, j, q / P) = Pack<A, P>::of(zeros);
      if constexpr (!kRms) at(dbias, k, j, q / P) = Pack<A, P>::of(zeros);
    }
  }
  __device__ void add(int k, J j, const A (&dy)[W], const A (&y)[W]) {
    for (int q = 0; q < W; q += P) {
      A weight[P], bias[P];
      at(dweight, k, j, q / P).to(weight);
      for (int l = 0; l < P; ++l) weight[l] += dy[q + l] * y[q + l];
      at(dweight, k, j, q / P) = Pack<A, P>::of(weight);
      if constexpr (!kRms) {
        at(dbias, k, j, q / P).to(bias);
        for (int l = 0; l < P; ++l) bias[l] += dy[q + l];
        at(dbias, k, j, q / P) = Pack<A, P>::of(bias);
      }
    }
  }
  // By the first team of a block, the sums of its teams in their order. They are `next` elements apart.
  __device__ void write(const LayerNormArgs& a, const Norm& norm, const RowTeam& team, int64_t next) const {
    const int thread = threadIdx.x, teams = blockDim.x / team.size;
    if (thread >= team.size) return;
#pragma unroll 1
    for (int which = 0; which < kEach; ++which)
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
    mean = norm.mean ? static_cast<const A*>(norm.mean)[i] : 0;
    rstd = static_cast<const A*>(norm.rstd)[i];
  }
  template <bool kRms>
  __device__ A normalised(A x) const {
    // halves: the difference of two huge numbers does not overflow
    return kRms ? x * rstd : (x * A(0.5) - mean / 2) * (rstd * 2);
  }
};

// Gradient through one norm: x, dy and each(k, j, gradient) by packs.
template <class T, bool kAligned, int kPacks, bool kBranch, bool kRms, int W, class A, class X, class DY, class F>
__device__ void norm_backward(const LayerNormArgs& a, const Norm& norm, const Moments<A>& at, const RowTeam& team,
                              ParameterSums<A, W, kPacks, kBranch, kRms>& sums, WarpValues<A> (&warps)[2], X x, DY dy,
                              F each) {
  using J = Column<kPacks>;
  constexpr int kKept = kPacks ? kPacks : 1;
  const J cols = a.cols;
  A y[kKept][W], g[kKept][W], d[W];
  const auto see = [&](int k, J j) {
    A weight[W];
    x(k, j, y[k]);
    dy(k, j, d);
    load_weights<T, kAligned>(norm.weight, j, elements<W, kAligned>(cols, j), a.wide_weights, weight);
    for (int l = 0; l < W; ++l) {
      y[k][l] = at.template normalised<kRms>(y[k][l]);
      // nothing behind the row, where d may be something
      g[k][l] = l < elements<W, kAligned>(cols, j) ? d[l] * (weight[l] + A(a.weight_offset)) : A(0);
    }
  };
  A total[2] = {};
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    see(k, j);
    sums.add(k, j, d, y[k]);
    for (int l = 0; l < W; ++l) {
      if (!kRms) total[0] += g[k][l];
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

template <class T, class R, bool kAligned, int kPacks, bool kBranch, bool kRms>
__global__ void __launch_bounds__(kThreads, 1)
    backward(const __grid_constant__ LayerNormArgs a, int64_t rows, int team_size) {
  constexpr int W = kPackWidth<R>, kKept = kPacks ? kPacks : 1;
  using A = Acc<T>;
  using J = Column<kPacks>;
  __shared__ WarpValues<A> warps[2][2][2], row_warps[2][1];
  const RowTeam team(team_size);
  const J cols = a.cols;
  // of a team: sums, and a gradient that is not rounded
  constexpr int kTeamRows = (kBranch ? 2 : 1) * (kRms ? 1 : 2) + 1;
  A* memory = kPacks || a.sums_in_shared ? static_cast<A*>(dynamic_shared()) : nullptr;
  if (kPacks == 0 && memory) memory += threadIdx.x / team.size * kTeamRows * a.scratch_cols;
  ParameterSums<A, W, kPacks, kBranch, kRms> pre(a, a.pre, memory, false),
      post(a, kBranch ? a.post : a.pre, memory, kBranch);
  team.each_pack<W, kPacks>(cols, [&](int k, J j) {
    if (a.pre.dweight) pre.clear(k, j);
    if (kBranch && a.post.dweight) post.clear(k, j);
  });
  A* const row = kPacks == 0 && memory ? memory + (kTeamRows - 1) * a.scratch_cols
                                       : static_cast<A*>(a.scratch) + blockIdx.x * a.scratch_cols;
  int turn = 0;
  for (int64_t i = team.row; i < rows; i += team.step, turn ^= 1) {
    RowPart<R, W, kAligned, kPacks> h, dh;
    RowPart<T, W, kAligned, kPacks> dx;
    Branch<T, W, kAligned, kPacks> branch(a, i);
    Moments<A> pre_moments, post_moments;
    if (a.dx) {
      dx.read(team, row_of<T>(a.dx, a.dx_rows, i), cols);
      h.read(team, row_of<R>(static_cast<const void*>(a.h), a.h_rows, i), cols);
      pre_moments.read(a.pre, i);
    }
    if (a.dh) dh.read(team, row_of<R>(a.dh, a.dh_rows, i), cols);
    if (kBranch && a.branch) branch.read(team, row_of<T>(a.branch, a.branch_rows, i), cols);
    if (kBranch && a.post.weight) post_moments.read(a.post, i);
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
      if (a.dh) fetch(row_of<R>(a.dh, a.dh_rows, following));
      if (kBranch && a.branch) fetch(row_of<T>(a.branch, a.branch_rows, following));
    }

    R* dresidual = row_of<R>(a.dresidual, a.dresidual_rows, i);
    // the gradient of h, not rounded: in registers, or in shared memory or this block's row of the scratch
    A kept[kKept][W];
    const auto wide = [&](int k, J j, int l) -> A& { return kPacks ? kept[k][l] : row[j + l]; };
    const auto finish = [&](int k, J j, A(&d)[W]) {
      A other[W];
      if (a.dh) dh(k, j, other);
      for (int l = 0; l < W; ++l) {
        if (a.dh) d[l] += other[l];
        if (kBranch) wide(k, j, l) = d[l];
      }
      if (!kBranch || a.dresidual) store<kAligned>(dresidual + j, narrow<R>(d), elements<W, kAligned>(cols, j));
    };
    if (a.dx) {
      norm_backward<T, kAligned, kPacks, kBranch, kRms>(a, a.pre, pre_moments, team, pre, warps[0][turn], h, dx,
                                                        finish);
    } else {
      team.each_pack<W, kPacks>(cols, [&](int k, J j) {
        A none[W] = {};
        finish(k, j, none);
      });
    }
    if constexpr (kBranch) {
      branch.drop(a, team, i);
      T* dbranch = row_of<T>(a.dbranch, a.dbranch_rows, i);
      const bool before = a.dropout && !a.dropout_after_norm;
      const A scale = row_scale<A>(a, i);
      A factor[W];
      const auto dropped = [&](int k, J j, A(&x)[W]) {
        branch(k, j, x);
        if (!before) return;
        branch.factors(a, i, k, j, factor);
        for (int l = 0; l < W; ++l) x[l] *= factor[l];
      };
      // the gradient of what is scaled, times `by`
      const auto gradient = [&](int k, J j, A(&d)[W], A by) {
        for (int l = 0; l < W; ++l) d[l] = wide(k, j, l) * by;
        if (!a.dropout_after_norm) return;
        branch.factors(a, i, k, j, factor);
        for (int l = 0; l < W; ++l) d[l] *= factor[l];
      };
      if (kPacks == 0 && a.drow_scale) {  // beside kept rows it takes too many registers
        A sum = 0, x[W], d[W], other[W];
        team.each_pack<W, kPacks>(cols, [&](int k, J j) {
          const int left = elements<W, kAligned>(cols, j);
          dropped(k, j, x);
          if (a.post.weight) {
            load_weights<T, kAligned>(a.post.weight, j, left, a.wide_weights, other);
            for (int l = 0; l < W; ++l)
              x[l] = post_moments.template normalised<kRms>(x[l]) * (other[l] + A(a.weight_offset));
            if constexpr (!kRms) {
              load_weights<T, kAligned>(a.post.bias, j, left, a.wide_weights, other);
              for (int l = 0; l < W; ++l) x[l] += other[l];
            }
          }
          gradient(k, j, d, A(a.branch_scale));
          for (int l = 0; l < W; ++l)
            if (l < left) sum += d[l] * x[l];
        });
        sum = team.reduce(sum, A(0), Sum<A>(), row_warps[turn]);
        if (team.rank == 0) static_cast<A*>(a.drow_scale)[i] = sum;
      }
      const auto finish_branch = [&](int k, J j, A(&d)[W]) {
        if (before) {
          branch.factors(a, i, k, j, factor);
          for (int l = 0; l < W; ++l) d[l] *= factor[l];
        }
        store<kAligned>(dbranch + j, narrow<T>(d), elements<W, kAligned>(cols, j));
      };
      const auto scaled = [&](int k, J j, A(&d)[W]) { gradient(k, j, d, scale); };
      if (a.post.weight) {
        norm_backward<T, kAligned, kPacks, kBranch, kRms>(a, a.post, post_moments, team, post, warps[1][turn], dropped,
                                                          scaled, finish_branch);
      } else {
        team.each_pack<W, kPacks>(cols, [&](int k, J j) {
          A d[W];
          scaled(k, j, d);
          finish_branch(k, j, d);
        });
      }
    }
  }
  __syncthreads();
  if (kPacks == 0 && !memory) return;  // that is where they are
  if (a.pre.dweight) pre.write(a, a.pre, team, kTeamRows * a.scratch_cols);
  if (kBranch && a.post.dweight) post.write(a, a.post, team, kTeamRows * a.scratch_cols);
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
  if (!to) return;
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

}  // namespace
}  // namespace cogview::cuda
