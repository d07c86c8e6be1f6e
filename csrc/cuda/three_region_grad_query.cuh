// Gradients of queries in three-region attention: a block owns queries of a head, streams their keys as the forward
// does, and leaves the statistics of its rows to the kernels that own keys.
#pragma once

#include "three_region_pattern.cuh"

namespace cogview::cuda {

// Rows of q and dout and the sum of a unit of rows take D registers: two units where that is at most 128. Loads of keys
// are then 1/4 of the products, else 1/2.
template <int D>
using GradQueryShape = std::conditional_t<D <= 64, TileShape<2, 4, 64, 4, 1>, TileShape<1, 8, 32, 4, 2>>;

template <class T, int D, bool kPacked>
struct ThreeRegionGradQuery {
  using Shape = GradQueryShape<D>;
  using Layout = RingLayout<D, Shape, 0, 0>;
  static constexpr int R = Shape::kRowUnits, N = Shape::kAtOnce;

  // stats: of each row the base-2 lse and -delta = dlse - sum(dout * out)
  __device__ static void run(const ThreeRegionAttention& a, float* stats, const Logits& logits,
                             const Programs& programs) {
    const u32 base = gpu::shared_address(gpu::shared_memory());
    const int warp = gpu::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const QueryPlace<kPacked> place(a, programs, Shape::kRows);
    if (place.empty()) return;
    const int b = place.sample, h = place.h, kv = h / programs.group;
    const Ring<Shape> ring(base + Layout::kFull, base + Layout::kEmpty);
    const Regions regions(a, place);
    const KeyTiles<D, Shape> keys(regions, place.first);
    __syncthreads();

    OwnRows<D, R, true> q, dout;
    float lse[R][2], delta[R][2];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = keys.first + 16 * r + lane / 4;
      const bool there[2] = {i <= keys.last, i + 8 <= keys.last};
      const auto load = [&](Operand<D>& x, const Tensor4& from) {
        const T* row = from.at<T>(b, h) + i * from.stride[2];
        x.load_global(there[0] ? row : nullptr, there[1] ? row + 8 * from.stride[2] : nullptr);
      };
      Operand<D> x, y;
      load(x, a.dout), load(y, a.out);
      row_products<T>(delta[r], x, y);
      dout.set(r, x, 0);
      load(x, a.q);
      x.flip(logits.flip);
      q.set(r, x, 0);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        lse[r][e] = 0;
        if (!there[e]) continue;
        const int64_t at = place.statistics(a) + i + 8 * e;
        lse[r][e] = static_cast<const float*>(a.lse)[at] * kLog2e;
        if (a.dlse) delta[r][e] -= static_cast<const float*>(a.dlse)[at];
        if (lane % 4) continue;
        gpu::store_global_float(stats + at, lse[r][e]);
        gpu::store_global_float(stats + a.batch * a.heads * a.seqlen_q + at, -delta[r][e]);
      }
    }

    float acc[R][D / 8][4];
#pragma unroll
    for (int r = 0; r < R; ++r) clear(acc[r]);
    const Matrices<D, false> columns(base + Unit<D>::columns(lane)), rows(base + Unit<D>::rows(lane));
    const KeyLoader<T, D, Shape, Layout> load(keys, a, b, kv, base);
    stream_keys(ring, keys, load, logits.bias, [&](int t, int n, u32 at, bool whole, float bias) {
      float z[R][N][2][4], dp[R][N][2][4];
      all_scores<T>(z, q, columns, at);
      all_scores<T>(dp, dout, columns, Layout::kTileBytes + at,
                    [&](int r, int, int, int e) { return -delta[r][e / 2]; });
      if (!whole) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const KeyRun seen[2] = {keys.seen(t, r, 0), keys.seen(t, r, 1)};
          hide(z[r], seen, keys.start(t) + n);
          hide(dp[r], seen, keys.start(t) + n, 0);
        }
      }
#pragma unroll
      for (int u = 0; u < N; ++u) {
        u32 p[4], ds[R][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
          grad_scores<T>(p, ds[r], z[r][u], dp[r][u], logits.factor, [&](int, int e) { return lse[r][e / 2] - bias; });
        add_rows_of_all<T, D>([&](int r) { return acc[r]; }, ds, rows, at + u * Unit<D>::kBytes);
      }
    });

    __syncthreads();  // nobody reads the slots any more
    const QueryPlace<kPacked> at_end(a, programs, Shape::kRows);
    char* dq = reinterpret_cast<char*>(a.dq.at<T>(at_end.sample, at_end.h));
    const u32 room = base + warp * Layout::kWarpBytes;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = keys.first + 16 * r;
      store_unit<T>(acc[r], logits.scale, logits.scale, room + r * Unit<D>::kBytes, dq + i * a.dq.stride[2] * 2,
                    a.dq.stride[2] * 2, keys.last + 1 - i);
    }
  }
};

}  // namespace cogview::cuda
