// The geometry of 2D local attention: which cells see which, and how grids are cut.
//
// Dilation cuts the image into phases, cells that are dilation apart, of which each sees only itself: everything below
// is about the grid of one phase.
#pragma once

#include "../local_attention_2d.h"
#include "attention.h"

namespace cogview {

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
  int64_t queries = 0, keys = 0, before = 0, behind = 0;  // keys before and behind a query's own
  bool shift = false;                                     // the window moves inward at the edges; else it is cut
  int64_t ratio = 1, step = 1, phase = 0;                 // query q lies in key (phase + q * step) / ratio

  COGVIEW_INLINE Span window(int64_t q) const {
    const int64_t place = phase + q * step, home = ratio == 1 ? place : place / ratio, last = keys - size();
    if (!shift) return Span{home - before, home + behind + 1}.within(keys);
    const int64_t lo = home - before < 0 ? 0 : home - before > last ? last : home - before;
    return {lo, lo + size()};
  }
  COGVIEW_INLINE Span seen(int64_t k) const {
    if (shift) return {k < size() ? 0 : k - behind, k >= keys - size() ? queries : k + before + 1};
    return Span{first_query(k - behind), first_query(k + before + 1)}.within(queries);
  }
  COGVIEW_INLINE int64_t size() const { return before + behind + 1; }  // of a window
  // How far keys are from the queries that see them, of keys that are queries too.
  COGVIEW_INLINE Span reach() const {
    const int64_t most = keys - 1, up = shift ? size() - 1 : before, down = shift ? size() - 1 : behind;
    return {-(up < most ? up : most), (down < most ? down : most) + 1};
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

// Phases, and the grid of the largest one.
COGVIEW_INLINE int64_t phases(const Window& w) { return w.dilation.h * w.dilation.w; }
COGVIEW_INLINE Grid phase_grid(const Window& w) {
  return {ceil_div(w.grid.h, w.dilation.h), ceil_div(w.grid.w, w.dilation.w)};
}

// One phase: its cell (y, x) has raster index first + y * down + x * right.
struct Phase {
  Axis y, x, coarse_y, coarse_x;
  int64_t first, down, right;

  COGVIEW_INLINE Phase(const LocalAttention& a, int64_t number)
      : Phase(a, number / a.window.dilation.w, number % a.window.dilation.w) {}
  COGVIEW_INLINE Phase(const LocalAttention& a, int64_t top, int64_t left)
      : first(top * a.window.grid.w + left), down(a.window.dilation.h * a.window.grid.w), right(a.window.dilation.w) {
    const Grid grid = a.window.grid, kernel = a.window.kernel, step = a.window.dilation, coarse = a.coarse.grid;
    y = fine(grid.h, kernel.h, step.h, top, a.window.shift), x = fine(grid.w, kernel.w, step.w, left, a.window.shift);
    if (!coarse.h) return;
    coarse_y = axis(y.queries, coarse.h, a.coarse.kernel.h), coarse_x = axis(x.queries, coarse.w, a.coarse.kernel.w);
    coarse_y.ratio = grid.h / coarse.h, coarse_y.step = step.h, coarse_y.phase = top;
    coarse_x.ratio = grid.w / coarse.w, coarse_x.step = step.w, coarse_x.phase = left;
  }
  COGVIEW_INLINE Grid grid() const { return {y.queries, x.queries}; }

 private:
  COGVIEW_INLINE static Axis axis(int64_t queries, int64_t keys, int64_t kernel) {
    return {queries, keys, kernel / 2, (kernel - 1) / 2};
  }
  COGVIEW_INLINE static Axis fine(int64_t size, int64_t kernel, int64_t step, int64_t first, bool shift) {
    const int64_t n = first < size ? (size - first + step - 1) / step : 0;
    Axis x = axis(n, n, kernel);
    x.shift = shift;
    return x;
  }
};

constexpr int kBiasLanes = 16;  // cells whose bias is a vector

// How a grid is cut into patches, and how many of those along each axis a work item owns.
struct Patches {
  Cut y, x;
  Grid forward{1, 1}, backward{1, 1};  // each at most 16 in all
  // The backward is a sequence of launches of groups of key patches, in which no two groups share a patch of queries.
  Grid colors{1, 1}, color{0, 0};

  // Rows and columns of the cells of a vector.
  COGVIEW_INLINE Grid vector() const {
    const int64_t wide = x.size < kBiasLanes ? x.size : kBiasLanes;
    return {kBiasLanes / wide, wide};
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

}  // namespace cogview
