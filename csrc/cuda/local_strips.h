// How 2D local attention cuts images into strips, and what a pass over them needs of shared memory: plain C++, the same
// for the host that plans and the kernels that walk.
//
// A strip is kTiles tiles of 4 x 4 cells wide; a step is 4 rows of it, a warp for each tile. Dilation splits an image
// into sub-images of its own, in which windows are dense.
#pragma once

#include "../inline.h"
#include "../local_attention_2d.h"

namespace cogview::cuda {

// By head_dim: tiles of a strip, threads of a block at most; shared memory of what a group streams beside the image.
constexpr int strip_tiles(int dim) { return dim == 128 ? 2 : dim == 96 ? 3 : 4; }
constexpr int extra_slot(int dim) { return 128 * dim; }
constexpr int extra_bytes(int dim) { return 2 * extra_slot(dim) + 128; }
constexpr int kMostCoarse = 1 << 20;  // cells of a coarse image, which are divided in float32
constexpr int kStepBarriers = 64;     // at least (groups + 1) * blocks

enum class Pass { forward, grad_query, grad_key };
constexpr int most_threads(int dim, Pass pass) {
  return dim == 128 || pass == Pass::grad_key ? 256 : dim == 96 ? 288 : 384;
}
// Shared memory of a warp's own rows: as they come and as they go; of queries' gradients also lse and its gradient.
COGVIEW_HOST_DEVICE constexpr int own_bytes(int dim, Pass pass) {
  return pass == Pass::forward ? 2 * 32 * dim : pass == Pass::grad_key ? 3 * 32 * dim : 4 * 32 * dim + 128;
}
// Where the forward has an instance with all rows of units at once.
constexpr bool has_all_rows(int dim, int units, int rows, bool ordered, bool extra) {
  return dim <= 64 && units == 3 && rows == (ordered ? 2 : 3) && !extra;
}

// Cells [lo, hi) of one axis.
struct Span {
  int lo, hi;
};

// One axis of the windows: `radius` cells to both sides, or inside the image where they are shifted.
struct Axis {
  int radius, size, dilation;  // size: cells of the whole image
  bool shift;
  COGVIEW_HOST_DEVICE int cells(int phase) const { return (size - phase + dilation - 1) / dilation; }  // of a sub-image
  COGVIEW_HOST_DEVICE static int clamp(int x, int lo, int hi) { return x < lo ? lo : x > hi ? hi : x; }
  // What the query at x sees, of n cells.
  COGVIEW_HOST_DEVICE Span seen(int x, int n) const {
    if (shift) {
      const int lo = clamp(x - radius, 0, n - 2 * radius - 1);
      return {lo, lo + 2 * radius + 1};
    }
    return {x > radius ? x - radius : 0, x + radius + 1 < n ? x + radius + 1 : n};
  }
  // Which queries see the key at x.
  COGVIEW_HOST_DEVICE Span seeing(int x, int n) const {
    const int lo = x > radius ? x - radius : 0, hi = x + radius + 1 < n ? x + radius + 1 : n;
    return {shift && x <= 2 * radius ? 0 : lo, shift && x >= n - 2 * radius - 1 ? n : hi};
  }
};

// Units of 4 cells that tile t of the owners needs of one axis; unit u is cells [4 u - above, 4 u - above + 4).
struct Reach {
  Axis axis;
  int above, below;  // cells before and behind an owner, at most; less than axis.radius in an order
  bool keys;         // the owners are keys
  COGVIEW_HOST_DEVICE Span of(int x, int n) const {
    Span s = keys ? axis.seeing(x, n) : axis.seen(x, n);
    if (above < axis.radius && s.lo < x - above) s.lo = x - above;
    if (below < axis.radius && s.hi > x + below + 1) s.hi = x + below + 1;
    return s;
  }
  COGVIEW_HOST_DEVICE Span units(int tile, int n) const {
    const int last = 4 * tile + 3 < n ? 4 * tile + 3 : n - 1;
    return {(of(4 * tile, n).lo + above) / 4, (of(last, n).hi - 1 + above) / 4 + 1};
  }
  // Whatever tile: of cells that are not shifted.
  COGVIEW_HOST_DEVICE int most_units() const { return (4 + above + below + 3) / 4; }
};

// The steps of one item and the blocks of rows that they need: step s needs blocks units(s). Block origin + v comes at
// virtual step v, and the steps of v need no blocks but v ... v + unit_rows - 1, counted from origin.
struct Steps {
  int first, end, origin, offset, tail, tail_at;
  COGVIEW_HOST_DEVICE Steps(const Reach& reach, int n, int chunk, int chunk_steps, int unit_rows) {
    const int total = (n + 3) / 4;
    first = chunk * chunk_steps < total ? chunk * chunk_steps : total;
    end = first + chunk_steps < total ? first + chunk_steps : total;
    origin = first < end && reach.axis.shift ? reach.units(first, n).lo : first;
    offset = unit_rows - reach.most_units() + origin;
    tail = end, tail_at = end;
    if (reach.axis.shift) {  // from `tail` on, steps need all that is left
      const int radius = reach.axis.radius, bound = n - 1 - (reach.keys ? 2 * radius : radius);
      tail = bound > 3 ? (bound - 3 + 3) / 4 : 0;
      tail = tail < first ? first : tail < end ? tail : end;
      const int at = (n - 1 + reach.above) / 4 + 1 - unit_rows - origin;
      tail_at = at > 0 ? at : 0;
    }
  }
  COGVIEW_HOST_DEVICE int begin(int v) const {  // the first step of virtual step v; it ends where that of v + 1 begins
    if (v == 0) return first;
    if (v + offset < tail) return v + offset;
    return v <= tail_at ? tail : end;
  }
};

// One tensor: strides in bytes, of samples, heads, cells of the image; of rows and cells of a sub-image.
struct Plane {
  char* at;
  int64_t batch, head, line, row, cell;
};

// A pass over all strips.
struct Strips {
  int heads, group, repeats;  // owners' heads; query heads to one of keys; walks over the same owners
  Reach y, x;
  bool ordered;                            // raster-causal
  int strips, chunks, chunk_steps, items;  // of a head: strips * chunks * sub-images
  int unit_rows, units;                    // of a step, at most; of a box
  int virtual_steps;                       // of an item
  int groups, blocks, late;                // of warps; of rows in the ring; steps until one is loaded again
  int block, values, stage, rows, row_block, extra, full, done;  // bytes and offsets in shared memory
};

}  // namespace cogview::cuda
