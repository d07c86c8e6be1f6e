// A warp's own cells: a tile of 4 x 4, row r of its matrices at cell (r / 4, r % 4). Rows go between global memory and
// a unit in shared memory, a lane some parts of 16 bytes.
#pragma once

#include "local_walk.cuh"

namespace cogview::cuda {

template <int D>
struct Own {
  // a lane moves one part of each kStep-th cell
  static constexpr u32 kParts = D / 8, kStep = 32 / kParts, kAccesses = 16 / kStep;
  u32 lane;
  int x, y;  // of the tile, in the sub-image
  int height, width;

  __device__ bool active() const { return x < width; }
  __device__ int row(int r) const { return y + static_cast<int>(lane) / 16 + 2 * r; }  // of the lane's two of a matrix
  __device__ int column() const { return x + static_cast<int>(lane) / 4 % 4; }
  __device__ bool inside(int r) const { return row(r) < height && column() < width; }

  __device__ u32 cell() const { return lane / kParts; }  // of the first access
  __device__ u32 part() const { return lane % kParts; }
  // access(i, rows, columns, inside): the i-th is `rows` and `columns` from the first
  template <class F>
  __device__ void each(F access) const {
    if (32 % kParts && lane >= kStep * kParts) return;
#pragma unroll
    for (u32 i = 0; i < kAccesses; ++i) {
      const int down = i * kStep / 4, right = i * kStep % 4;
      access(i, down, right,
             y + static_cast<int>(cell() / 4) + down < height && x + static_cast<int>(cell() % 4) + right < width);
    }
  }
  // In a tensor: the lane's first part of the tile in row 0. `sub`: the sub-image's first cell.
  __device__ char* column_of(char* sub, const Plane& t) const {
    return sub + (x + static_cast<int>(cell() % 4)) * t.cell + cell() / 4 * t.row + part() * 16;
  }
  // In a unit: of the i-th access.
  __device__ u32 in_unit(u32 unit, u32 i) const { return unit + Unit<D>::part(cell() + i * kStep, part()); }

  __device__ void copy(u32 unit, const char* column, const Plane& t) const {
    const char* from = column + y * t.row;
    each([&](u32 i, int down, int right, bool inside) {
      gpu::copy16(in_unit(unit, i), from + down * t.row + right * t.cell, inside);
    });
  }
  __device__ void store(u32 unit, char* column, const Plane& t) const {
    char* to = column + y * t.row;
    each([&](u32 i, int down, int right, bool inside) {
      const uint4 x = gpu::load_shared16(in_unit(unit, i));
      if (inside) gpu::store_global16(to + down * t.row + right * t.cell, x);
    });
  }
};

// A warp's own rows of a step, copied to shared memory while it is at the step before. fetch(step) begins copies, and
// ends with arrived().
struct RowsAhead {
  u32 barrier, parity = 0;
  int ready = -1;  // the step whose rows are on their way
  // Before a barrier of all threads.
  __device__ RowsAhead(const Strips& p, u32 base, int warp, u32 lane)
      : barrier(base + p.done + 8 * kStepBarriers + 8 * warp) {
    if (lane == 0) gpu::barrier_init(barrier, 32);
  }
  __device__ void arrived() const { gpu::arrive_after_copies(barrier); }
  // Until those of this step have come.
  template <class Fetch>
  __device__ void wait(int step, Fetch fetch) {
    if (ready != step) fetch(step);
    gpu::barrier_wait(barrier, parity);
    parity ^= 1;
  }
  // When all lanes have read them: those of the next one, if it is before `end`.
  template <class Fetch>
  __device__ void prepare(int next, int end, Fetch fetch) {
    ready = -1;
    __syncwarp();
    if (next < end) fetch(ready = next);
  }
};

// Bits [lo, hi) of 32.
__device__ inline u32 bits_of(int lo, int hi) {
  lo = max(lo, 0), hi = min(hi, 32);
  const u32 below = hi >= 32 ? ~0u : hi <= 0 ? 0u : (1u << hi) - 1;
  return lo >= 32 ? 0u : below & (~0u << lo);
}

// What of a block's columns a lane's two rows may see: column 4 u + 2 (lane % 2) + j of the box at `left`.
struct Columns {
  u32 all, half;  // bit 4 u + j; of the owner's own row in an order
  template <int D>
  __device__ static Columns of(const Strips& p, const Own<D>& own, int left, bool ordered) {
    const int x = min(own.column(), own.width - 1), shift = own.lane % 2 * 2;
    const Span s = p.x.of(x, own.width);
    const int lo = p.x.keys && ordered ? max(s.lo, x) : s.lo, hi = !p.x.keys && ordered ? min(s.hi, x + 1) : s.hi;
    return {bits_of(s.lo - left, s.hi - left) >> shift, bits_of(lo - left, hi - left) >> shift};
  }
};

// What of the unit rows at `top` the lane's two rows see: bit 4 u + 2 h of unit row u, half h.
struct RowBits {
  u32 seen[2], own[2];
  u32 window[2];  // of a step of an image without edges, where windows are not shifted
  // Once, for the lane.
  template <int D>
  __device__ RowBits(const Strips& p, const Own<D>& own_) {
    const int shift = own_.lane / 2 % 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int y = own_.lane / 16 + 2 * r;
      window[r] = bits_of(y, y + p.y.above + p.y.below + 1) >> shift;
      own[r] = bits_of(y + p.y.above, y + p.y.above + 1) >> shift;
      gpu::keep(window[r]), gpu::keep(own[r]);
    }
  }
  template <int D>
  __device__ void at(const Strips& p, const Own<D>& own_, int top) {
    const int shift = own_.lane / 2 % 2;
    if (p.y.axis.shift) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Span s = p.y.of(min(own_.row(r), own_.height - 1), own_.height);
        seen[r] = bits_of(s.lo - top, s.hi - top) >> shift;
      }
    } else {
      const u32 inside = bits_of(-top, own_.height - top) >> shift;
      seen[0] = window[0] & inside, seen[1] = window[1] & inside;
    }
  }
  // The columns that row r sees of the half of a unit row that has this bit.
  __device__ u32 of(const Columns& columns, int r, u32 bit) const {
    return seen[r] & bit ? (own[r] & bit ? columns.half : columns.all) : 0;
  }
};

}  // namespace cogview::cuda
