// What 2D local attention may have besides windows: a mask of the image's keys, a table of biases by relative position,
// or no keys of the image at all. Kernels without such options have no code for them.
//
// Memory. Each warp reads the mask of the box around its tile once a step, and of the table 6 numbers a lane for each
// unit, all from L1.
#pragma once

#include "local_own.cuh"

namespace cogview::cuda {

struct LocalOptions {
  bool local;          // false: only prefix and coarse keys
  Plane key_mask;      // a byte of each key, of one head; or null
  const float* table;  // [query heads, height, width] or null
  int height, width;
};

__device__ inline bool attends(const char* mask) {
  return gpu::load_global_byte(reinterpret_cast<const unsigned char*>(mask));
}

// The table of one query head.
struct Biases {
  const float* at;
  int center, width;
  u32 last;
  __device__ Biases(const LocalOptions& o, int head)
      : at(o.table + static_cast<int64_t>(head) * o.height * o.width),
        center(o.height / 2 * o.width + o.width / 2),
        width(o.width),
        last(o.height * o.width - 1) {}
  // Of the lane's first row and first column of a unit whose first cell is (y, x). kSign: 1 where a warp's own rows are
  // queries, -1 where they are keys.
  template <int kSign, int D>
  __device__ int first(const Own<D>& own, int y, int x) const {
    const int down = y + static_cast<int>(own.lane / 2 % 2) - own.row(0);
    const int right = x + static_cast<int>(own.lane % 2) * 2 - own.column();
    return center + kSign * (down * width + right);
  }
  // Scores become logits in base 2; those that no window has get any entry.
  template <int kSign>
  __device__ void add(float (&z)[2][4], float scale, int first) const {
    float entry[3][2];
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const u32 index = first + kSign * (2 * (i - 1) * width + j);
        entry[i][j] = gpu::load_global_float(at + (index < last ? index : last)) * kLog2e;
      }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e) z[h][e] = fmaf(z[h][e], scale, entry[h - e / 2 + 1][e % 2]);
  }
};

// Which keys of a row of units are masked, of a lane's columns: bit 4 u + j of half h as Columns has them.
struct HiddenKeys {
  u32 bits[2] = {};
  // Of the rows at `top`, the columns at `left`.
  __device__ HiddenKeys(const LocalOptions& o, const Strips& p, const Item& item, int top, int left, u32 lane) {
    if (!o.key_mask.at) return;
    const int x = left + static_cast<int>(lane);
    const char* column = item.in(o.key_mask, p, 0) + x * o.key_mask.cell;
    u32 of[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int y = top + i;
      const bool there = x >= 0 && x < item.width && y >= 0 && y < item.height;
      of[i] = gpu::lanes_where(there && !attends(column + y * o.key_mask.row));
    }
    const u32 shift = lane % 2 * 2;
    bits[0] = (lane / 2 % 2 ? of[1] : of[0]) >> shift, bits[1] = (lane / 2 % 2 ? of[3] : of[2]) >> shift;
  }
  // Whether a lane's own key, which is inside, is hidden.
  template <int D>
  __device__ static bool own(const LocalOptions& o, const Strips& p, const Item& item, const Own<D>& own, int r) {
    return o.key_mask.at && own.inside(r) &&
           !attends(item.in(o.key_mask, p, 0) + own.row(r) * o.key_mask.row + own.column() * o.key_mask.cell);
  }
};

}  // namespace cogview::cuda
