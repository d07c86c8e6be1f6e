// 2D local attention on CPU, joint with prefix keys and a coarser grid.
//
// Dilation cuts the image into phases, cells that are dilation apart, of which each sees only itself: everything below
// is about the grid of one phase. On vectors the work is strips of at most 16 queries; on the tile unit queries and
// keys are packed in patches, rectangles of at most 64 cells.
#pragma once

#include "attention.h"

// Bindings and kernels of every instruction set use what is marked so: it must not become a function of its own, of
// which the linker would keep any one.
#define COGVIEW_INLINE [[gnu::always_inline]] inline

namespace cogview {

struct Grid {
  int64_t h = 0, w = 0;
};

// Positions lo to hi - 1.
struct Span {
  int64_t lo = 0, hi = 0;
  COGVIEW_INLINE Span within(int64_t size) const { return {lo < 0 ? 0 : lo, hi > size ? size : hi}; }
  COGVIEW_INLINE Span within(Span s) const { return {lo < s.lo ? s.lo : lo, hi > s.hi ? s.hi : hi}; }
  COGVIEW_INLINE bool empty() const { return lo >= hi; }
  COGVIEW_INLINE int64_t size() const { return hi - lo; }
};

// One axis: which keys a query sees, and which queries see a key. Both ends of both grow with the position.
struct Axis {
  int64_t queries = 0, keys = 0, radius = 0;
  bool shift = false;                      // the window moves inward at the edges; else it is cut
  int64_t ratio = 1, step = 1, phase = 0;  // query q lies in key (phase + q * step) / ratio

  COGVIEW_INLINE Span window(int64_t q) const {
    const int64_t place = phase + q * step, home = ratio == 1 ? place : place / ratio, last = keys - 2 * radius - 1;
    if (!shift) return Span{home - radius, home + radius + 1}.within(keys);
    const int64_t lo = home - radius < 0 ? 0 : home - radius > last ? last : home - radius;
    return {lo, lo + 2 * radius + 1};
  }
  COGVIEW_INLINE Span seen(int64_t k) const {
    if (shift) return {k <= 2 * radius ? 0 : k - radius, k >= keys - 2 * radius - 1 ? queries : k + radius + 1};
    return Span{first_query(k - radius), first_query(k + radius + 1)}.within(queries);
  }
  COGVIEW_INLINE Span windows(Span q) const { return {window(q.lo).lo, window(q.hi - 1).hi}; }
  COGVIEW_INLINE Span seen_by(Span k) const { return {seen(k.lo).lo, seen(k.hi - 1).hi}; }

 private:
  // The first query whose home is not before key k.
  COGVIEW_INLINE int64_t first_query(int64_t k) const {
    const int64_t n = k * ratio - phase;
    return n <= 0 ? 0 : (n + step - 1) / step;
  }
};

// How an axis is cut into pieces: at multiples of `size` less `offset`.
struct Cut {
  int64_t size = 1, offset = 0;
  COGVIEW_INLINE int64_t count(int64_t n) const { return (n + offset + size - 1) / size; }
  COGVIEW_INLINE Span piece(int64_t i) const { return {i * size - offset, (i + 1) * size - offset}; }
  COGVIEW_INLINE Span pieces(Span s) const { return {(s.lo + offset) / size, (s.hi - 1 + offset) / size + 1}; }
};

// How a grid is cut into patches, and how many of those along each axis a work item owns.
struct Patches {
  Cut y, x;
  Grid forward{1, 1}, backward{1, 1};  // each at most 16 in all
  // The backward is a sequence of launches of groups of key patches, in which no two groups share a patch of queries.
  Grid colors{1, 1}, color{0, 0};
};

// How the work on vectors is cut: strips of 16 cells, bands of a phase's strips, chunks of all bands of a head.
struct LanePlan {
  Grid strip{4, 4};
  int64_t bands = 1, chunks = 1;
  void* shared_sums = nullptr;  // [B, kv_heads, chunks, 2, prefix and coarse keys, padded head_dim] accumulators
};

struct LocalArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, seqlen_q, head_dim, prefix_len;
  Grid grid, kernel, coarse_grid, coarse_kernel, dilation{1, 1};
  bool raster_causal, shift;
  double prefix_bias, coarse_bias, scale;
  LanePlan lanes;
  Patches queries, keys, coarse;
  int64_t prefix_chunks;  // of queries, in the backward of the prefix
  Tensor4 q, k, v, out, dout, dq, dk, dv;
  Tensor4 prefix_k, prefix_v, prefix_dk, prefix_dv;  // null without
  Tensor4 coarse_k, coarse_v, coarse_dk, coarse_dv;
  const bool* prefix_mask;  // [B, prefix_len], contiguous, or null
  Indices cache_seqlens;    // decode only: query row t stands at raster index cache_seqlens[b] - seqlen_q + t
  int64_t decode_heads;     // of a work item, at most 8
  void *lse, *dlse;         // [B, H, seqlen_q]; lse null in decode, dlse may be
  // Of the backward on tiles.
  void* delta;                    // [B, H, seqlen_q]
  void* dq_sums;                  // [B, H, query_patches, dq_patch_size] accumulators
  void *prefix_dks, *prefix_dvs;  // [B, kv_heads, prefix_chunks, prefix_len, head_dim] accumulators
  Scratch scratch;

  COGVIEW_INLINE int64_t phases() const { return dilation.h * dilation.w; }
  // Of the largest phase.
  COGVIEW_INLINE Grid phase_grid() const {
    return {(grid.h + dilation.h - 1) / dilation.h, (grid.w + dilation.w - 1) / dilation.w};
  }
  COGVIEW_INLINE int64_t patches_of_phase() const {
    return queries.y.count(phase_grid().h) * queries.x.count(phase_grid().w);
  }
  COGVIEW_INLINE int64_t query_patches() const { return phases() * patches_of_phase(); }
  COGVIEW_INLINE int64_t shared_keys() const { return prefix_len + coarse_grid.h * coarse_grid.w; }
  COGVIEW_INLINE int64_t prefix_tiles() const { return (prefix_len + 63) / 64; }
  COGVIEW_INLINE int64_t dq_patch_size() const { return (head_dim + 31) / 32 * 32 * 64; }
};

// One phase: its cell (y, x) has raster index first + y * down + x * right.
struct Phase {
  Axis y, x, coarse_y, coarse_x;
  int64_t first, down, right;

  COGVIEW_INLINE Phase(const LocalArgs& a, int64_t number) : Phase(a, number / a.dilation.w, number % a.dilation.w) {}
  COGVIEW_INLINE Phase(const LocalArgs& a, int64_t top, int64_t left)
      : y(fine(a.grid.h, a.kernel.h, a.dilation.h, top, a.shift)),
        x(fine(a.grid.w, a.kernel.w, a.dilation.w, left, a.shift)),
        first(top * a.grid.w + left),
        down(a.dilation.h * a.grid.w),
        right(a.dilation.w) {
    if (!a.coarse_grid.h) return;
    coarse_y = {y.queries, a.coarse_grid.h, a.coarse_kernel.h / 2, false, a.grid.h / a.coarse_grid.h, a.dilation.h,
                top};
    coarse_x = {x.queries, a.coarse_grid.w, a.coarse_kernel.w / 2, false, a.grid.w / a.coarse_grid.w, a.dilation.w,
                left};
  }
  COGVIEW_INLINE Grid grid() const { return {y.queries, x.queries}; }

 private:
  COGVIEW_INLINE static Axis fine(int64_t size, int64_t kernel, int64_t step, int64_t first, bool shift) {
    const int64_t n = first < size ? (size - first + step - 1) / step : 0;
    return {n, n, kernel / 2, shift};
  }
};

// Groups of a grid's patches, some of which a smaller phase may lack.
COGVIEW_INLINE Grid groups_of(Grid grid, const Patches& p, Grid group) {
  return {(p.y.count(grid.h) + group.h - 1) / group.h, (p.x.count(grid.w) + group.w - 1) / group.w};
}
// Those of a color.
COGVIEW_INLINE Grid groups_of_color(Grid grid, const Patches& p) {
  const Grid all = groups_of(grid, p, p.backward), n = p.colors, c = p.color;
  return {(all.h - c.h + n.h - 1) / n.h, (all.w - c.w + n.w - 1) / n.w};
}

COGVIEW_DECLARE_KERNEL(local_2d_decode, LocalArgs)  // items: batch x parts of the heads x seqlen_q

// Whether a dtype is for the tile unit; if not, how much scratch a thread needs.
COGVIEW_DECLARE(bool local_2d_on_tiles(Dtype dtype))
COGVIEW_DECLARE(int64_t local_2d_scratch(const LocalArgs& a, bool backward))
COGVIEW_DECLARE_KERNEL(local_2d_fwd, LocalArgs)     // batch x kv_heads x chunks
COGVIEW_DECLARE_KERNEL(local_2d_bwd, LocalArgs)     // batch x kv_heads x chunks
COGVIEW_DECLARE_KERNEL(local_2d_finish, LocalArgs)  // batch x kv_heads x prefix and coarse keys

COGVIEW_DECLARE_KERNEL(local_tiles_fwd, LocalArgs)            // batch x heads x phases x groups of query patches
COGVIEW_DECLARE_KERNEL(local_tiles_prepare, LocalArgs)        // batch x heads x query_patches: delta, dq_sums = 0
COGVIEW_DECLARE_KERNEL(local_tiles_grad_prefix, LocalArgs)    // batch x kv_heads x prefix_chunks
COGVIEW_DECLARE_KERNEL(local_tiles_finish_prefix, LocalArgs)  // batch x kv_heads x prefix_tiles
COGVIEW_DECLARE_KERNEL(local_tiles_grad_coarse, LocalArgs)    // batch x kv_heads x groups of coarse patches of a color
COGVIEW_DECLARE_KERNEL(local_tiles_grad_key, LocalArgs)  // batch x kv_heads x phases x groups of patches of a color
COGVIEW_DECLARE_KERNEL(local_tiles_finish, LocalArgs)    // batch x heads x query_patches: dq

}  // namespace cogview
