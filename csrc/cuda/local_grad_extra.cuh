// Gradients of the keys and values that are in no image of the queries' size: of a prefix, which all queries see, and
// of a coarser image. Blocks own 128 keys and stream the queries that see them, of all heads of a group, in parts whose
// sums stay in float32; then these are added up, in the same order each time.
//
// Memory. k and v are read once a part, q, dout and stats once for 128 keys that see them; parts written and read once.
#pragma once

#include "key_pass.cuh"
#include "local_extra.cuh"

namespace cogview::cuda {

// x / n for x below 2^31 / n
struct Ratio {
  u32 n, factor;
  Ratio() = default;
  __host__ __device__ explicit Ratio(int n) : n(n), factor(static_cast<u32>((0x100000000u + n - 1) / n)) {}
  __device__ int operator()(int x) const {
    return n == 1 ? x : static_cast<int>(static_cast<uint64_t>(static_cast<u32>(x)) * factor >> 32);
  }
};

struct GradExtra {  // of one set
  Tensor4 k, v, dk, dv;
  int keys;                               // of a head
  const bool* mask;                       // of the prefix: [batch, keys] or null
  int height, width, radius_y, radius_x;  // of the coarse image
  Ratio ratio_y, ratio_x;
  int rows, columns;  // of the image
  int splits;
  float* parts;  // [dk or dv, splits, batch * kv_heads, keys, D]
};

// The tiles of queries of all heads of a group, of which a split takes a share.
template <class S>
struct SplitTiles {
  struct Tile {
    int head, first;  // of the head's tiles
  };
  int first_head, each, first_tile, count;
  __device__ SplitTiles(const Attention& a, const GradExtra& e, int kv, int each) : each(each) {
    const int group = static_cast<int>(a.heads / a.kv_heads);
    const int64_t all = static_cast<int64_t>(each) * group;
    first_head = kv * group;
    first_tile = gpu::uniform(static_cast<int>(all * blockIdx.y / e.splits));
    count = gpu::uniform(static_cast<int>(all * (blockIdx.y + 1) / e.splits) - first_tile);
  }
  __device__ int tiles() const { return count; }
  __device__ Tile tile(int t) const {
    const int head = (first_tile + t) / each;
    return {first_head + head, first_tile + t - head * each};
  }
};

template <class S>
struct PrefixKeys : SplitTiles<S> {
  using Tile = typename SplitTiles<S>::Tile;
  static constexpr bool kBias = true;
  static __host__ __device__ int blocks(const GradExtra& e) { return (e.keys + S::kRows - 1) / S::kRows; }
  const bool* mask;
  int first, keys, queries;
  __device__ PrefixKeys(const Attention& a, const GradExtra& e, int block, int b, int kv)
      : SplitTiles<S>(a, e, kv, static_cast<int>((a.seqlen_q + S::kTile - 1) / S::kTile)),
        mask(e.mask ? e.mask + static_cast<int64_t>(b) * e.keys : nullptr),
        first(block * S::kRows),
        keys(e.keys),
        queries(static_cast<int>(a.seqlen_q)) {}
  __device__ int key(int r) const { return first + r < keys ? first + r : -1; }
  __device__ int query(const Tile& tile, int n) const {
    const int at = tile.first * S::kTile + n;
    return at < queries ? at : -1;
  }
  __device__ u32 row(int r) const { return key(r) >= 0 && (!mask || mask[first + r]); }
  __device__ bool seen(u32 row, int, const Tile&, int) const { return row; }
  __device__ bool unseen(const Tile&, const WarpRows& rows) const { return first + rows.begin >= keys; }
  __device__ bool whole(const Tile&, const WarpRows&) const { return !mask; }
};

// A patch of coarse cells, 16 across, and patches of the image, 8 across, in the box that sees any of them.
template <class S>
struct CoarseKeys : SplitTiles<S> {
  using Tile = typename SplitTiles<S>::Tile;
  static constexpr bool kBias = true;
  static constexpr int kAcross = 16, kDown = S::kRows / kAcross, kTileAcross = 8, kTileDown = S::kTile / kTileAcross;
  static __host__ __device__ int across(const GradExtra& e) { return (e.width + kAcross - 1) / kAcross; }
  static __host__ __device__ int blocks(const GradExtra& e) { return across(e) * ((e.height + kDown - 1) / kDown); }

  struct Cell {
    int y, x;
  };
  struct Box {
    int top, left, bottom, right;  // of queries
    __device__ int tiles_across() const { return (right - left + kTileAcross - 1) / kTileAcross; }
    __device__ int tiles() const { return tiles_across() * ((bottom - top + kTileDown - 1) / kTileDown); }
  };
  const GradExtra& e;
  int top, left;  // of the patch
  Box box;

  __device__ CoarseKeys(const Attention& a, const GradExtra& e, int block, int, int kv)
      : CoarseKeys(a, e, kv, {block / across(e) * kDown, block % across(e) * kAcross}) {}
  __device__ CoarseKeys(const Attention& a, const GradExtra& e, int kv, Cell first)
      : CoarseKeys(a, e, kv, first, box_of(e, first.y, first.x)) {}
  __device__ CoarseKeys(const Attention& a, const GradExtra& e, int kv, Cell first, const Box& box)
      : SplitTiles<S>(a, e, kv, box.tiles()), e(e), top(first.y), left(first.x), box(box) {}
  __device__ static Box box_of(const GradExtra& e, int top, int left) {
    const auto from = [](int x, int radius, const Ratio& ratio) {
      return max(x - radius, 0) * static_cast<int>(ratio.n);
    };
    const auto to = [](int x, int radius, const Ratio& ratio, int n) {
      return min((x + radius) * static_cast<int>(ratio.n), n);
    };
    return {from(top, e.radius_y, e.ratio_y), from(left, e.radius_x, e.ratio_x),
            to(min(top + kDown, e.height), e.radius_y, e.ratio_y, e.rows),
            to(min(left + kAcross, e.width), e.radius_x, e.ratio_x, e.columns)};
  }
  // A unit of 16 rows is 4 x 4 cells.
  __device__ int y(int r) const { return top + r / 64 * 4 + r % 16 / 4; }
  __device__ int x(int r) const { return left + r / 16 % 4 * 4 + r % 4; }
  __device__ int key(int r) const { return y(r) < e.height && x(r) < e.width ? y(r) * e.width + x(r) : -1; }
  __device__ int tile_y(const Tile& tile) const { return box.top + tile.first / box.tiles_across() * kTileDown; }
  __device__ int tile_x(const Tile& tile) const { return box.left + tile.first % box.tiles_across() * kTileAcross; }
  __device__ int query(const Tile& tile, int n) const {
    const int qy = tile_y(tile) + n / kTileAcross, qx = tile_x(tile) + n % kTileAcross;
    return qy < box.bottom && qx < box.right ? qy * e.columns + qx : -1;
  }
  __device__ u32 row(int r) const { return 0; }
  __device__ bool seen(u32, int r, const Tile& tile, int n) const {
    const int qy = e.ratio_y(tile_y(tile) + n / kTileAcross), qx = e.ratio_x(tile_x(tile) + n % kTileAcross);
    return abs(qy - y(r)) <= e.radius_y && abs(qx - x(r)) <= e.radius_x;
  }
  __device__ bool unseen(const Tile& tile, const WarpRows& rows) const {
    const int from = e.ratio_y(tile_y(tile)), to = e.ratio_y(tile_y(tile) + kTileDown - 1);
    return from > y(rows.end - 1) + e.radius_y || to < y(rows.begin) - e.radius_y || y(rows.begin) >= e.height;
  }
  __device__ bool whole(const Tile&, const WarpRows&) const { return false; }
};

namespace {

// blockIdx: block of keys, head and sample; split
template <class T, int D, template <class> class Keys>
__global__ void __launch_bounds__(KeyPassShape<D>::kThreads, KeyPassShape<D>::kBlocks)
    grad_extra(const __grid_constant__ Attention a, const __grid_constant__ GradExtra e, const float* stats,
               const __grid_constant__ Logits logits) {
#ifndef COGVIEW_BEFORE_SM_80
  using S = KeyPassShape<D>;
  using Pattern = Keys<S>;
  const int blocks = Pattern::blocks(e), pair = blockIdx.x / blocks, b = pair / static_cast<int>(a.kv_heads);
  const Pattern pattern(a, e, blockIdx.x % blocks, b, pair % static_cast<int>(a.kv_heads));
  KeyPass<T, D>::run(a, e.k, e.v, stats, b, pair % static_cast<int>(a.kv_heads), logits, pattern,
                     [&](int r, const auto& dk, const auto& dv) {
                       const int64_t size = a.batch * a.kv_heads * e.keys * D;
#pragma unroll
                       for (int i = 0; i < 2; ++i) {
                         const int key =
                             pattern.key(threadIdx.x / 32 * S::kWarpRows + 16 * r + threadIdx.x % 32 / 4 + 8 * i);
                         if (key < 0) continue;
                         float* to = e.parts + blockIdx.y * size + (static_cast<int64_t>(pair) * e.keys + key) * D +
                                     threadIdx.x % 4 * 2;
#pragma unroll
                         for (int j = 0; j < D / 8; ++j) {
                           gpu::store_global_pair(to + 8 * j, {dk[j][2 * i], dk[j][2 * i + 1]});
                           gpu::store_global_pair(to + e.splits * size + 8 * j, {dv[j][2 * i], dv[j][2 * i + 1]});
                         }
                       }
                     });
#endif
}

// Two elements a thread; blockIdx.y: dk or dv.
template <class T>
__global__ void add_parts(const __grid_constant__ Attention a, const __grid_constant__ GradExtra e, float scale) {
  const int64_t size = a.batch * a.kv_heads * e.keys * a.head_dim;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 2;
  if (i >= size) return;
  const float* from = e.parts + blockIdx.y * e.splits * size + i;
  float2 sum{0, 0};
  for (int split = 0; split < e.splits; ++split) {
    const float2 x = gpu::load_global_pair(from + split * size);
    sum.x += x.x, sum.y += x.y;
  }
  const float factor = blockIdx.y ? 1 : scale;
  const int64_t row = i / a.head_dim, pair = row / e.keys, key = row % e.keys;
  const Tensor4& to = blockIdx.y ? e.dv : e.dk;
  T* at = to.at<T>(pair / a.kv_heads, pair % a.kv_heads) + key * to.stride[2] + i % a.head_dim;
  gpu::store_global4(at, gpu::pack_as(sum.x * factor, sum.y * factor, static_cast<T*>(nullptr)));
}

}  // namespace
}  // namespace cogview::cuda
