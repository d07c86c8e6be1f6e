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

// The values of a head on tiles.
template <class A>
inline A* bias_values(const BiasPlan& plan, int64_t h) {
  return static_cast<A*>(plan.values) + h * plan.lanes(plan.cells);
}

// Of the vectors of a tile's columns for one row: where each begins.
constexpr int kVectors = kTile / kBiasLanes;
typedef int32_t Places __attribute__((vector_size(4 * kVectors)));

template <class A>
class BiasVectors {
 public:
  A *values = nullptr, *sums = nullptr;

  // Lane l is cell (l / cells.w, l % cells.w) of a rectangle, of queries or of keys. `filled`: where values are
  // already.
  void take(Arena& arena, const BiasPlan& plan, Grid cells, bool of_keys, bool gradient, A* filled = nullptr) {
    y_ = plan.y, x_ = plan.x, cells_ = cells, sign_ = of_keys ? 1 : -1;
    first_y_ = of_keys ? y_.lo - cells.h + 1 : y_.lo, first_x_ = of_keys ? x_.lo - cells.w + 1 : x_.lo;
    columns_ = x_.size() + cells.w - 1, rows_ = y_.size() + cells.h - 1;
    pitch_ = columns_ + cells.w - 1 + kBiasLanes;
    padded_ = arena.take<A>(plan.padded(cells));
    values = filled ? filled : arena.take<A>(plan.lanes(cells));
    sums = gradient ? arena.take<A>(plan.lanes(cells)) : nullptr;
  }

  // With the table of a head, in log2.
  void fill(const Bias& bias, int64_t h) {
    const A* middle = static_cast<const A*>(bias.table) + (h * bias.size.h + bias.size.h / 2) * bias.size.w;
    A most = 0;
    clear(padded_, (rows_ + cells_.h - 1) * pitch_);
    each_padded([&](int64_t y, int64_t x, A& to) {
      to = middle[y * bias.size.w + bias.size.w / 2 + x] * A(kLog2e);
      most = std::abs(to) > most ? std::abs(to) : most;
    });
    // beyond a line of cells what the next one overwrites
    each_line([&](const A* from, int64_t at) {
      for (int64_t j = 0; j < cells_.w; j += kLanes<A>) store(values + at + j, load(from + j));
    });
    values[vector(rows_, 0)] = most;
  }
  A most() const { return values[vector(rows_, 0)]; }  // the largest size of a value

  void clear_sums() { clear(sums, vector(rows_, 0)); }

  // Adds the sums to a part of the gradient, [distances in rows, in columns].
  void add_to(A* part) const {
    clear(padded_, (rows_ + cells_.h - 1) * pitch_);
    each_line([&](A* to, int64_t at) {
      each<A>(cells_.w, [&](int64_t j, auto n) { put(to + j, load(to + j, n) + load(sums + at + j, n), n); });
    });
    each_padded([&](int64_t y, int64_t x, A& from) { part[(y - y_.lo) * x_.size() + x - x_.lo] += from; });
  }

  // Where the vector is of cells from (y, x) on, for another cell that one of them sees or is seen by.
  int64_t place(int64_t y, int64_t x, int64_t other_y, int64_t other_x) const {
    return vector(sign_ * (y - other_y) - first_y_, sign_ * (x - other_x) - first_x_);
  }
  // The same for all cells of a patch of rows and the 4 vectors of whole columns; anywhere for those too far apart.
  void places(const Patch& rows, const Patch& columns, Places* at) const {
    const auto clamp = [](int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; };
    const int64_t w = columns.x.size();
    Places across[kTile];
    int64_t y[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      y[v] = columns.y.lo + v * kBiasLanes / w;
      const int64_t x = columns.x.lo + v * kBiasLanes % w;
      for (int64_t j = rows.x.lo, n = 0; j < rows.x.hi; ++j, ++n)
        across[n][v] = int32_t(vector(0, clamp(sign_ * (x - j) - first_x_, columns_)));
    }
    for (int64_t i = rows.y.lo; i < rows.y.hi; ++i) {
      Places line;
      for (int v = 0; v < kVectors; ++v) line[v] = int32_t(vector(clamp(sign_ * (y[v] - i) - first_y_, rows_), 0));
      for (int64_t n = 0; n < rows.x.size(); ++n) *at++ = line + across[n];
    }
  }

 private:
  int64_t vector(int64_t row, int64_t column) const { return (row * columns_ + column) * kBiasLanes; }
  static void clear(A* x, int64_t n) { std::memset(static_cast<void*>(x), 0, n * sizeof(A)); }

  // The table as far as it is in reach, zeros around it, in the order in which lanes go through it: lane (i, j) of a
  // vector is i rows and j columns behind its first one. f(rows, columns between key and query, entry).
  template <class F>
  void each_padded(F&& f) const {
    const int64_t from_y = sign_ > 0 ? y_.lo - first_y_ : first_y_ + rows_ - 1 - y_.lo;
    const int64_t from_x = sign_ > 0 ? x_.lo - first_x_ : first_x_ + columns_ - 1 - x_.lo;
    for (int64_t y = y_.lo; y < y_.hi; ++y) {
      A* row = padded_ + (from_y + sign_ * (y - y_.lo)) * pitch_ + from_x;
      for (int64_t x = x_.lo; x < x_.hi; ++x) f(y, x, row[sign_ * (x - x_.lo)]);
    }
  }
  // f(entry of its first lane, place of that lane) of each line of cells of every vector.
  template <class F>
  void each_line(F&& f) const {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t column = 0; column < columns_; ++column) {
        A* first = padded_ + (sign_ > 0 ? row * pitch_ + column : (rows_ - 1 - row) * pitch_ + columns_ - 1 - column);
        for (int64_t i = 0; i < cells_.h; ++i) f(first + i * pitch_, vector(row, column) + i * cells_.w);
      }
  }

  Span y_, x_;  // in reach
  Grid cells_;
  int sign_ = 0;
  int64_t first_y_ = 0, first_x_ = 0, rows_ = 0, columns_ = 0, pitch_ = 0;
  A* padded_ = nullptr;
};

// What the tile engine adds to the scores of an owner's rows and a tile's columns.
template <class A>
struct TileBias {
  const A* values;
  A* sums;
  const Places* at;  // of each row
  A most;
  Vec<A> of(int r, int c) const { return load(values + place(r, c)); }
  void add(int r, int c, Vec<A> ds) const { store(sums + place(r, c), load(sums + place(r, c)) + ds); }

 private:
  static_assert(kLanes<A> <= kBiasLanes);
  int64_t place(int r, int c) const { return at[r][c / kBiasLanes] + c % kBiasLanes; }
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
