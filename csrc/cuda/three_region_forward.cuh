// Forward of three-region attention: a block owns queries of a head and streams their keys.
#pragma once

#include "three_region_pattern.cuh"

namespace cogview::cuda {

// Two units of queries a warp halve the loads of keys, LDSM, which one unit a warp has as often as products: with four
// warps of 32 rows 1/4 a product instead of 1/2; 3/8 at head_dim 128, where the queries stay in shared memory. Its
// three slots let two blocks share the 164 KB of an A100's processor.
template <int D>
using ForwardShape = TileShape<2, 4, D <= 64 ? 64 : 32, D == 128 ? 3 : 4, D == 96 ? 1 : 2, D <= 96>;

template <class T, int D, bool kPacked>
struct ThreeRegionForward {
  using Shape = ForwardShape<D>;
  using Layout = RingLayout<D, Shape, 0, Shape::kKept ? 0 : Shape::kRows * 2 * D>;
  static constexpr int R = Shape::kRowUnits, N = Shape::kAtOnce;

  __device__ static void run(const ThreeRegionAttention& a, const Logits& logits, const Programs& programs) {
    const u32 base = gpu::shared_address(gpu::shared_memory());
    const int warp = gpu::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const QueryPlace<kPacked> place(a, programs, Shape::kRows);
    if (place.empty()) return;
    const int b = place.sample, h = place.h, kv = h / programs.group;
    const Ring<Shape> ring(base + Layout::kFull, base + Layout::kEmpty);
    const Regions regions(a, place);
    const KeyTiles<D, Shape> keys(regions, place.first);  // the last see most keys
    __syncthreads();

    OwnRows<D, R, Shape::kKept> q;
    const T* queries = a.q.at<T>(b, h);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = keys.first + 16 * r + lane / 4;
      const T* row = queries + i * a.q.stride[2];
      Operand<D> x;
      x.load_global(i <= keys.last ? row : nullptr, i + 8 <= keys.last ? row + 8 * a.q.stride[2] : nullptr);
      x.flip(logits.flip);
      q.set(r, x, base + Layout::kOwn + warp * Layout::kWarpBytes);
    }
    __syncwarp();

    Softmax<D> softmax[R];
#pragma unroll
    for (int r = 0; r < R; ++r) softmax[r].start();
    const Matrices<D, false> columns(base + Unit<D>::columns(lane)),
        values(base + Layout::kTileBytes + Unit<D>::rows(lane));
    const KeyLoader<T, D, Shape, Layout> load(keys, a, b, kv, base);
    stream_keys(ring, keys, load, logits.bias, [&](int t, int n, u32 at, bool whole, float bias) {
      float z[R][N][2][4];
      all_scores<T>(z, q, columns, at);
      if (!whole) {
#pragma unroll
        for (int r = 0; r < R; ++r) hide(z[r], {keys.seen(t, r, 0), keys.seen(t, r, 1)}, keys.start(t) + n);
      }
      u32 w[N][R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        u32 mine[N][4];
        softmax[r].template weigh<T>(mine, z[r], logits.factor, bias);
#pragma unroll
        for (int u = 0; u < N; ++u)
#pragma unroll
          for (int i = 0; i < 4; ++i) w[u][r][i] = mine[u][i];
      }
#pragma unroll
      for (int u = 0; u < N; ++u)
        add_rows_of_all<T, D>([&](int r) { return softmax[r].acc; }, w[u], values, at + u * Unit<D>::kBytes);
    });

    __syncthreads();  // nobody reads the slots any more
    const QueryPlace<kPacked> at_end(a, programs, Shape::kRows);
    char* out = reinterpret_cast<char*>(a.out.at<T>(at_end.sample, at_end.h));
    float* lse = static_cast<float*>(a.lse) + at_end.statistics(a);
    const u32 room = base + warp * Layout::kWarpBytes;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Softmax<D>& x = softmax[r];
      x.finish();
      const int i = keys.first + 16 * r;
      store_unit<T>(x.acc, 1 / x.sum[0], 1 / x.sum[1], room + r * Unit<D>::kBytes, out + i * a.out.stride[2] * 2,
                    a.out.stride[2] * 2, keys.last + 1 - i);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (const int at = i + 8 * e + lane / 4; lane % 4 == 0 && at <= keys.last)
          gpu::store_global_float(lse + at, x.lse(e));
    }
  }
};

}  // namespace cogview::cuda
