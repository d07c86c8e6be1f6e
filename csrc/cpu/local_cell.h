// One cell's query of 2D local attention, against exactly the keys that it sees, read where they lie: a new token, or a
// query whose tile holds values that are not finite.
#pragma once

#include "local_patches.h"
#include "narrow.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Row t of q and out, of some heads that share their keys.
struct CellRow {
  int64_t b, h, kv, t;
  int heads;
};

// What is added to the scores of the cells [first, first + n) of a patch, in log2, for each head of a row.
template <class A>
void list_biases(const Bias& bias, const CellRow& row, const Patch& patch, int64_t first, int n, int64_t y, int64_t x,
                 A* to) {
  const A* middle = static_cast<const A*>(bias.table) + (row.h * bias.size.h + bias.size.h / 2) * bias.size.w;
  for (int c = 0; c < kTile; ++c) {
    const int64_t down = patch.y.lo + (first + c) / patch.x.size() - y, right = (first + c) % patch.x.size();
    const int64_t at = down * bias.size.w + bias.size.w / 2 + patch.x.lo + right - x;
    for (int r = 0; r < row.heads; ++r)
      to[r * kTile + c] = c < n ? middle[r * bias.size.h * bias.size.w + at] * A(kLog2e) : A(0);
  }
}

// `at`: the cell, in raster order; of the local set it sees those before `end` alone, and none behind it if causal.
template <class T>
void attend_cell(const LocalAttention& a, const CellRow& row, int64_t at, int64_t end, Arena arena) {
  using A = Acc<T>;
  const Grid grid = a.window.grid, dilation = a.window.dilation;
  const int64_t b = row.b, kv = row.kv, top = at / grid.w, left_of = at % grid.w;
  const Phase phase(a, top % dilation.h, left_of % dilation.w);
  const int64_t y = top / dilation.h, x = left_of / dilation.w;

  Narrow<T> engine;
  engine.take(arena, int(a.head_dim));
  int64_t offset[kNarrow];
  for (int r = 0; r < row.heads; ++r) offset[r] = r * a.q.stride[1];
  engine.begin(RowSet<T>{a.q.at<T>(b, row.h) + row.t * a.q.stride[2], 1, offset, row.heads}, a.scale);

  const Patch coarse = a.coarse.grid.h ? Patch{phase.coarse_y.window(y), phase.coarse_x.window(x)} : Patch{};
  Patch local = a.window.kernel.h ? Patch{phase.y.window(y), phase.x.window(x)} : Patch{};
  if (a.window.raster_causal && end > at + 1) end = at + 1;
  // whole lines, and of the last one what lies before the end
  const auto raster = [&](int64_t i, int64_t j) { return phase.first + i * phase.down + j * phase.right; };
  while (!local.y.empty() && raster(local.y.hi - 1, local.x.lo) >= end) --local.y.hi;
  const bool* shown = shown_keys(a, b);
  const int64_t wide = local.x.size();
  int64_t seen = local.count();
  if (seen) {
    const int64_t in_last = ceil_div(end - raster(local.y.hi - 1, local.x.lo), phase.right);
    if (in_last < wide) seen -= wide - in_last;
  }
  const int64_t coarse_tiles = ceil_div(coarse.count(), kTile), before = prefix_tiles(a) + coarse_tiles;
  const auto cells = [](const Patch& p, int64_t first, int64_t end, int64_t* index, auto&& place) {
    int n = 0;
    for (int64_t i = first; i < end && n < kTile; ++i)
      index[n++] = place(p.y.lo + i / p.x.size(), p.x.lo + i % p.x.size());
    return n;
  };
  const auto list = [&](int64_t number, int64_t* index) {
    const auto as = [&](const Tensor4& k, const Tensor4& v, int n) {
      return Columns<T>{rows_of<T>(k, b, kv, index, n), rows_of<T>(v, b, kv, index, n)};
    };
    if (number < prefix_tiles(a)) return as(a.prefix.k, a.prefix.v, rows_from(number * kTile, a.prefix.len, index));
    if (number < before)
      return as(a.coarse.k, a.coarse.v,
                cells(coarse, (number - prefix_tiles(a)) * kTile, coarse.count(), index,
                      [&](int64_t i, int64_t j) { return i * a.coarse.grid.w + j; }));
    return as(a.k, a.v, cells(local, (number - before) * kTile, seen, index, raster));
  };
  each_tile<T>(before + ceil_div(seen, kTile), list,
               [&](int64_t number, const Columns<T>& tile, const Columns<T>& next) {
                 const bool prefix = number < prefix_tiles(a), is_local = number >= before;
                 uint64_t mask[kNarrow], bits = ~uint64_t(0);
                 if (prefix) bits = prefix_bits(a.prefix, b, number * kTile);
                 if (is_local && shown) bits = shown_bits(shown, tile.keys.index, tile.keys.count);
                 for (uint64_t& of_row : mask) of_row = bits;
                 const Mask masked = prefix || (is_local && shown) ? mask : nullptr;
                 const double bias = prefix ? a.prefix.bias : is_local ? 0.0 : a.coarse.bias;
                 if (!is_local || !a.bias.table) return engine.step(tile, masked, bias, next);
                 A biases[kNarrow * kTile];
                 list_biases(a.bias, row, local, (number - before) * kTile, tile.keys.count, y, x, biases);
                 engine.step(tile, masked, bias, next, biases);
               });
  engine.finish([&](int r) { return a.out.at<T>(b, row.h + r) + row.t * a.out.stride[2]; }, [](int, Acc<T>) {});
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
