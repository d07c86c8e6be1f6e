// Of the forward of three_region_hopper.cuh: tiles in shared memory, the order of work, and the warp group that copies.
#pragma once

#include <type_traits>

#include "hopper.cuh"
#include "matrix_descriptor.h"
#include "three_region_hopper.h"
#include "three_region_place.cuh"

namespace cogview::cuda::hopper {

using gpu::u32;
using gpu::u64;

constexpr int kKeys = 128, kGroups = 2, kQueries = 64 * kGroups;  // of a tile; groups that compute
static_assert(kQueries == kBlockRows);

// Rows of D 16-bit elements as halves of 64 columns, rows of 128 bytes swizzled as wgmma has them.
template <int D, int kRows>
struct Tile {
  static constexpr u32 kBytes = kRows * D * 2, kHalf = kRows * 128;
  __device__ static u32 part(u32 row, u32 part) {  // of 16 bytes
    return part / 8 * kHalf + row * 128 + ((part ^ row) % 8) * 16;
  }
  // Descriptors of rows from `at` on, of which 16 columns are summed over, the k-th ones; of columns, likewise.
  __device__ static u64 rows(u32 at) { return matrix_descriptor(at, 0, 1024, Swizzle::k128); }
  __device__ static u64 columns(u32 at) { return matrix_descriptor(at, kHalf, 1024, Swizzle::k128); }
  __device__ static u64 along(u64 rows, int k) { return moved(rows, k / 4 * kHalf + k % 4 * 32); }
  __device__ static u64 across(u64 columns, int k) { return moved(columns, k * 2048); }

 private:
  __device__ static u64 moved(u64 descriptor, u32 bytes) {  // no carry: addresses are below 2^18
    return (descriptor >> 32 << 32) | (u32(descriptor) + (bytes >> 4));
  }
};

template <int D>
struct Shared {
  static constexpr int kStages = D == 64 ? 4 : 2;
  using Keys = Tile<D, kKeys>;
  using Queries = Tile<D, kQueries>;
  static constexpr u32 keys = 0, values = keys + kStages * Keys::kBytes, queries = values + kStages * Keys::kBytes,
                       positions = queries + 2 * Queries::kBytes, items = positions + kStages * kKeys * 4,
                       barriers = items + 64, bytes = barriers + (2 * kStages + 4) * 8;
  static_assert(bytes <= 227 * 1024);
  u32 base;
  __device__ u32 key_tile(u32 slot) const { return base + keys + slot * Keys::kBytes; }
  __device__ u32 value_tile(u32 slot) const { return base + values + slot * Keys::kBytes; }
  __device__ u32 query_tile(u32 slot) const { return base + queries + slot * Queries::kBytes; }
  __device__ u32 position(u32 slot, u32 i) const { return base + positions + slot * kKeys * 4 + i * 4; }
  __device__ u32 item(u32 slot) const { return base + items + slot * 32; }
  __device__ u32 full(u32 slot) const { return base + barriers + slot * 8; }
  __device__ u32 empty(u32 slot) const { return full(kStages + slot); }
  __device__ u32 queries_full(u32 slot) const { return full(2 * kStages + slot); }
  __device__ u32 queries_empty(u32 slot) const { return full(2 * kStages + 2 + slot); }
};

struct Problem {
  Tensor4 q, k, v, out;  // of packed sequences as samples that lie a token apart
  float* lse;
  Indices pivots;
  int64_t pivot_rows;  // from those of one sample to the next
  int heads, kv_heads, seqlen, num_pivots, block_size, window_blocks;
  int tiles, total_heads, section;  // tiles of a head's queries; heads at a time
  float scale, bias;                // to base 2; scale > 0
  bool negate;                      // scores
  PackedSequences packed;
};

__device__ inline char* rows_of(const Tensor4& x, int b, int h) {
  return static_cast<char*>(x.data) + (b * x.stride[0] + h * x.stride[1]) * 2;
}

__device__ inline int window_start(int i, const Problem& a) {
  return max(i / a.block_size - a.window_blocks + 1, 0) * a.block_size;
}

// A tile of queries. The producer finds out, for all.
struct Item {
  int b, h, first;     // b: sample, of packed sequences the first token
  int low, high;       // first keys of the windows of its first and last query
  int end;             // of keys
  int before, pivots;  // pivots before these two windows
  int number;          // of the sequence; not for the others
  __device__ int pivot_tiles() const { return (pivots + kKeys - 1) / kKeys; }
  __device__ int tiles() const { return pivot_tiles() + (end - low + kKeys - 1) / kKeys; }
  // Of all the n-th: as many heads at a time as L2 holds the keys of, of these the last tiles, which see most keys,
  // first.
  template <bool kPacked>
  __device__ Item(int n, const Problem& a, std::bool_constant<kPacked>) {
    const int group = n / (a.section * a.tiles), rest = n - group * a.section * a.tiles;
    const int size = min(a.section, a.total_heads - group * a.section);
    const int tile = a.tiles - 1 - rest / size, head = group * a.section + rest % size;
    b = head / a.heads, h = head % a.heads, first = tile * kQueries;
    number = b;
    int seqlen = a.seqlen;
    if constexpr (kPacked) {
      const PackedRows rows(a.packed.longest);
      const Sequence of = a.packed.at(first, rows);
      number = of.number, b = of.sample, seqlen = of.seqlen;
      first -= static_cast<int>(rows.first(number, b));
    }
    end = min(first + kQueries, seqlen);
    low = window_start(first, a), high = window_start(end - 1, a);
  }
  __device__ explicit Item(u32 at) {
    const uint4 x = gpu::load_shared16(at), y = gpu::load_shared16(at + 16);
    b = gpu::uniform(x.x), h = gpu::uniform(x.y), first = gpu::uniform(x.z), low = gpu::uniform(x.w);
    high = gpu::uniform(y.x), end = gpu::uniform(y.y), before = gpu::uniform(y.z), pivots = gpu::uniform(y.w);
  }
  // Behind its queries; of a batch what costs no register is as good.
  template <bool kPacked>
  __device__ int end_of(const Problem& a) const {
    return kPacked ? end : a.seqlen;
  }
  // Where lse of the sequence's head begins.
  template <bool kPacked>
  __device__ int64_t statistics(const Problem& a) const {
    return kPacked ? int64_t(h) * a.seqlen + b : (int64_t(b) * a.heads + h) * a.seqlen;
  }
  // There is nothing to do, and for those who get it there will be no more.
  __device__ bool empty() const { return first < 0 || first >= end; }
  __device__ static void put_empty(u32 at) { gpu::store_shared16(at, uint4{}), gpu::store_shared16(at + 16, uint4{}); }
  __device__ void put(u32 at) const {
    gpu::store_shared16(at, uint4{u32(b), u32(h), u32(first), u32(low)});
    gpu::store_shared16(at + 16, uint4{u32(high), u32(end), u32(before), u32(pivots)});
  }
};

__device__ inline int pivot(const Indices& pivots, int64_t n) {  // the lower half of what is wide
  return __ldg(static_cast<const int*>(pivots.data) + (pivots.wide ? 2 * n : n));
}

// Pivots before key j, by a warp: 32 at a time.
__device__ inline int pivots_before(int j, const Problem& a, int b, u32 lane) {
  int low = 0, high = a.num_pivots;
  while (low < high) {
    const int step = (high - low + 31) / 32, n = low + int(lane + 1) * step - 1;
    const bool before = n < high && u32(pivot(a.pivots, b * a.pivot_rows + n)) < u32(j);
    const int seen = __popc(__ballot_sync(~0u, before));
    high = min(high, low + (seen + 1) * step - 1);
    low += seen * step;
  }
  return low;
}

template <int D, bool kPacked>
struct Producer {
  using S = Shared<D>;
  static constexpr u32 kParts = D / 8, kRowsAtOnce = 32 / kParts;
  S shared;
  u32 warp, lane;

  // 32 rows of a tile, a warp's: of the window and all there, from `index` of lane 0 on; or row `index` of lane r is
  // the tile's r-th, zeros where that is negative.
  __device__ void copy(u32 tile, const char* from, u32 stride, int index, bool run, bool whole) const {
    const u32 to = tile + S::Keys::part(32 * warp + lane / kParts, lane % kParts);
    const auto at = [&](u32 i) { return (to ^ i * kRowsAtOnce % 8 * 16) + i * kRowsAtOnce * 128; };
    if (whole && run) {
      from += int64_t(gpu::uniform(index - int(lane)) + lane / kParts) * stride;
#pragma unroll
      for (u32 i = 0; i < kParts; ++i) gpu::copy16(at(i), from + u64(kRowsAtOnce * stride) * i, true);
    } else if (whole) {
#pragma unroll
      for (u32 i = 0; i < kParts; ++i)
        gpu::copy16(at(i), from + u64(u32(__shfl_sync(~0u, index, i * kRowsAtOnce + lane / kParts))) * stride, true);
    } else {
#pragma unroll 1
      for (u32 i = 0; i < kParts; ++i) {
        const int source = __shfl_sync(~0u, index, i * kRowsAtOnce + lane / kParts);
        gpu::copy16(at(i), from + u64(u32(max(source, 0))) * stride, source >= 0);
      }
    }
  }

  // Where queries go next, once that is free.
  __device__ u32 query_slot(u32 turn) const {
    const u32 slot = turn % 2;
    if (turn >= 2) gpu::barrier_wait(shared.queries_empty(slot), (turn / 2 - 1) & 1);
    return slot;
  }

  __device__ void run(const Problem& a, int items) {
    u32 step = 0, turn = 0;
    for (int n = blockIdx.x; n < items; n += gridDim.x) {
      Item item(n, a, std::bool_constant<kPacked>{});
      if (kPacked && item.empty()) continue;
      const int kv = item.h / (a.heads / a.kv_heads);
      const u32 slot = query_slot(turn);
      const char* q = rows_of(a.q, item.b, item.h);
#pragma unroll 1
      for (u32 i = 0; i < kQueries * kParts / 128; ++i) {
        const u32 at = i * 128 + warp * 32 + lane, row = at / kParts;
        const bool there = item.first + int(row) < item.end_of<kPacked>(a);
        gpu::copy16(shared.query_tile(slot) + S::Queries::part(row, at % kParts),
                    q + (item.first + (there ? int64_t(row) : 0)) * a.q.stride[2] * 2 + at % kParts * 16, there);
      }
      gpu::arrive_after_copies(shared.queries_full(slot));
      item.before = pivots_before(item.low, a, item.number, lane);
      item.pivots = item.high == item.low ? item.before : pivots_before(item.high, a, item.number, lane);
      if (threadIdx.x == 0) {
        item.put(shared.item(slot));
        gpu::barrier_arrive(shared.queries_full(slot));
      }

      const char* k = rows_of(a.k, item.b, kv) + lane % kParts * 16;
      const char* v = rows_of(a.v, item.b, kv) + lane % kParts * 16;
      const int64_t pivots = item.number * a.pivot_rows;
      const int pivot_tiles = item.pivot_tiles(), tiles = item.tiles();
      const u32 k_stride = a.k.stride[2] * 2, v_stride = a.v.stride[2] * 2;
      int before = -1;
      bool whole_before = false;
      for (int t = 0; t <= tiles; ++t, ++step) {
        const u32 at = step % S::kStages;
        const int column = t * kKeys + warp * 32 + lane;
        int index = -1;
        bool whole;
        if (t < pivot_tiles) {
          whole = (t + 1) * kKeys <= item.pivots;
          if (column < item.pivots) index = min(max(pivot(a.pivots, pivots + column), 0), item.end_of<kPacked>(a) - 1);
        } else {
          const int key = item.low + (t - pivot_tiles) * kKeys;
          whole = key + kKeys <= item.end;
          index = key + warp * 32 + lane;
          if (index >= item.end) index = -1;
        }
        if (step >= S::kStages) gpu::barrier_wait(shared.empty(at), (step / S::kStages - 1) & 1);
        if (t < tiles) {
          if (t < pivot_tiles && (t + 1) * kKeys > item.before) {
            const int* from = static_cast<const int*>(a.pivots.data) +
                              (pivots + min(column, a.num_pivots - 1)) * (a.pivots.wide ? 2 : 1);
            gpu::copy4(shared.position(at, 32 * warp + lane), from, column < item.pivots);
          }
          copy(shared.key_tile(at), k, k_stride, index, t >= pivot_tiles, whole);
        }
        if (t > 0) copy(shared.value_tile(at), v, v_stride, before, t > pivot_tiles, whole_before);
        gpu::arrive_after_copies(shared.full(at));
        before = index, whole_before = whole;
      }
      ++turn;
    }
    if (!kPacked) return;
    const u32 slot = query_slot(turn);
    gpu::arrive_after_copies(shared.queries_full(slot));
    if (threadIdx.x == 0) {
      Item::put_empty(shared.item(slot));
      gpu::barrier_arrive(shared.queries_full(slot));
    }
  }
};

}  // namespace cogview::cuda::hopper
