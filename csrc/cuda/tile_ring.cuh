// Tiles of rows that stream through a ring of slots in shared memory, past rows that a block's warps own.
//
// All threads copy and all compute. A slot's `full` barrier waits for every thread's copies, its `empty` barrier for
// every warp. Both wait for all in each phase, and nobody skips one: a phase cannot be taken for the next but one.
#pragma once

#include <cstdint>

#include "warp_tiles.cuh"

namespace cogview::cuda {

// What a device must decide: units of rows that a warp owns, warps of a block, rows of a streamed tile, slots of the
// ring, units of a tile that a warp multiplies at once, whether what it owns is kept in registers.
template <int kRowUnits_, int kWarps_, int kTile_, int kSlots_, int kAtOnce_, bool kKept_ = true>
struct TileShape {
  static constexpr int kRowUnits = kRowUnits_, kWarps = kWarps_, kTile = kTile_, kSlots = kSlots_, kAtOnce = kAtOnce_;
  static constexpr bool kKept = kKept_;
  static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * kRowUnits, kRows = kWarpRows * kWarps;
  static constexpr int kBlocks = 256 / kThreads;  // at once on a processor, with 255 registers a thread
  static constexpr int kLag = kSlots / 2;         // tiles that the slowest warp may be behind the fastest
  static_assert(kTile % (16 * kAtOnce) == 0 && kLag >= 1);
};

// Shared memory: the slots, a tile of each of two tensors and kExtra bytes in each; kOwnBytes for what the warps own;
// barriers.
template <int D, class S, int kExtra, int kOwnBytes>
struct RingLayout {
  static constexpr int kTileBytes = S::kTile / 16 * Unit<D>::kBytes, kSlotBytes = 2 * kTileBytes + kExtra;
  static constexpr int kWarpBytes = S::kRowUnits * Unit<D>::kBytes;
  static constexpr int kOwn = S::kSlots * kSlotBytes;
  static constexpr int kFull = kOwn + kOwnBytes, kEmpty = kFull + 8 * S::kSlots, kBytes = kEmpty + 8 * S::kSlots;
  static_assert(kSlotBytes % 128 == 0 && S::kWarps * kWarpBytes <= kOwn && kBytes <= 99 * 1024);
};

template <class S>
struct Ring {
  u32 full, empty;  // the first of the slots' barriers

  // The others see it after the next __syncthreads.
  __device__ Ring(u32 full, u32 empty) : full(full), empty(empty) {
    if (threadIdx.x >= S::kSlots) return;
    gpu::barrier_init(full + 8 * threadIdx.x, S::kThreads);
    gpu::barrier_init(empty + 8 * threadIdx.x, S::kWarps);
  }
  // load(t, slot) starts this thread's copies of tile t, use(t, slot) is a warp's work with it.
  template <class Load, class Use>
  __device__ void stream(int tiles, Load load, Use use) const {
    constexpr int ahead = S::kSlots - S::kLag;
#pragma unroll 1
    for (int t = -ahead; t < tiles; ++t) {
      if (const int next = t + ahead; next < tiles) {
        const u32 slot = static_cast<u32>(next) % S::kSlots, turn = static_cast<u32>(next) / S::kSlots;
        if (turn) gpu::barrier_wait(empty + 8 * slot, (turn - 1) & 1);
        load(next, slot);
        gpu::arrive_after_copies(full + 8 * slot);
      }
      if (t < 0) continue;
      const u32 slot = static_cast<u32>(t) % S::kSlots, turn = static_cast<u32>(t) / S::kSlots;
      gpu::barrier_wait(full + 8 * slot, turn & 1);
      use(t, slot);
      __syncwarp();
      if (threadIdx.x % 32 == 0) gpu::barrier_arrive(empty + 8 * slot);
    }
  }
};

// How a block's threads share the copies of a tile: kLanes neighbours copy a row of each tensor.
template <int D, class S>
struct TileCopy {
  static constexpr int kLanes = Unit<D>::kWide ? 8 : 4, kParts = D / 8 / kLanes, kStep = S::kThreads / kLanes;
  static constexpr int kEach = (S::kTile + kStep - 1) / kStep;  // rows of a thread

  int thread = threadIdx.x;

  __device__ int row(int i) const { return thread / kLanes + i * kStep; }
  __device__ bool mine(int i) const { return S::kTile % kStep == 0 || row(i) < S::kTile; }
  // The i-th of this thread's rows from row `at` of a tensor, or zeros if that is -1.
  __device__ void operator()(u32 tile, int i, const char* base, int64_t stride, int at) const {
    const int lane = thread % kLanes;
    const char* from = base + max(at, 0) * stride + 16 * lane;
#pragma unroll
    for (int p = 0; p < kParts; ++p)
      gpu::copy16(tile + Unit<D>::part(row(i), lane + p * kLanes), from + 16 * p * kLanes, at >= 0);
  }
};

// A warp's unit of results, acc times a factor for each row, to rows in global memory by way of shared memory at
// `room`: 16 bytes at once. `there` rows of the 16 exist.
template <class T, int N>
__device__ void store_unit(const float (&acc)[N][4], float factor0, float factor1, u32 room, char* to, int64_t stride,
                           int there) {
  constexpr int D = 8 * N, kParts = D / 8;
  const u32 lane = threadIdx.x % 32;
  store_rows<T>(acc, factor0, factor1, Matrices<D, false>(room + Unit<D>::rows(lane)), 0);
  __syncwarp();
#pragma unroll
  for (u32 i = 0; i < 16 * kParts; i += 32) {
    const u32 row = (i + lane) / kParts, part = (i + lane) % kParts;
    const uint4 x = gpu::load_shared16(room + Unit<D>::part(row, part));
    if (static_cast<int>(row) < there) gpu::store_global16(to + row * stride + 16 * part, x);
  }
  __syncwarp();
}

// Programs in the order in which they start: `section` heads at a time, whose keys fit in the L2 cache together; among
// these the first tiles of all of them first.
struct Programs {
  int tiles, heads, section;
  int group;  // query heads of a head of keys
  struct Place {
    int tile, head;
  };
  __device__ Place place(unsigned program) const {
    const unsigned whole = static_cast<unsigned>(section) * tiles, group = program / whole, rest = program % whole;
    const unsigned size = min(section, heads - static_cast<int>(group) * section);
    return {gpu::uniform(rest / size), gpu::uniform(group * section + rest % size)};
  }
};

}  // namespace cogview::cuda
