// The gradient of 2D local attention's table of biases: no atomics, and the same bits each time.
//
// A warp takes tiles of 4 x 4 queries, and of the keys units of 4 x 4 that lie at the same place beside every tile:
// each element of its products is then of one entry of the table for all of them, and sums stay in registers. A block
// owns a head, up to kUnits units side by side and a share of all tiles; it adds up its warps' sums in order and leaves
// them in `parts`. Then a thread for each entry adds up the pairs of cells that are its own, share after share.
//
// Memory. k and v once for each unit of a tile, q, dout, stats once for kUnits of them, mostly from L1: 16 bytes a
// lane. Products take the elements of rows in the order in which lanes then have them, the same for both sides.
#pragma once

#include "local_options.cuh"

namespace cogview::cuda {

struct GradTableArgs {
  static constexpr int kWarps = 4, kUnits = 3;
  Axis y, x;
  bool ordered;
  int above, below, left, right;  // of a query: cells that keys lie away, at most
  int heads, group;
  int64_t tiles;  // of a head, in all samples
  Plane q, k, v, dout, stats;
  int64_t second_stats;
  LocalOptions options;
  float scale;  // > 0, in base 2
  u32 flip;
  int splits;
  float *parts, *grad;  // parts: [splits, heads, units down, units across, 8, 32]
  __host__ __device__ int tiles_down() const { return (y.cells(0) + 3) / 4; }
  __host__ __device__ int tiles_across() const { return (x.cells(0) + 3) / 4; }
  __host__ __device__ int units_down() const { return (above + below + 7) / 4; }
  __host__ __device__ int units_across() const { return (left + right + 7) / 4; }
  __host__ __device__ int runs() const { return (units_across() + kUnits - 1) / kUnits; }
};

// A lane's parts of 16 rows, 8 elements of each 32.
template <int D>
struct RowParts {
  uint4 x[2][D / 32];
  __device__ void load(int r, const char* row, u32 lane) {
#pragma unroll
    for (int k = 0; k < D / 32; ++k) x[r][k] = gpu::load_global16(row + 64 * k + lane % 4 * 16);
  }
  __device__ void flip(u32 signs) {
#pragma unroll
    for (int k = 0; k < D / 32; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r) x[r][k].x ^= signs, x[r][k].y ^= signs, x[r][k].z ^= signs, x[r][k].w ^= signs;
  }
};

// z = rows by rows
template <class T, int D>
__device__ void all_products(float (&z)[2][4], const RowParts<D>& a, const RowParts<D>& b) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int e = 0; e < 4; ++e) z[h][e] = 0;
#pragma unroll
  for (int k = 0; k < D / 32; ++k) {
    const uint4 &a0 = a.x[0][k], &a1 = a.x[1][k];
    const u32 first[4] = {a0.x, a1.x, a0.y, a1.y}, second[4] = {a0.z, a1.z, a0.w, a1.w};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      gpu::multiply<T>(z[h], first, b.x[h][k].x, b.x[h][k].y);
      gpu::multiply<T>(z[h], second, b.x[h][k].z, b.x[h][k].w);
    }
  }
}

namespace {

// blockIdx: units, row of units, head; share
template <class T, int D>
__global__ void __launch_bounds__(32 * GradTableArgs::kWarps) grad_table(const __grid_constant__ GradTableArgs a) {
#ifndef COGVIEW_BEFORE_SM_80
  constexpr int kWarps = GradTableArgs::kWarps, kUnits = GradTableArgs::kUnits;
  const int warp = gpu::uniform(threadIdx.x / 32);
  const u32 lane = threadIdx.x % 32;
  const int index_x = static_cast<int>(blockIdx.x), across = a.units_across();
  const int first_unit = index_x % a.runs() * kUnits, row = index_x / a.runs();
  const int unit_y = row % a.units_down(), head = row / a.units_down();
  const Biases biases(a.options, head);
  float sum[kUnits][2][4] = {};

  const int end = static_cast<int>(a.tiles * (blockIdx.y + 1) / a.splits);
  for (int t = static_cast<int>(a.tiles * blockIdx.y / a.splits) + warp; t < end; t += kWarps) {
    int index = t;
    const auto next = [&](int n) {
      const int x = index % n;
      index /= n;
      return x;
    };
    Own<D> own{lane};
    own.x = 4 * next(a.tiles_across()), own.y = 4 * next(a.tiles_down());
    const int phase_x = next(a.x.dilation), phase_y = next(a.y.dilation);
    own.height = a.y.cells(phase_y), own.width = a.x.cells(phase_x);
    const int top = own.y - a.above + 4 * unit_y;
    if (own.x >= own.width || own.y >= own.height || top <= -4 || top >= own.height) continue;
    const auto in = [&](const Plane& plane, int of) {
      return plane.at + index * plane.batch + of * plane.head +
             (static_cast<int64_t>(phase_y) * a.x.size + phase_x) * plane.line;
    };

    bool down[2][2], same[2][2];  // of half and row: rows of keys that queries see; are their own
    const Span columns = a.x.seen(min(own.column(), own.width - 1), own.width);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int y = own.row(r);
      const Span rows = a.y.seen(min(y, own.height - 1), own.height);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int of = top + static_cast<int>(lane / 2 % 2) + 2 * h;
        same[h][r] = a.ordered && of == y;
        down[h][r] = own.inside(r) && of >= rows.lo && of < rows.hi;
      }
    }
    if (!__any_sync(~0u, down[0][0] || down[0][1] || down[1][0] || down[1][1])) continue;
    RowParts<D> q, dout;
    float lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int y = min(own.row(r), own.height - 1), x = min(own.column(), own.width - 1);
      const auto at = [&](const Plane& plane) { return in(plane, head) + y * plane.row + x * plane.cell; };
      q.load(r, at(a.q), lane), dout.load(r, at(a.dout), lane);
      const char* stats = at(a.stats);
      lse[r] = gpu::load_global_float(reinterpret_cast<const float*>(stats));
      delta[r] = -gpu::load_global_float(reinterpret_cast<const float*>(stats + a.second_stats));
    }
    q.flip(a.flip);

#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int left = own.x - a.left + 4 * (first_unit + u);
      if (first_unit + u >= across || left <= -4 || left >= own.width) continue;
      bool seen[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int y = top + static_cast<int>(lane / 2 % 2) + 2 * h, x = left + static_cast<int>(lane % 2) * 2 + j;
          bool there = x >= columns.lo && x < columns.hi && (down[h][0] || down[h][1]);
          const Plane& mask = a.options.key_mask;
          if (there && mask.at) there = attends(in(mask, 0) + y * mask.row + x * mask.cell);
#pragma unroll
          for (int r = 0; r < 2; ++r) seen[h][2 * r + j] = there && down[h][r] && !(same[h][r] && x > own.column());
        }
      bool any = false;
#pragma unroll
      for (int e = 0; e < 4; ++e) any = any || seen[0][e] || seen[1][e];
      if (!__any_sync(~0u, any)) continue;
      RowParts<D> rows;
      const auto load = [&](const Plane& plane) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int y = min(max(top + static_cast<int>(lane / 16) + 2 * h, 0), own.height - 1);
          const int x = min(max(left + static_cast<int>(lane / 4 % 4), 0), own.width - 1);
          rows.load(h, in(plane, head / a.group) + y * plane.row + x * plane.cell, lane);
        }
      };
      float z[2][4], dp[2][4];
      load(a.k);
      all_products<T>(z, q, rows);
      load(a.v);
      all_products<T>(dp, dout, rows);
      biases.add<1>(z, a.scale, biases.first<1>(own, top, left));
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (seen[h][e]) sum[u][h][e] += gpu::exp2_fast(z[h][e] - lse[e / 2]) * (dp[h][e] - delta[e / 2]);
    }
  }

  __shared__ float sums[kWarps][kUnits][8][32];
#pragma unroll
  for (int u = 0; u < kUnits; ++u)
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[warp][u][i][lane] = sum[u][i / 4][i % 4];
  __syncthreads();
  float* parts =
      a.parts + ((static_cast<int64_t>(blockIdx.y) * a.heads * a.units_down() + row) * across + first_unit) * 256;
  for (int i = threadIdx.x; i < min(kUnits, across - first_unit) * 256; i += blockDim.x) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][i / 256][i / 32 % 8][i % 32];
    gpu::store_global_float(parts + i, total);
  }
#endif
}

// A thread for each entry.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) add_table_parts(const __grid_constant__ GradTableArgs a) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int size = a.options.height * a.options.width;
  if (entry >= static_cast<int64_t>(a.heads) * size) return;
  const int head = static_cast<int>(entry / size), at = static_cast<int>(entry % size);
  const int dy = at / a.options.width - a.options.height / 2, dx = at % a.options.width - a.options.width / 2;
  float sum = 0;
  if (dy >= -a.above && dy <= a.below && dx >= -a.left && dx <= a.right)
    for (int split = 0; split < a.splits; ++split)
      for (int i = 0; i < 16; ++i) {  // the query of a tile
        const int y = i / 4 + dy + a.above, x = i % 4 + dx + a.left, key = y % 4 * 4 + x % 4;
        const int lane = i % 8 * 4 + key % 8 / 2, element = key / 8 * 4 + i / 8 * 2 + key % 2;
        const int64_t row = (static_cast<int64_t>(split) * a.heads + head) * a.units_down() + y / 4;
        sum += gpu::load_global_float(a.parts + ((row * a.units_across() + x / 4) * 8 + element) * 32 + lane);
      }
  gpu::store_global_float(a.grad + entry, sum);
}

}  // namespace
}  // namespace cogview::cuda
