// What 2D local attention may have besides windows: a mask of the image's keys, or no keys of the image at all. Kernels
// without such options have no code for them.
//
// Memory. Each warp reads the mask of the box around its tile once a step, from L1.
#pragma once

#include "local_own.cuh"

namespace cogview::cuda {

struct LocalOptions {
  bool local;      // false: only prefix and coarse keys
  Plane key_mask;  // a byte of each key, of one head; or null
};

// Which keys of a row of units are hidden from a lane's columns, bit 4 u + j of half h as Columns has them.
struct HiddenKeys {
  u32 bits[2] = {};
  bool any = false;
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
      of[i] = gpu::lanes_where(there && !byte(column + y * o.key_mask.row));
    }
    any = (of[0] | of[1] | of[2] | of[3]) != 0;
    const u32 shift = lane % 2 * 2;
    bits[0] = (lane / 2 % 2 ? of[1] : of[0]) >> shift, bits[1] = (lane / 2 % 2 ? of[3] : of[2]) >> shift;
  }
  // Of scores of unit u.
  __device__ void hide(float (&z)[2][4], int u) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (bits[h] >> (4 * u + e % 2) & 1) z[h][e] = -INFINITY;
  }
  // Whether a lane's own key, which is inside, is hidden.
  template <int D>
  __device__ static bool own(const LocalOptions& o, const Strips& p, const Item& item, const Own<D>& own, int r) {
    return o.key_mask.at && own.inside(r) &&
           !byte(item.in(o.key_mask, p, 0) + own.row(r) * o.key_mask.row + own.column() * o.key_mask.cell);
  }

 private:
  __device__ static int byte(const char* at) {
    return gpu::load_global_byte(reinterpret_cast<const unsigned char*>(at));
  }
};

}  // namespace cogview::cuda
