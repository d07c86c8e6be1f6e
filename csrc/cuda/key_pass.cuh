// Gradients of keys and values by blocks of threads that own keys and stream the queries that see them: no atomics, and
// the same bits each time.
//
// A Pattern says which keys and which queries. Every thread makes it, for its block:
//   int key(int r) const              what row r of the block's is among rows of k and v; -1: none, a row of zeros
//   u32 row(int r) const              what masks take of row r, looked up once
//   int tiles() const                 how many tiles of queries there are
//   Tile tile(int t) const            the t-th, with `int head`, the query head, and what else it takes
//   int query(const Tile&, int n) const
//                                     what row n of a tile is among queries; -1: none, which adds nothing
//   bool seen(u32 row, int r, const Tile&, int n) const
//                                     whether row n of a tile sees row r, of which row(r) is given
//   bool unseen(const Tile&, const WarpRows&) const
//                                     no query of the tile sees any of a warp's rows: it is passed over
//   bool whole(const Tile&, const WarpRows&) const
//                                     all see all of them that matter: no masks
//   static constexpr bool kBias       whether the bias is added to logits
// Of keys that runs of queries see, as here, row(r) is where that run ends; of dense keys with a mask, the mask. Of a
// box of coarse cells a tile is a run of cells of some image rows, row(r) the cell's own (y, x), and `seen` compares
// these to those of query(tile, n).
//
// Rows of k, v, q and dout are aligned to 16 bytes. stats [2, B, H, seqlen_q] holds base-2 lse, and dlse - sum(dout *
// out). finish(r, dk, dv) gets the sums of the warp's r-th unit of rows, dk without the scale, when all tiles are done
// and the ring may be written to.
#pragma once

#include "../attention.h"
#include "tile_ring.cuh"

namespace cogview::cuda {

// Rows of k and v and both sums of a unit of rows take 3/2 D registers: two units where that is at most 192 of a
// thread's 255. Loads of queries are then 1/4 of the products, else 1/2.
template <int D>
using KeyPassShape = std::conditional_t<D <= 64, TileShape<2, 4, 64, 4, 1>, TileShape<1, 8, 32, 4, 1>>;

// The rows [begin, end) of its block that a warp owns, and what row() says of the first and the last.
struct WarpRows {
  int begin, end;
  u32 first, last;
};

// kPacked: of packed sequences; sample b is the one whose first token is b, and statistics lie by heads.
template <class T, int D, bool kPacked = false>
struct KeyPass {
  using Shape = KeyPassShape<D>;
  using Layout = RingLayout<D, Shape, 8 * Shape::kTile, 4 * Shape::kRows>;
  using Copy = TileCopy<D, Shape>;
  static constexpr int R = Shape::kRowUnits;
  static_assert(Shape::kAtOnce == 1 && Shape::kThreads >= 2 * Shape::kTile);

  template <class Pattern, class Finish>
  __device__ static void run(const Attention& a, const Tensor4& k, const Tensor4& v, const float* stats, int b, int kv,
                             const Logits& logits, const Pattern& pattern, Finish finish) {
    const u32 base = gpu::shared_address(gpu::shared_memory());
    const int warp = gpu::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const Ring<Shape> ring(base + Layout::kFull, base + Layout::kEmpty);
    for (int r = threadIdx.x; r < Shape::kRows; r += Shape::kThreads)
      gpu::store_shared4(base + Layout::kOwn + 4 * r, pattern.row(r));
    __syncthreads();

    const int own_row = warp * Shape::kWarpRows + lane / 4, column = 2 * (lane % 4);
    OwnRows<D, R, true> keys, values;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int at[2] = {pattern.key(own_row + 16 * r), pattern.key(own_row + 16 * r + 8)};
      const auto load = [&](Operand<D>& x, const Tensor4& from) {
        const T* rows = from.at<T>(b, kv);
        x.load_global(at[0] < 0 ? nullptr : rows + at[0] * from.stride[2],
                      at[1] < 0 ? nullptr : rows + at[1] * from.stride[2]);
      };
      Operand<D> x;
      load(x, k);
      x.flip(logits.flip);
      keys.set(r, x, 0);
      load(x, v);
      values.set(r, x, 0);
    }

    float dk[R][D / 8][4], dv[R][D / 8][4];
#pragma unroll
    for (int r = 0; r < R; ++r) clear(dk[r]), clear(dv[r]);
    const Matrices<D, false> columns(base + Unit<D>::columns(lane)), rows(base + Unit<D>::rows(lane));

    const auto load = [&](int t, u32 slot) {
      const auto tile = pattern.tile(t);
      const u32 to = base + slot * Layout::kSlotBytes;
      const char* q = reinterpret_cast<const char*>(a.q.at<T>(b, tile.head));
      const char* dout = reinterpret_cast<const char*>(a.dout.at<T>(b, tile.head));
      Copy copy;
      gpu::keep(copy.thread);  // what follows from it is computed for each tile again: the sums need the registers
#pragma unroll
      for (int i = 0; i < Copy::kEach; ++i) {
        if (!copy.mine(i)) continue;
        const int at = pattern.query(tile, copy.row(i));
        copy(to, i, q, a.q.stride[2] * 2, at);
        copy(to + Layout::kTileBytes, i, dout, a.dout.stride[2] * 2, at);
      }
      if (const int thread = copy.thread; thread < 2 * Shape::kTile) {
        const int n = thread % Shape::kTile, which = thread / Shape::kTile, at = pattern.query(tile, n);
        const float* from = stats + (kPacked ? (which * a.heads + tile.head) * a.seqlen_q + b
                                             : ((which * a.batch + b) * a.heads + tile.head) * a.seqlen_q);
        gpu::copy4(to + 2 * Layout::kTileBytes + 4 * thread, from + max(at, 0), at >= 0);
      }
    };
    ring.stream(pattern.tiles(), load, [&](int t, u32 slot) {
      const auto tile = pattern.tile(t);
      const int begin = warp * Shape::kWarpRows, end = begin + Shape::kWarpRows;
      const u32 of_rows = base + Layout::kOwn + 4 * begin;
      const WarpRows mine{begin, end, gpu::load_shared4(of_rows),
                          gpu::load_shared4(of_rows + 4 * Shape::kWarpRows - 4)};
      if (pattern.unseen(tile, mine)) return;
      // queries that are not there weigh something in their rows of zeros, and may overflow
      const bool whole = pattern.whole(tile, mine) && pattern.query(tile, Shape::kTile - 1) >= 0;
#pragma unroll 1
      for (int n = 0; n < Shape::kTile / 16; ++n) {
        const u32 at = slot * Layout::kSlotBytes + n * Unit<D>::kBytes;
        const u32 of_stats = base + 2 * Layout::kTileBytes + slot * Layout::kSlotBytes + 4 * (16 * n + column);
        float2 start[2], lse[2];  // of the lane's columns
#pragma unroll
        for (int h = 0; h < 2; ++h) start[h] = gpu::load_shared_pair(of_stats + 4 * Shape::kTile + 32 * h);
        float z[R][1][2][4], dp[R][1][2][4];
        all_scores<T>(dp, values, columns, Layout::kTileBytes + at,
                      [&](int, int, int h, int e) { return e % 2 ? start[h].y : start[h].x; });
        all_scores<T>(z, keys, columns, at);
        if (!whole) {
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int row = own_row + 16 * r + 8 * i;
              const u32 own = gpu::load_shared4(base + Layout::kOwn + 4 * row);
#pragma unroll
              for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; ++e)
                  if (const int at = 16 * n + 8 * h + column + e % 2;
                      pattern.query(tile, at) < 0 || !pattern.seen(own, row, tile, at))
                    z[r][0][h][e] = -INFINITY, dp[r][0][h][e] = 0;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) lse[h] = gpu::load_shared_pair(of_stats + 32 * h);
        u32 p[R][4], ds[R][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
          grad_scores<T>(p[r], ds[r], z[r][0], dp[r][0], logits.factor, [&](int h, int e) {
            return (e % 2 ? lse[h].y : lse[h].x) - (Pattern::kBias ? logits.bias : 0);
          });
        add_rows_of_all<T, D>([&](int r) { return dv[r]; }, p, rows, Layout::kTileBytes + at);
        add_rows_of_all<T, D>([&](int r) { return dk[r]; }, ds, rows, at);
      }
    });

    __syncthreads();  // nobody reads the slots any more
#pragma unroll
    for (int r = 0; r < R; ++r) finish(r, dk[r], dv[r]);
  }
};

}  // namespace cogview::cuda
