// Gradients of keys in three-region attention: as pivots, of all queries behind their windows, in parts of these whose
// sums stay in float32; then as keys of windows, which begin with their parts as pivots.
#pragma once

#include "key_pass.cuh"
#include "three_region_attention.h"
#include "three_region_pattern.cuh"

namespace cogview::cuda {

// Both ways to see a key are runs of queries [begin, end), of all heads of its group. This is part `split` of `splits`.
template <class S>
struct QueryRuns {
  struct Tile {
    int head, begin;
  };
  const Regions& regions;
  const Programs& programs;
  int first_head, begin, end, head_tiles;

  __device__ QueryRuns(const Regions& regions, const Programs& programs, int kv, int from, int to, int split = 0,
                       int splits = 1)
      : regions(regions), programs(programs), first_head(gpu::uniform(kv * programs.group)) {
    const int64_t all = max(0, (to - from + S::kTile - 1) / S::kTile);
    const int first = static_cast<int>(all * split / splits), last = static_cast<int>(all * (split + 1) / splits);
    begin = gpu::uniform(from + first * S::kTile), end = gpu::uniform(min(to, from + last * S::kTile));
    head_tiles = gpu::uniform(last - first);
  }
  __device__ int tiles() const { return head_tiles * programs.group; }
  __device__ Tile tile(int t) const {
    const int head = t / head_tiles;
    return {first_head + head, begin + (t - head * head_tiles) * S::kTile};
  }
  __device__ int query(const Tile& tile, int n) const { return tile.begin + n < end ? tile.begin + n : -1; }
};

// Rows [first, first + S::kRows) of the list of pivots.
template <class S>
struct PivotRows : QueryRuns<S> {
  using typename QueryRuns<S>::Tile;
  static constexpr bool kBias = true;
  int first, valid;  // pivots there are

  __device__ PivotRows(const Regions& regions, const Programs& programs, int first, int kv, int split, int splits)
      : PivotRows(regions, programs, first, kv, split, splits, regions.rank_by_warp(regions.seqlen)) {}
  __device__ PivotRows(const Regions& regions, const Programs& programs, int first, int kv, int split, int splits,
                       int valid)
      : QueryRuns<S>(regions, programs, kv, first < valid ? behind(regions, first) : regions.seqlen, regions.seqlen,
                     split, splits),
        first(first),
        valid(valid) {}
  __device__ int key(int r) const { return first + r < valid ? this->regions.key(this->regions.pivot(first + r)) : -1; }
  __device__ static int behind(const Regions& regions, int pivot) {
    return regions.behind(max(regions.key(regions.pivot(pivot)), 0));
  }
  // The first query that sees it. Of padding that a warp has among pivots that of the last: its sums are not used.
  __device__ u32 row(int r) const {
    return first + r / S::kWarpRows * S::kWarpRows < valid ? behind(this->regions, min(first + r, valid - 1))
                                                           : this->regions.seqlen;
  }
  __device__ bool seen(u32 begin, int, const Tile& tile, int n) const {
    return static_cast<u32>(tile.begin + n) >= begin;
  }
  __device__ bool unseen(const Tile& tile, const WarpRows& rows) const {
    return tile.begin + S::kTile <= static_cast<int>(rows.first);
  }
  __device__ bool whole(const Tile& tile, const WarpRows& rows) const {
    return tile.begin >= static_cast<int>(rows.last);
  }
};

// Keys [first, first + S::kRows) in windows.
template <class S>
struct WindowRows : QueryRuns<S> {
  using typename QueryRuns<S>::Tile;
  static constexpr bool kBias = false;

  __device__ WindowRows(const Regions& regions, const Programs& programs, int first, int kv)
      : QueryRuns<S>(regions, programs, kv, first, regions.behind(min(first + S::kRows, regions.seqlen) - 1)) {}
  __device__ int key(int r) const { return this->begin + r < this->regions.seqlen ? this->begin + r : -1; }
  // How many queries see it, the first of which it is itself.
  __device__ u32 row(int r) const { return this->regions.behind(this->begin + r) - (this->begin + r); }
  __device__ bool seen(u32 count, int r, const Tile& tile, int n) const {
    return static_cast<u32>(tile.begin + n - (this->begin + r)) < count;  // those before wrap around
  }
  __device__ bool unseen(const Tile& tile, const WarpRows& rows) const {
    const int last = this->begin + rows.end - 1;
    return tile.begin + S::kTile <= this->begin + rows.begin || tile.begin >= last + static_cast<int>(rows.last);
  }
  __device__ bool whole(const Tile& tile, const WarpRows& rows) const {
    return tile.begin >= this->begin + rows.end - 1 &&
           tile.begin + S::kTile <= this->begin + rows.begin + static_cast<int>(rows.first);
  }
};

// Sums of pivots: [dk or dv, splits, B * kv_heads, part_rows, D].
template <bool kPacked>
struct PivotParts {
  float* data;
  int splits;
  int64_t rows, split_size, size;  // of a head; of a split's dk; of all of them
  __device__ PivotParts(const ThreeRegionAttention& a, const ThreeRegionScratch& scratch)
      : data(scratch.parts),
        splits(scratch.splits),
        rows(part_rows<kPacked>(a)),
        split_size(a.batch * a.kv_heads * rows * a.head_dim),
        size(splits * split_size) {}
  // Of a split, the pivot's row of dk; dv's is `size` further on.
  __device__ float* at(const ThreeRegionAttention& a, int split, const BlockPlace<kPacked>& place, int pivot) const {
    const int64_t first = kPacked ? PackedRows(a.num_pivots).first(place.number, place.sample) : 0;
    return data + split * split_size + (place.head * rows + first + pivot) * a.head_dim;
  }
};

template <class T, int D, bool kPacked>
struct ThreeRegionGradKey {
  using Pass = KeyPass<T, D, kPacked>;
  using Place = BlockPlace<kPacked>;
  using Shape = typename Pass::Shape;
  using Layout = typename Pass::Layout;

  __device__ static void pivots(const ThreeRegionAttention& a, const ThreeRegionScratch& scratch, const Logits& logits,
                                const Programs& programs) {
    const Place place(a, programs, a.kv_heads, Shape::kRows, a.num_pivots);
    if (place.empty()) return;
    const Regions regions(a, place);
    const PivotRows<Shape> pattern(regions, programs, place.first, place.h, blockIdx.y, scratch.splits);
    if (pattern.begin >= regions.seqlen) return;  // nobody sees them as pivots, nor asks for their parts
    Pass::run(a, a.k, a.v, scratch.stats, place.sample, place.h, logits, pattern,
              [&](int r, const auto& dk, const auto& dv) {
                const Place place(a, programs, a.kv_heads, Shape::kRows, a.num_pivots);
                const PivotParts<kPacked> parts(a, scratch);
                const int lane = threadIdx.x % 32, unit = place.first + threadIdx.x / 32 * Shape::kWarpRows + 16 * r;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  const int pivot = unit + 8 * e + lane / 4;
                  if (pivot >= a.num_pivots) continue;
                  float* to = parts.at(a, blockIdx.y, place, pivot) + 2 * (lane % 4);
#pragma unroll
                  for (int j = 0; j < D / 8; ++j) {
                    gpu::store_global_pair(to + 8 * j, {dk[j][2 * e], dk[j][2 * e + 1]});
                    gpu::store_global_pair(to + parts.size + 8 * j, {dv[j][2 * e], dv[j][2 * e + 1]});
                  }
                }
              });
  }

  __device__ static void window(const ThreeRegionAttention& a, const ThreeRegionScratch& scratch, const Logits& logits,
                                const Programs& programs) {
    const Place place(a, programs, a.kv_heads, Shape::kRows, a.max_seqlen);
    if (place.empty()) return;
    const Regions regions(a, place);
    const WindowRows<Shape> pattern(regions, programs, place.first, place.h);
    Pass::run(a, a.k, a.v, scratch.stats, place.sample, place.h, logits, pattern, [&](int r, auto& dk, auto& dv) {
      const Place place(a, programs, a.kv_heads, Shape::kRows, a.max_seqlen);
      const Regions regions(a, place);
      const PivotParts<kPacked> parts(a, scratch);
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      const int unit = place.first + warp * Shape::kWarpRows + 16 * r;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = unit + 8 * e + lane / 4;
        if (!parts.splits || j >= regions.seqlen || regions.behind(j) >= regions.seqlen) continue;
        const int pivot = regions.rank(j, 0, regions.num_pivots);
        if (pivot >= regions.num_pivots || regions.pivot(pivot) != static_cast<u32>(j)) continue;
#pragma unroll 1
        for (int split = 0; split < parts.splits; ++split) {
          const float* from = parts.at(a, split, place, pivot) + 2 * (lane % 4);
#pragma unroll
          for (int c = 0; c < D / 8; ++c) {
            const float2 x = gpu::load_global_pair(from + 8 * c), y = gpu::load_global_pair(from + parts.size + 8 * c);
            dk[c][2 * e] += x.x, dk[c][2 * e + 1] += x.y, dv[c][2 * e] += y.x, dv[c][2 * e + 1] += y.y;
          }
        }
      }
      const u32 room = gpu::shared_address(gpu::shared_memory()) + warp * Layout::kWarpBytes;
      const auto store = [&](const auto& acc, float factor, const Tensor4& to) {
        char* rows = reinterpret_cast<char*>(to.at<T>(place.sample, place.h)) + unit * to.stride[2] * 2;
        store_unit<T>(acc, factor, factor, room, rows, to.stride[2] * 2, regions.seqlen - unit);
      };
      store(dk, logits.scale, a.dk);
      store(dv, 1.0f, a.dv);
    });
  }
};

}  // namespace cogview::cuda
