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

// `at`: the cell, in raster order; causal: no cells behind it.
template <class T>
void attend_cell(const LocalAttention& a, const CellRow& row, int64_t at, bool causal, Arena arena) {
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
  Patch local{phase.y.window(y), phase.x.window(x)};
  if (causal) local.y.hi = y + 1;
  // the last line ends with the cell itself
  const int64_t seen = local.y.size() * local.x.size() - (causal ? local.x.hi - x - 1 : 0);
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
    return as(a.k, a.v, cells(local, (number - before) * kTile, seen, index, [&](int64_t i, int64_t j) {
                return phase.first + i * phase.down + j * phase.right;
              }));
  };
  each_tile<T>(before + ceil_div(seen, kTile), list,
               [&](int64_t number, const Columns<T>& tile, const Columns<T>& next) {
                 if (number >= prefix_tiles(a))
                   return engine.step(tile, nullptr, number < before ? a.coarse.bias : 0.0, next);
                 uint64_t mask[kNarrow];
                 for (uint64_t& bits : mask) bits = prefix_bits(a.prefix, b, number * kTile);
                 engine.step(tile, mask, a.prefix.bias, next);
               });
  engine.finish([&](int r) { return a.out.at<T>(b, row.h + r) + row.t * a.out.stride[2]; }, [](int, Acc<T>) {});
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
