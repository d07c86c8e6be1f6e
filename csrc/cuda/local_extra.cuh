// The keys that are in no image of the queries' size: a prefix that all queries see, and windows of a coarser image.
// Each group of warps streams those that its step sees, 32 at a time, through two slots of its own.
//
// Memory. Read by cp.async once for each step, mostly from L2; the mask of the prefix by each warp.
#pragma once

#include "local_own.cuh"

namespace cogview::cuda {

struct ExtraKeys {
  const char *k, *v;
  int64_t k_batch, k_head, k_cell, v_batch, v_head, v_cell;  // bytes
  float bias;                                                // in base 2
};

struct Extra {
  ExtraKeys prefix, coarse;
  const bool* mask;  // [batch, length] or null
  int length;
  int height, width, ratio_y, ratio_x, radius_y, radius_x;  // of the coarse image; height 0: none
  __device__ bool any() const { return length || height; }
};

// i / n for 0 <= i < kMostCoarse
struct Divide {
  float reciprocal;
  __device__ explicit Divide(int n) : reciprocal(1.f / n) {}
  __device__ int operator()(int i) const { return static_cast<int>((i + 0.5f) * reciprocal); }
};

template <int D>
struct ExtraStream {
  static constexpr u32 kKeys = 32, kThreads = Strip<D>::kThreads, kValues = 2 * Unit<D>::kBytes, kSlot = 2 * kValues;
  static_assert(kSlot == extra_slot(D));
  static constexpr u32 kBytes = extra_bytes(D);  // of a group
  const Extra& e;
  u32 base, thread, taken;  // slots so far
  int batch, kv;
  // of the step
  Span rows, columns;
  int prefix_slots, slots;

  __device__ ExtraStream(const Extra& e, u32 base, u32 thread) : e(e), base(base), thread(thread), taken(0) {
    if (thread < 2) {
      gpu::barrier_init(full(thread), kThreads);
      gpu::barrier_init(empty(thread), Strip<D>::kTiles);
    }
  }
  __device__ u32 full(u32 slot) const { return base + 2 * kSlot + 8 * slot; }
  __device__ u32 empty(u32 slot) const { return full(slot) + 16; }

  // Coarse cells that cells [lo, hi) of the image see on one axis.
  __device__ static Span coarse(int lo, int hi, int ratio, int radius, int n) {
    const int from = lo / ratio - radius, to = (hi - 1) / ratio + radius + 1;
    const int first = max(from, 0);
    return {first, max(min(to, n), first)};  // none for a strip that is beyond its sub-image
  }
  // Of a step at `row` of a sub-image.
  __device__ void start(const Strips& p, const Item& item, int row) {
    const int left = 4 * item.strip * Strip<D>::kTiles, right = min(left + 4 * Strip<D>::kTiles, item.width);
    const auto in_image = [](int phase, int lo, int hi, int dilation) {
      return Span{phase + lo * dilation, phase + (hi - 1) * dilation + 1};
    };
    const Span y = in_image(item.phase_y, row, min(row + 4, item.height), p.y.axis.dilation);
    const Span x = in_image(item.phase_x, left, right, p.x.axis.dilation);
    batch = item.batch, kv = item.other;
    prefix_slots = (e.length + kKeys - 1) / kKeys, slots = prefix_slots;
    rows = columns = {0, 0};
    if (e.height) {
      rows = coarse(y.lo, y.hi, e.ratio_y, e.radius_y, e.height);
      columns = coarse(x.lo, x.hi, e.ratio_x, e.radius_x, e.width);
      slots += ((rows.hi - rows.lo) * (columns.hi - columns.lo) + kKeys - 1) / kKeys;
    }
    for (int i = 0; i < 2 && i < slots; ++i) load(i);
  }
  // Which keys the i-th of the step's slots has: of the prefix, or of the box of coarse cells that the step sees.
  struct Run {
    bool dense;
    int first, count, across;
    Span rows, columns;
    Divide line;
    __device__ Run(const ExtraStream& s, int i)
        : dense(i < s.prefix_slots),
          first((dense ? i : i - s.prefix_slots) * static_cast<int>(kKeys)),
          across(s.columns.hi - s.columns.lo),
          rows(s.rows),
          columns(s.columns),
          line(across ? across : 1) {
      count = dense ? s.e.length : (rows.hi - rows.lo) * across;
    }
    struct Cell {
      int y, x;
    };
    // The coarse cell that the box has at `at`.
    __device__ Cell cell(int at) const {
      const int down = line(at);
      return {rows.lo + down, columns.lo + at - down * across};
    }
  };
  // Of the step's slots the i-th.
  __device__ void load(int i) const {
    const u32 n = taken + i, slot = n % 2;
    if (n >= 2) gpu::barrier_wait(empty(slot), (n / 2 - 1) & 1);
    const Run run(*this, i);
    const ExtraKeys& keys = run.dense ? e.prefix : e.coarse;
    const char *k = keys.k + batch * keys.k_batch + kv * keys.k_head,
               *v = keys.v + batch * keys.v_batch + kv * keys.v_head;
    for (u32 j = thread; j < kKeys * Unit<D>::kParts; j += kThreads) {
      const u32 key = j / Unit<D>::kParts, part = j % Unit<D>::kParts;
      int64_t at = run.first + key;
      const bool there = at < run.count;
      if (!run.dense && there) {
        const auto cell = run.cell(at);
        at = static_cast<int64_t>(cell.y) * e.width + cell.x;
      }
      const u32 to = base + slot * kSlot + key / 16 * Unit<D>::kBytes + Unit<D>::part(key % 16, part);
      gpu::copy16(to, k + at * keys.k_cell + part * 16, there);
      gpu::copy16(to + kValues, v + at * keys.v_cell + part * 16, there);
    }
    gpu::arrive_after_copies(full(slot));
  }
  // The lane's two queries in the coarse image.
  __device__ void centers(const Strips& p, const Item& item, const Own<D>& own, int (&y)[2], int& x) const {
    y[0] = (item.phase_y + own.row(0) * p.y.axis.dilation) / e.ratio_y;
    y[1] = (item.phase_y + own.row(1) * p.y.axis.dilation) / e.ratio_y;
    x = (item.phase_x + own.column() * p.x.axis.dilation) / e.ratio_x;
  }
  // Which of the lane's columns of the two units of slot i its two rows see, bit 8 u + 4 h + e as scores are. y, x: its
  // centers.
  __device__ u32 seen(int i, u32 lane, const int (&y)[2], int x) const {
    u32 bits = 0;
    const Run run(*this, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // pairs (u, h, column)
      const int at = run.first + j / 2 * 8 + 2 * (lane % 4) + j % 2, bit = j / 2 * 4 + j % 2;
      if (at >= run.count) continue;
      if (run.dense) {
        if (!e.mask ||
            gpu::load_global_byte(reinterpret_cast<const unsigned char*>(e.mask) + batch * int64_t(e.length) + at))
          bits |= 5u << bit;
        continue;
      }
      const auto cell = run.cell(at);
      const bool near = abs(cell.x - x) <= e.radius_x;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (near && abs(cell.y - y[r]) <= e.radius_y) bits |= 1u << (bit + 2 * r);
    }
    return bits;
  }
  // Scores of a slot's unit u that are not seen, whatever they were.
  __device__ static void hide(float (&z)[2][4], u32 seen, int u) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!(seen >> (8 * u + 4 * h + e) & 1)) z[h][e] = -INFINITY;
  }
  __device__ float bias(int i) const { return i < prefix_slots ? e.prefix.bias : e.coarse.bias; }
  // Where the units of slot i are, when it has come.
  __device__ u32 wait(int i) const {
    const u32 n = taken + i;
    gpu::barrier_wait(full(n % 2), n / 2 & 1);
    return base + n % 2 * kSlot;
  }
  // This warp is done with slot i.
  __device__ void release(int i, int lane) const {
    __syncwarp();
    if (lane == 0) gpu::barrier_arrive(empty((taken + i) % 2));
    if (i + 2 < slots) load(i + 2);
  }
  // A warp without queries.
  __device__ void pass(int lane) const {
    for (int i = 0; i < slots; ++i) {
      wait(i);
      release(i, lane);
    }
  }
  __device__ void finish() { taken += slots; }
};

// All steps of a warp: begin() when it comes to another item, step(s, end) for each step s of [.., end) that has some
// of its tile; the last of them lets go of the walk's blocks.
template <bool kExtra, int D, class W, class Begin, class Step>
__device__ void for_each_step(W& walk, const Item& item, Own<D>& own, ExtraStream<D>& extra, Begin begin, Step step) {
  if (walk.more()) begin();
  while (walk.more()) {
    const int end = item.steps.begin(walk.v + 1);
    for (int s = item.steps.begin(walk.v); s < end; ++s) {
      own.y = 4 * s;
      if constexpr (kExtra) extra.start(walk.p, item, own.y);
      if (own.active())
        step(s, end);
      else if constexpr (kExtra)
        extra.pass(walk.lane);
      if constexpr (kExtra) extra.finish();
    }
    if (walk.next() && walk.more()) begin();
  }
}

}  // namespace cogview::cuda
