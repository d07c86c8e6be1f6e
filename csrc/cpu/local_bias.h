// The bias table of a head of 2D local attention as vectors, and its gradient in the same places.
//
// The lanes of a vector are the cells of a rectangle, queries in the lanes engine and in the backward on tiles, keys in
// the forward on tiles; all have the bias of one other cell, so one vector holds, for each distance between that cell
// and the rectangle's first one, what the lanes need. So a bias costs a load where a number would be spread.
// Gradients of scores are added to vectors likewise, and those to entries of the table when a work item ends.
#pragma once

#include "arena.h"
#include "local_patches.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Part `slot` of the gradient's sum.
template <class A>
inline A* bias_part(const BiasPlan& plan, const LocalAttention& a, int64_t b, int64_t h, int64_t slot) {
  return static_cast<A*>(plan.parts) + ((b * a.heads + h) * plan.slots + slot) * plan.size();
}

template <class A>
class BiasVectors {
 public:
  A most = 0;  // the largest of them

  // Lane l is cell (l / cells.w, l % cells.w) of a rectangle, of queries or of keys.
  void take(Arena& arena, const BiasPlan& plan, Grid cells, bool of_keys, bool gradient) {
    y_ = plan.y, x_ = plan.x, cells_ = cells, sign_ = of_keys ? 1 : -1;
    first_y_ = of_keys ? y_.lo - cells.h + 1 : y_.lo, first_x_ = of_keys ? x_.lo - cells.w + 1 : x_.lo;
    columns_ = x_.size() + cells.w - 1, rows_ = plan.vectors(cells) / columns_;
    values = arena.take<A>(count());
    sums = gradient ? arena.take<A>(count()) : nullptr;
  }

  // With the table of a head, in log2; sums start at zero.
  void fill(const Bias& bias, int64_t h) {
    const A* middle = static_cast<const A*>(bias.table) + (h * bias.size.h + bias.size.h / 2) * bias.size.w;
    middle += bias.size.w / 2;
    std::memset(static_cast<void*>(values), 0, count() * sizeof(A));
    if (sums) std::memset(static_cast<void*>(sums), 0, count() * sizeof(A));
    most = 0;
    each([&](int64_t y, int64_t x, int64_t at) {
      values[at] = middle[y * bias.size.w + x] * A(kLog2e);
      most = std::abs(values[at]) > most ? std::abs(values[at]) : most;
    });
  }

  // Adds the sums to a part of the gradient, [distances in rows, in columns].
  void add_to(A* part) const {
    each([&](int64_t y, int64_t x, int64_t at) { part[(y - y_.lo) * x_.size() + x - x_.lo] += sums[at]; });
  }

  // Where the vector is of cells from (y, x) on, for another cell that one of them sees or is seen by.
  int64_t place(int64_t y, int64_t x, int64_t other_y, int64_t other_x) const {
    return vector(sign_ * (y - other_y) - first_y_, sign_ * (x - other_x) - first_x_);
  }
  // The same for all cells of a patch of rows and the 4 vectors of whole columns; anywhere for those too far apart.
  void places(const Patch& rows, const Patch& columns, int32_t* at) const {
    const auto clamp = [](int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; };
    const int64_t w = columns.x.size();
    for (int64_t v = 0; v < kTile / kBiasLanes; ++v) {
      const int64_t y = columns.y.lo + v * kBiasLanes / w, x = columns.x.lo + v * kBiasLanes % w;
      int32_t* to = at + v;
      for (int64_t i = rows.y.lo; i < rows.y.hi; ++i) {
        const int64_t row = clamp(sign_ * (y - i) - first_y_, rows_);
        for (int64_t j = rows.x.lo; j < rows.x.hi; ++j, to += kTile / kBiasLanes)
          *to = int32_t(vector(row, clamp(sign_ * (x - j) - first_x_, columns_)));
      }
    }
  }

  A *values = nullptr, *sums = nullptr;

 private:
  int64_t count() const { return rows_ * columns_ * kBiasLanes; }
  int64_t vector(int64_t row, int64_t column) const { return (row * columns_ + column) * kBiasLanes; }

  // f(rows, columns between key and query, place) of all that are in reach.
  template <class F>
  void each(F&& f) const {
    for (int64_t row = 0, at = 0; row < rows_; ++row)
      for (int64_t column = 0; column < columns_; ++column, at += kBiasLanes)
        for (int64_t l = 0; l < cells_.h * cells_.w; ++l) {
          const int64_t y = first_y_ + row + sign_ * (l / cells_.w), x = first_x_ + column + sign_ * (l % cells_.w);
          if (y >= y_.lo && y < y_.hi && x >= x_.lo && x < x_.hi) f(y, x, at + l);
        }
  }

  Span y_, x_;  // in reach
  Grid cells_;
  int sign_ = 0;
  int64_t first_y_ = 0, first_x_ = 0, rows_ = 0, columns_ = 0;
};

// What the tile engine adds to the scores of an owner's rows and a tile's columns.
template <class A>
struct TileBias {
  const A* values;
  A* sums;
  const int32_t* at;
  A most;
  Vec<A> of(int r, int c) const { return load(values + place(r, c)); }
  void add(int r, int c, Vec<A> ds) const { store(sums + place(r, c), load(sums + place(r, c)) + ds); }

 private:
  static_assert(kLanes<A> <= kBiasLanes);
  int64_t place(int r, int c) const { return at[r * (kTile / kBiasLanes) + c / kBiasLanes] + c % kBiasLanes; }
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
