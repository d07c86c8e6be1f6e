// Who sees whom in three-region attention, and the keys of a block of queries as tiles: first the pivots below its
// windows, gathered, then the windows.
#pragma once

#include "three_region_place.cuh"

namespace cogview::cuda {

// The pattern with numbers that are fast on a device; the launcher has checked that they fit.
struct Regions {
  int seqlen, block_size, window_blocks, num_pivots;
  const char* pivots;
  u32 pivot_bytes;

  __device__ Regions(const ThreeRegionAttention& a, const Sequence& of)
      : seqlen(of.seqlen),
        block_size(a.block_size),
        window_blocks(a.window_blocks),
        num_pivots(a.num_pivots),
        pivots(static_cast<const char*>(a.pivots.data)),
        pivot_bytes(a.pivots.wide ? 8 : 4) {
    pivots += of.number * a.num_pivots * pivot_bytes;
  }
  // The first key of query i's window.
  __device__ int window(int i) const {
    const int block = i / block_size - window_blocks + 1;
    return block > 0 ? block * block_size : 0;
  }
  // The first query behind key j's windows: it sees j as a pivot, if that is one.
  __device__ int behind(int j) const {
    return static_cast<int>(min(int64_t(j / block_size + window_blocks) * block_size, int64_t(seqlen)));
  }
  // Pivot r of those there are as it is given, of int64 the lower half: padding is above all keys, and nothing else
  // that is no key is ever read from.
  __device__ u32 pivot(int r) const { return gpu::load_global4(pivots + static_cast<u32>(r) * int64_t(pivot_bytes)); }
  __device__ int key(u32 pivot) const { return pivot < static_cast<u32>(seqlen) ? static_cast<int>(pivot) : -1; }
  // How many of the first `end` pivots are below key x, of which `first` are known to be.
  __device__ int rank(int x, int first, int end) const {
    while (first < end) {
      const int middle = (first + end) / 2;
      const bool below = pivot(middle) < static_cast<u32>(x);
      first = below ? middle + 1 : first;
      end = below ? end : middle;
    }
    return first;
  }
  // Of all pivots, asked by all lanes of a warp.
  __device__ int rank_by_warp(int x) const {
    return count_by_warp(num_pivots, [&](int r) { return pivot(r) < static_cast<u32>(x); });
  }
};

// What a query sees of a run of keys: `count` of them from the `first` one on.
struct KeyRun {
  u32 first, count;
  __device__ bool has(int x) const { return static_cast<u32>(x) - first < count; }  // those before wrap around
};

template <int D, class S>
struct KeyTiles {
  const Regions& regions;
  int i0, low, end;  // the block's first query, the first key of its windows, the key behind them
  int pivots, pivot_tiles, tiles;
  // of this warp
  int first, last;  // its queries; none if last < first
  int window_first, window_last, rank_first, rank_last;
  u32 window[S::kRowUnits][2], below[S::kRowUnits][2];  // of the lane's rows: its window's first key, pivots below it

  __device__ KeyTiles(const Regions& regions, int i0) : regions(regions), i0(i0) {
    const int count = min(S::kRows, regions.seqlen - i0), lane = threadIdx.x % 32;
    low = gpu::uniform(regions.window(i0)), end = i0 + count;
    const int high = regions.window(end - 1), known = regions.rank_by_warp(low);
    // strictly ascending: at most as many as there are keys between
    pivots = gpu::uniform(regions.rank(high, known, min(regions.num_pivots, known + (high - low))));
    pivot_tiles = (pivots + S::kTile - 1) / S::kTile;
    tiles = pivot_tiles + (end - low + S::kTile - 1) / S::kTile;
    first = i0 + gpu::uniform(threadIdx.x / 32) * S::kWarpRows;
    last = min(first + S::kWarpRows, end) - 1;
#pragma unroll
    for (int r = 0; r < S::kRowUnits; ++r)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = first + 16 * r + 8 * e + lane / 4, begin = regions.window(i);
        window[r][e] = begin;
        below[r][e] = low == high ? known : regions.rank(begin, known, pivots);
      }
    window_first = gpu::uniform(regions.window(min(first, end - 1)));
    window_last = gpu::uniform(regions.window(max(last, i0)));
    rank_first = gpu::uniform(low == high ? known : regions.rank(window_first, known, pivots));
    rank_last = gpu::uniform(low == high ? known : regions.rank(window_last, known, pivots));
  }
  __device__ bool is_pivots(int t) const { return t < pivot_tiles; }
  // Of tile t the number of its first key, among pivots or among all.
  __device__ int start(int t) const { return is_pivots(t) ? t * S::kTile : low + (t - pivot_tiles) * S::kTile; }
  // What row (r, e) sees of the numbers that start(t) counts on.
  __device__ KeyRun seen(int t, int r, int e) const {
    const u32 i = first + 16 * r + 8 * e + threadIdx.x % 32 / 4;
    return is_pivots(t) ? KeyRun{0, below[r][e]} : KeyRun{window[r][e], i - window[r][e] + 1};
  }
  // Whether this warp's queries see nothing of tile t, or all.
  __device__ bool unseen(int t) const {
    const int x = start(t);
    return last < first || (is_pivots(t) ? x >= rank_last : x > last || x + S::kTile <= window_first);
  }
  __device__ bool whole(int t) const {
    const int x = start(t);
    return is_pivots(t) ? x + S::kTile <= rank_first : x >= window_last && x + S::kTile <= first + 1;
  }
};

// Copies the keys of tiles one after another. Pivots are looked up a tile ahead, for a copy needs to know its row.
template <class T, int D, class S, class Layout>
struct KeyLoader {
  using Copy = TileCopy<D, S>;
  const KeyTiles<D, S>& tiles;
  const char *k, *v;
  int64_t k_stride, v_stride;  // bytes
  u32 slots, pivots[Copy::kEach];

  __device__ KeyLoader(const KeyTiles<D, S>& tiles, const ThreeRegionAttention& a, int b, int kv, u32 slots)
      : tiles(tiles),
        k(reinterpret_cast<const char*>(a.k.at<T>(b, kv))),
        v(reinterpret_cast<const char*>(a.v.at<T>(b, kv))),
        k_stride(a.k.stride[2] * 2),
        v_stride(a.v.stride[2] * 2),
        slots(slots) {
    look_up(0);
  }
  __device__ void look_up(int t) {
    const Copy copy;
#pragma unroll
    for (int i = 0; i < Copy::kEach; ++i) {
      const int x = tiles.start(t) + copy.row(i);
      pivots[i] = tiles.is_pivots(t) && x < tiles.pivots ? tiles.regions.pivot(x) : ~0u;
    }
  }
  __device__ void operator()(int t, u32 slot) {
    const u32 at = slots + slot * Layout::kSlotBytes;
    const Copy copy;
#pragma unroll
    for (int i = 0; i < Copy::kEach; ++i) {
      if (!copy.mine(i)) continue;
      const int x = tiles.start(t) + copy.row(i);
      const int key = tiles.is_pivots(t) ? tiles.regions.key(pivots[i]) : x < tiles.end ? x : -1;
      copy(at, i, k, k_stride, key);
      copy(at + Layout::kTileBytes, i, v, v_stride, key);
    }
    look_up(t + 1);
  }
};

// All tiles of keys through the ring: visit(t, n, at, whole, bias) for each N units of a tile of which this warp's
// queries see any, the n-th key on, at `at` in a slot; whole: they see all of the tile.
template <class T, int D, class S, class Layout, class Visit>
__device__ void stream_keys(const Ring<S>& ring, const KeyTiles<D, S>& keys, KeyLoader<T, D, S, Layout> load,
                            float pivot_bias, Visit visit) {
  ring.stream(
      keys.tiles, [&](int t, u32 slot) { load(t, slot); },
      [&](int t, u32 slot) {
        if (keys.unseen(t)) return;
        const bool whole = keys.whole(t);
        const float bias = keys.is_pivots(t) ? pivot_bias : 0;
#pragma unroll 1
        for (int n = 0; n < S::kTile / 16; n += S::kAtOnce)
          visit(t, 16 * n, slot * Layout::kSlotBytes + n * Unit<D>::kBytes, whole, bias);
      });
}

// z of what is not seen becomes `none`, whatever it was: keys that nobody may see can be infinite or NaN, and adding to
// them, or starting their sums from infinity, would not hide that.
template <int N>
__device__ void hide(float (&z)[N][2][4], const KeyRun (&seen)[2], int start, float none = -INFINITY) {
#pragma unroll
  for (int u = 0; u < N; ++u)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int x = start + 16 * u + 8 * h + 2 * static_cast<int>(threadIdx.x % 4) + e % 2;
        if (!seen[e / 2].has(x)) z[u][h][e] = none;
      }
}

}  // namespace cogview::cuda
