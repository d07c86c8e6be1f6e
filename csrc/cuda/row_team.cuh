// Rows by teams: 4 to 32 threads of a warp, or a whole block of up to 1024, share one row.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "../cpu/rows.h"

namespace cogview::cuda {

constexpr int kMinTeam = 4, kMaxTeam = 1024;

// Kept rows are short.
template <int kPacks>
using Column = std::conditional_t<kPacks == 0, int64_t, int>;

struct RowTeam {
  int size, rank;
  int64_t row;

  __device__ explicit RowTeam(int size)
      : size(size), rank(threadIdx.x % size), row(int64_t(blockIdx.x) * (blockDim.x / size) + threadIdx.x / size) {}

  // op over all values of the team, the same bits in every thread. `warps` is shared memory of this call alone.
  template <class A, class Op>
  __device__ A reduce(A x, A identity, Op op, A (&warps)[32]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned lanes = size < 32 ? ((1u << size) - 1) << (lane & ~(size - 1)) : ~0u;
    for (int d = min(size, 32) / 2; d > 0; d /= 2) x = op(x, __shfl_xor_sync(lanes, x, d));
    if (size <= 32) return x;
    if (lane == 0) warps[warp] = x;
    __syncthreads();
    x = lane < size / 32 ? warps[lane] : identity;
    for (int d = 16; d > 0; d /= 2) x = op(x, __shfl_xor_sync(~0u, x, d));
    return x;
  }

  // Calls f(k, j) for this thread's packs of W columns before `end`: the k-th begins at column j. Neighbouring threads
  // have neighbouring packs. kPacks = 0: any number of them, and k is 0.
  template <int W, int kPacks, class F>
  __device__ void each_pack(Column<kPacks> end, F f) const {
    if constexpr (kPacks == 0) {
      for (int64_t j = rank * W; j < end; j += size * W) f(0, j);
    } else {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (const int j = (rank + k * size) * W; j < end) f(k, j);
    }
  }
};

// How many threads take a row of which each may keep `kept` elements in registers.
struct RowLaunch {
  int team = kMinTeam, threads;
  int64_t blocks;
  bool fits;  // the row in the team's registers

  RowLaunch(int64_t rows, int64_t cols, int kept) {
    // half full at most, as long as the team can grow: more threads and more loads at once
    while (team < kMaxTeam && int64_t(team) * kept / 2 < cols) team *= 2;
    fits = int64_t(team) * kept >= cols;
    threads = team > 32 ? team : 128;
    blocks = (rows + threads / team - 1) / (threads / team);
  }

  template <class Args>
  cudaError_t operator()(void (*kernel)(Args, int64_t, int), const Args& args, int64_t rows,
                         cudaStream_t stream) const {
    if (rows == 0) return cudaSuccess;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(args, rows, team);
    return cudaGetLastError();
  }
};

// Whether every row begins at a multiple of `width` elements, `width * size` bytes.
inline bool aligned(const void* data, const Rows& rows, int width, int size) {
  bool yes = reinterpret_cast<uintptr_t>(data) % (width * size) == 0;
  for (int d = 0; d < rows.ndim; ++d) yes &= rows.strides[d] % width == 0;
  return yes;
}

}  // namespace cogview::cuda
