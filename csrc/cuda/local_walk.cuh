// A block of threads walks down strips of images, one after the other, and does not end between them. Blocks of 4 rows
// of the other side (keys, or queries where the owners are keys) go through a ring in shared memory, each loaded once a
// strip; groups of warps, one warp for each tile of the strip, take the steps in turn, each at its own pace.
//
// Memory. Rows of cells lie at any offsets that are multiples of 16 bytes; each row of the box around a strip is read
// once by cp.async, cells outside of the image are zeros that are not read.
//
// Barriers: full[slot], that a block has come (all threads of the group that loads it); done[step % 64], that a step no
// longer needs its blocks (its warps). When it has done step t a group loads block t - late + blocks into the slot of
// block t - late, and waits for all steps that may need that: for at least as many as there are groups, so that it
// never takes a slot's last but one phase for its next. The later, the less it waits for groups that began before it.
#pragma once

#include "local_strips.h"
#include "warp_tiles.cuh"

namespace cogview::cuda {

template <int D>
struct Strip {
  static constexpr int kTiles = strip_tiles(D), kThreads = 32 * kTiles;  // of a group
};

// The n-th thing that this block of threads walks over.
struct Item {
  int strip, owner, other, batch;  // other: head of the streamed side
  int phase_y, phase_x, height, width, repeat;
  Steps steps;
  __device__ Item(const Strips& p, int n) : steps(p.y, 0, 0, 1, p.unit_rows) {
    int index = blockIdx.x + n / p.repeats * gridDim.x;
    repeat = n % p.repeats;
    strip = index % p.strips, index /= p.strips;
    const int chunk = index % p.chunks;
    index /= p.chunks;
    phase_x = index % p.x.axis.dilation, index /= p.x.axis.dilation;
    phase_y = index % p.y.axis.dilation, index /= p.y.axis.dilation;
    owner = index % p.heads, batch = index / p.heads;
    other = p.y.keys ? owner * p.repeats + repeat : owner / p.group;
    height = p.y.axis.cells(phase_y), width = p.x.axis.cells(phase_x);
    steps = Steps(p.y, height, chunk, p.chunk_steps, p.unit_rows);
  }
  // Of the first cell of the sub-image in a tensor.
  __device__ int64_t offset(const Plane& t, const Strips& p, int head) const {
    return batch * t.batch + head * t.head + (static_cast<int64_t>(phase_y) * p.x.axis.size + phase_x) * t.line;
  }
  __device__ char* in(const Plane& t, const Strips& p, int head) const { return t.at + offset(t, p, head); }
};

// The unit of the box at which a strip begins.
template <int D>
__device__ int box_origin(const Strips& p, const Item& item) {
  const int tile = item.strip * Strip<D>::kTiles;
  return p.x.axis.shift && 4 * tile < item.width ? p.x.units(tile, item.width).lo : tile;
}

// One thread's share of the blocks that its group loads; kUnits: of a box, 0 where that is known at run time.
template <int D, int kUnits>
struct Loader {
  static constexpr u32 kThreads = Strip<D>::kThreads, kParts = D / 8, kPer = 16 * kParts;  // parts of a unit
  static constexpr u32 kPasses = kThreads < kPer ? kPer / kThreads : 1, kAtOnce = kThreads < kPer ? 1 : kThreads / kPer;
  static constexpr u32 kCells = kThreads / kParts;  // of a unit at once
  static_assert(kPasses == 1 || (kCells % 4 == 0 && kPasses * kCells == 16));
  const char *a, *b;  // the thread's first cell in its group's next block
  u32 there;          // its columns that are in the image, a bit each
  u32 to[kPasses];

  __device__ static u32 first(u32 thread) { return thread / kPer; }           // unit
  __device__ static u32 row(u32 thread) { return thread / kParts % 16 / 4; }  // of the block

  // Of blocks that begin with row `top`, column `left`.
  __device__ void aim(const Strips& p, const Plane& ap, const Plane& bp, const Item& item, u32 thread, int top,
                      int left) {
    const u32 cell = thread / kParts % 16, part = thread % kParts;
    const u32 first = Loader::first(thread);
    const int64_t y = top + static_cast<int>(row(thread)), x = left + static_cast<int>(first * 4 + cell % 4);
    a = item.in(ap, p, item.other) + y * ap.row + x * ap.cell + part * 16;
    b = item.in(bp, p, item.other) + y * bp.row + x * bp.cell + part * 16;
    there = 0;
    const u32 units = kUnits ? kUnits : p.units;
    for (u32 i = 0; first + i * kAtOnce < units; ++i) {
      const int at = left + static_cast<int>(4 * (first + i * kAtOnce) + cell % 4);
      if (at >= 0 && at < item.width) there |= 1u << i;
    }
#pragma unroll
    for (u32 pass = 0; pass < kPasses; ++pass)
      to[pass] = first * Unit<D>::kBytes + Unit<D>::part(cell % (kPasses == 1 ? 16 : kCells) + pass * kCells, part);
  }
  __device__ void load(const Strips& p, const Plane& ap, const Plane& bp, u32 thread, int top, int height,
                       u32 slot) const {
    const u32 units = kUnits ? kUnits : p.units, first = Loader::first(thread);
#pragma unroll
    for (u32 pass = 0; pass < kPasses; ++pass) {
      const u32 down = pass * kCells / 4,
                bits = static_cast<u32>(top) + row(thread) + down < static_cast<u32>(height) ? there : 0;
      const char *from_a = a + down * ap.row, *from_b = b + down * bp.row;
      u32 to = slot + this->to[pass];
#pragma unroll
      for (u32 i = 0; i < (units + kAtOnce - 1) / kAtOnce; ++i) {
        if (units % kAtOnce == 0 || first + i * kAtOnce < units) {
          const bool ok = bits >> i & 1;
          gpu::copy16(to, from_a, ok);
          gpu::copy16(to + p.values, from_b, ok);
        }
        to += kAtOnce * Unit<D>::kBytes;
        from_a += kAtOnce * 4 * ap.cell, from_b += kAtOnce * 4 * bp.cell;
      }
    }
  }
  __device__ void advance(const Plane& ap, const Plane& bp, int blocks) {
    a += 4 * blocks * ap.row, b += 4 * blocks * bp.row;
  }
};

// What else blocks need, copied by the group's threads: nothing, or Also has the same two functions.
struct Nothing {
  __device__ void aim(const Strips&, const Item&, int) {}
  __device__ void load(const Strips&, u32, int, int, u32, u32) const {}
};

template <int D, int kUnits, class Also = Nothing>
struct Walk {
  const Strips& p;
  const Plane &a, &b;
  Also also;
  u32 base, thread;  // of the group
  int warp, lane, group, tile;
  int total;        // virtual steps of this block of threads
  int t, n, v;      // virtual step of all, item, virtual step of it
  u32 slot, phase;  // of block t in the ring
  bool released = false;
  // the group's next block to load
  Loader<D, kUnits> loader;
  int load_n, load_v, load_top, load_height;

  __device__ Walk(const Strips& p, const Plane& a, const Plane& b, Also also = {}) : p(p), a(a), b(b), also(also) {
    base = gpu::shared_address(gpu::shared_memory());
    warp = gpu::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    group = warp / Strip<D>::kTiles, tile = warp % Strip<D>::kTiles, thread = threadIdx.x % Strip<D>::kThreads;
    const int items = (p.items - 1 - static_cast<int>(blockIdx.x)) / static_cast<int>(gridDim.x) + 1;
    total = items * p.repeats * p.virtual_steps;
    for (int i = threadIdx.x; i < p.blocks; i += blockDim.x) gpu::barrier_init(full(i), Strip<D>::kThreads);
    for (int i = threadIdx.x; i < kStepBarriers; i += blockDim.x) gpu::barrier_init(done(i), Strip<D>::kTiles);
  }
  // After a barrier of all threads.
  __device__ void start() {
    load_n = 0, load_v = group;
    aim();
    for (t = group; t < (total < p.blocks ? total : p.blocks); t += p.groups) {
      load(t);
      next_block(p.groups);
    }
    load_n = 0, load_v = group + p.blocks - p.late;
    aim();
    t = group, n = 0, v = group, slot = group, phase = 0;
    while (v >= p.virtual_steps) v -= p.virtual_steps, ++n;
  }
  __device__ bool more() const { return t < total; }

  __device__ u32 full(u32 slot) const { return base + p.full + 8 * slot; }
  __device__ u32 done(u32 step) const { return base + p.done + 8 * step; }
  // The slot of block t + u, when it has come.
  __device__ u32 wait(u32 u) const {
    const bool wraps = slot + u >= static_cast<u32>(p.blocks);
    const u32 at = wraps ? slot + u - p.blocks : slot + u;
    gpu::barrier_wait(full(at), phase ^ wraps);
    return at;
  }

  // The group's next step of this item after step s of [.., end), or steps.end.
  __device__ int following(const Steps& steps, int s, int end) const {
    if (!p.y.axis.shift) return min(s + p.groups, steps.end);
    if (s + 1 < end) return s + 1;
    if (v + p.groups >= p.virtual_steps) return steps.end;
    const int next = steps.begin(v + p.groups);
    return next < steps.begin(v + p.groups + 1) ? next : steps.end;
  }
  // This warp needs the blocks of step t no longer. Block t has come then, also if no step of the image needs it: who
  // waits for steps knows that the copies into their slots are over.
  __device__ void release() {
    if (released) return;
    released = true;
    gpu::barrier_wait(full(slot), phase);
    __syncwarp();
    if (lane == 0) gpu::barrier_arrive(done(t % kStepBarriers));
  }
  // To the group's next step; the slot of block t - late takes another one when nobody needs it. True: of another item.
  __device__ bool next() {
    release();
    released = false;
    const int of = t - p.late;
    if (of >= 0 && of + p.blocks < total + p.groups - 1) {  // also for the blocks that others load last
      const int back = p.unit_rows > p.groups ? p.unit_rows : p.groups;
      for (int u = 0; u < back && u <= of; ++u)
        gpu::barrier_wait(done((of - u) % kStepBarriers), (of - u) / kStepBarriers & 1);
    }
    if (of + p.blocks < total) {
      if (of >= 0) load(slot >= static_cast<u32>(p.late) ? slot - p.late : slot - p.late + p.blocks);
      next_block(p.groups);
    }
    t += p.groups, slot += p.groups, v += p.groups;
    while (slot >= static_cast<u32>(p.blocks)) slot -= p.blocks, phase ^= 1;
    if (v < p.virtual_steps) return false;
    while (v >= p.virtual_steps) v -= p.virtual_steps, ++n;
    return true;
  }

 private:
  __device__ void load(u32 slot) {
    loader.load(p, a, b, thread, load_top, load_height, base + slot * p.block);
    also.load(p, thread, load_top, load_height, base + p.rows + slot * p.row_block, Strip<D>::kThreads);
    gpu::arrive_after_copies(full(slot));
  }
  // At block load_v of item load_n, which may be beyond the last.
  __device__ void aim() {
    while (load_v >= p.virtual_steps) load_v -= p.virtual_steps, ++load_n;
    if (load_n * p.virtual_steps >= total) return;
    const Item item(p, load_n);
    load_top = 4 * (item.steps.origin + load_v) - p.y.above, load_height = item.height;
    const int left = 4 * box_origin<D>(p, item) - p.x.above;
    loader.aim(p, a, b, item, thread, load_top, left);
    also.aim(p, item, left);
  }
  __device__ void next_block(int blocks) {
    load_v += blocks;
    if (load_v < p.virtual_steps) {
      load_top += 4 * blocks;
      loader.advance(a, b, blocks);
    } else {
      aim();
    }
  }
};

}  // namespace cogview::cuda
