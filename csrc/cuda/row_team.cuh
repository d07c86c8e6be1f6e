// Rows by teams: 4 to 32 threads of a warp, or a whole block, share one row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "../rows.h"
#include "launch.cuh"

namespace cogview::cuda {

constexpr int kMinTeam = 4;

// Kept rows are short.
template <int kPacks>
using Column = std::conditional_t<kPacks == 0, int64_t, int>;

// A number of each warp of a block, in shared memory.
template <class V>
struct alignas(16) WarpValues {
  V of[32 + 3];
};

struct RowTeam {
  int size, rank;
  int64_t row, step;  // this team's first row, and how many rows on its next one is

  __device__ explicit RowTeam(int size)
      : size(size),
        rank(threadIdx.x % size),
        row(int64_t(blockIdx.x) * (blockDim.x / size) + threadIdx.x / size),
        step(int64_t(gridDim.x) * (blockDim.x / size)) {}

  // op over all values of the team, each x on its own, the same bits in every thread. `warps` is shared memory that was
  // not used by the reduction before this one: its slower threads may still read there.
  template <int N, class V, class Op>
  __device__ void reduce(V (&x)[N], V identity, Op op, WarpValues<V> (&warps)[N]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (size < 32) {  // teams of one warp may be at different rows
      const unsigned lanes = ((1u << size) - 1) << (lane & ~(size - 1));
      for (int d = size / 2; d > 0; d /= 2)
        for (int i = 0; i < N; ++i) x[i] = op(x[i], __shfl_xor_sync(lanes, x[i], d));
      return;
    }
#pragma unroll  // a shuffle whose lanes are not constant takes fifteen instructions
    for (int d = 16; d > 0; d /= 2)
      for (int i = 0; i < N; ++i) x[i] = op(x[i], __shfl_xor_sync(~0u, x[i], d));
    if (size == 32) return;
    if (lane == 0 || (lane < 4 && warp == size / 32 - 1))  // whole packs, the last one filled up
      for (int i = 0; i < N; ++i) warps[i].of[warp + lane] = lane ? identity : x[i];
    __syncthreads();
    for (int i = 0; i < N; ++i) x[i] = identity;
#pragma unroll 1
    for (int w = 0; w < size / 32; w += 4)
      for (int i = 0; i < N; ++i)
        for (int l = 0; l < 4; ++l) x[i] = op(x[i], warps[i].of[w + l]);
  }
  template <class V, class Op>
  __device__ V reduce(V x, V identity, Op op, WarpValues<V> (&warps)[1]) const {
    V one[1] = {x};
    reduce(one, identity, op, warps);
    return one[0];
  }

  // Calls f(k, j) for this thread's packs of W columns before `end`: the k-th begins at column j. Neighbouring threads
  // have neighbouring packs. kPacks = 0: any number of them, and k is 0.
  template <int W, int kPacks, class F>
  __device__ void each_pack(Column<kPacks> end, F f) const {
    if constexpr (kPacks == 0) {
#pragma unroll 1
      for (int64_t j = rank * W; j < end; j += size * W) f(0, j);
    } else {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (const int j = (rank + k * size) * W; j < end) f(k, j);
    }
  }
};

// This block's dynamic shared memory.
__device__ inline void* dynamic_shared() {
  extern __shared__ double memory[];
  return memory;
}

// How many threads take a row of which each may keep `kept` elements in registers.
struct RowLaunch {
  int team = kMinTeam, threads;
  size_t shared = 0;  // bytes of dynamic shared memory
  int64_t blocks;
  bool fits;  // the row in the team's registers

  // As few threads as can keep the row: each then has several loads under way.
  RowLaunch(int64_t rows, int64_t cols, int kept, int max_team) {
    while (team < 32 && int64_t(team) * kept < cols) team *= 2;
    fits = cols <= int64_t(max_team) * kept;
    if (int64_t(team) * kept < cols)
      team = fits ? static_cast<int>((cols + 32 * kept - 1) / (32 * kept)) * 32 : max_team;
    threads = team > 32 ? team : 128;
    blocks = (rows + threads / team - 1) / (threads / team);
  }

  // A persistent grid: as many blocks as run at once, fewer where rows are few.
  template <class Args>
  cudaError_t persist(void (*kernel)(Args, int64_t, int)) {
    int device = 0, processors = 0, each = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
    blocks = std::min(blocks, int64_t(processors) * std::max(each, 1));
    return error;
  }

  template <class Args>
  cudaError_t operator()(void (*kernel)(Args, int64_t, int), const Args& args, int64_t rows,
                         cudaStream_t stream) const {
    if (rows == 0) return cudaSuccess;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    return start(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared, stream, args, rows, team);
  }
};

// Whether every row begins at a multiple of `width` elements, `width * size` bytes.
inline bool aligned(const void* data, const Rows& rows, int width, int size) {
  bool yes = reinterpret_cast<uintptr_t>(data) % (width * size) == 0;
  for (int d = 0; d < rows.ndim; ++d) yes &= rows.strides[d] % width == 0;
  return yes;
}

}  // namespace cogview::cuda
