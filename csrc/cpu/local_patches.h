// What both engines of 2D local attention stand on: patches of cells, and which cells of one see which of another.
#pragma once

#include "local_grid.h"
#include "operands.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Which dtypes are for tiles; the backward of float16, of two parts, is faster on lanes (Xeon with AMX: 44 to 47 ms).
template <class T>
constexpr bool kForwardOnTiles = kOnTiles<T>;
template <class T>
constexpr bool kBackwardOnTiles = kOnTiles<T> && kParts<T> == 1;

// A rectangle of at most 64 cells in raster order: rows of an owner or columns of a tile.
struct Patch {
  Span y, x;
  int count() const { return y.empty() || x.empty() ? 0 : int(y.size() * x.size()); }
  // Raster indices in a grid.
  int list(int64_t first, int64_t down, int64_t right, int64_t* index) const {
    int n = 0;
    for (int64_t i = y.lo; i < y.hi; ++i)
      for (int64_t j = x.lo; j < x.hi; ++j) index[n++] = first + i * down + j * right;
    return n;
  }
  int list(const Phase& p, int64_t* index) const { return list(p.first, p.down, p.right, index); }
  // Bits of those of its cells that a grid has.
  uint64_t inside(Grid grid) const {
    uint64_t bits = 0;
    const Span columns = x.within(grid.w);
    for (int64_t i = y.within(grid.h).lo; i < y.hi && i < grid.h; ++i) {
      const int64_t line = (i - y.lo) * x.size() - x.lo;
      bits |= range_bits(line + columns.lo, line + columns.hi);
    }
    return bits;
  }
};

// Which keys of the local set a sample has; null: all.
inline const bool* shown_keys(const LocalAttention& a, int64_t b) {
  return a.key_mask ? a.key_mask + b * a.window.grid.h * a.window.grid.w : nullptr;
}
inline uint64_t shown_bits(const bool* shown, const int64_t* index, int n) {
  uint64_t bits = 0;
  for (int c = 0; c < n; ++c) bits |= uint64_t(shown[index[c]]) << c;
  return bits;
}

// Cells of a tile that nobody sees get the place of another one, if there is one: they are multiplied too, and may hold
// what makes 0 times it NaN.
inline void replace_unseen(uint64_t seen, int n, int64_t* index) {
  if (!seen) return;
  const int64_t some = index[__builtin_ctzll(seen)];
  each_bit(range_bits(0, n) & ~seen, [&](int c) { index[c] = some; });
}
// Lists a patch that may reach beyond the grid of a phase; returns which cells there are, and are shown.
inline uint64_t list_seen(const Patch& patch, const Phase& phase, const bool* shown, int64_t* index) {
  const int n = patch.list(phase, index);
  uint64_t seen = patch.inside(phase.grid());
  replace_unseen(seen, n, index);
  if (!shown) return seen;
  seen &= shown_bits(shown, index, n);
  replace_unseen(seen, n, index);
  return seen;
}

// Patches of a grid in a range of numbers along each axis.
struct Pieces {
  const Patches* cut;
  Grid grid;
  Span y, x;
  int64_t count() const { return y.empty() || x.empty() ? 0 : y.size() * x.size(); }
  Patch operator[](int64_t n) const {
    const Patch p = whole(n);
    return {p.y.within(grid.h), p.x.within(grid.w)};
  }
  // With cells that the grid does not have.
  Patch whole(int64_t n) const { return {cut->y.piece(y.lo + n / x.size()), cut->x.piece(x.lo + n % x.size())}; }
  // With those before and beside its own alone, so that these lie where they lie in the whole.
  Patch in_place(int64_t n) const {
    const Patch p = whole(n);
    return {{p.y.lo, p.y.within(grid.h).hi}, p.x};
  }
  // Number in the whole grid, `across` patches wide.
  int64_t number(int64_t n, int64_t across) const { return (y.lo + n / x.size()) * across + x.lo + n % x.size(); }
};
// Those that hold the cells of two spans.
inline Pieces pieces_of(const Patches& cut, Grid grid, Span y, Span x) {
  if (y.empty() || x.empty()) return {&cut, grid, {}, {}};
  return {&cut, grid, cut.y.pieces(y), cut.x.pieces(x)};
}
// Those of group (y, x).
inline Pieces group_of(const Patches& cut, Grid grid, Grid group, int64_t y, int64_t x) {
  return {&cut, grid, Span{y * group.h, (y + 1) * group.h}.within(cut.y.count(grid.h)),
          Span{x * group.w, (x + 1) * group.w}.within(cut.x.count(grid.w))};
}
inline Patch bounds(const Pieces& p) {
  const Patch first = p[0], last = p[p.count() - 1];
  return {{first.y.lo, last.y.hi}, {first.x.lo, last.x.hi}};
}

enum class Order { none, columns_before, columns_after };

// Bits of the columns that each row sees: those whose places are in of_y(row's y) and of_x(row's x); in raster order at
// or before the row, or at or after it. Null if that is all of 64 columns.
template <class OfY, class OfX>
Mask masks(const Patch& rows, const Patch& columns, Order order, uint64_t* mask, OfY&& of_y, OfX&& of_x) {
  const int64_t w = columns.x.size();
  uint64_t every_line = 0, all = ~uint64_t(0), across[kTile], own_line[kTile];
  for (int64_t i = 0; i < columns.y.size(); ++i) every_line |= uint64_t(1) << (i * w);
  const auto in_line = [&](Span s) { return range_bits(s.lo - columns.x.lo, s.hi - columns.x.lo) * every_line; };
  const auto lines = [&](Span s) { return range_bits((s.lo - columns.y.lo) * w, (s.hi - columns.y.lo) * w); };
  for (int64_t x = rows.x.lo, i = 0; x < rows.x.hi; ++x, ++i) {
    const Span seen = of_x(x).within(columns.x);
    across[i] = in_line(seen);
    if (order == Order::columns_before) own_line[i] = in_line({seen.lo, x + 1 < seen.hi ? x + 1 : seen.hi});
    if (order == Order::columns_after) own_line[i] = in_line({x > seen.lo ? x : seen.lo, seen.hi});
  }
  for (int64_t y = rows.y.lo; y < rows.y.hi; ++y) {
    const Span seen = of_y(y).within(columns.y);
    uint64_t down = lines(seen), own = 0;
    if (order != Order::none) {
      own = lines(Span{y, y + 1}.within(seen));
      down = order == Order::columns_before ? lines({seen.lo, y < seen.hi ? y : seen.hi})
                                            : lines({y + 1 > seen.lo ? y + 1 : seen.lo, seen.hi});
    }
    for (int64_t i = 0; i < rows.x.size(); ++i, ++mask) {
      *mask = order == Order::none ? down & across[i] : (down & across[i]) | (own & own_line[i]);
      all &= *mask;
    }
  }
  return all == ~uint64_t(0) ? nullptr : mask - rows.count();
}

// Masks of so many rows but for the columns that are not `seen`.
inline Mask only(uint64_t seen, Mask all, int rows, uint64_t* mask) {
  if (seen == ~uint64_t(0)) return all;
  for (int r = 0; r < rows; ++r) mask[r] = (all ? all[r] : ~uint64_t(0)) & seen;
  return mask;
}

// The same but for the rows that are not.
inline Mask only_rows(uint64_t seen, Mask all, int rows, uint64_t* mask) {
  for (int r = 0; r < rows; ++r) mask[r] = seen >> r & 1 ? all ? all[r] : ~uint64_t(0) : 0;
  return mask;
}

inline bool meet(const Patch& a, const Patch& b) { return !a.y.within(b.y).empty() && !a.x.within(b.x).empty(); }

// Which of the 64 keys of the prefix from `first` on exist.
inline uint64_t prefix_bits(const Prefix& prefix, int64_t b, int64_t first) {
  const int64_t n = prefix.len - first < kTile ? prefix.len - first : kTile;
  if (!prefix.mask) return range_bits(0, n);
  uint64_t bits = 0;
  for (int64_t c = 0; c < n; ++c) bits |= uint64_t(prefix.mask[b * prefix.len + first + c]) << c;
  return bits;
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
