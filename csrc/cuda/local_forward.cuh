// Forward of 2D local attention, 16-bit dtypes.
//
// Memory. Reads q, writes out and lse, once; keys and values as local_walk.cuh and local_extra.cuh have them.
// A warp owns 4 x 4 queries. Scores of kUnitRows rows of units are in registers at once; masks are the accumulators'
// initial values, 0 or -inf. Should a masked key's score be infinite or NaN, the sum is NaN: then the step is done once
// more with masks after the products.
#pragma once

#include "local_extra.cuh"
#include "local_options.cuh"
#include "local_own.cuh"

namespace cogview::cuda {

struct ForwardArgs {
  Strips p;
  Plane q, k, v, out;
  Plane lse;    // float of each query
  float scale;  // > 0, in base 2
  u32 flip;     // 0x80008000 to negate queries
  Extra extra;
  LocalOptions options;
};

namespace {

// kUnits: columns of units that a warp sees; kUnitRows: rows of them at once, all or 1. With options masks come after
// products, in any order of keys, of one row of units.
template <class T, int D, int kUnits, int kUnitRows, bool kCausal, bool kExtra, bool kOptions>
__global__ void __launch_bounds__(most_threads(D, Pass::forward), 1)
    local_forward(const __grid_constant__ ForwardArgs a) {
#ifndef COGVIEW_BEFORE_SM_80
  const Strips& p = a.p;
  constexpr u32 kOwn = own_bytes(D, Pass::forward);
  constexpr int kBox = kUnits + Strip<D>::kTiles - 1;
  Walk<D, kBox> walk(p, a.k, a.v);
  [[maybe_unused]] ExtraStream<D> extra(a.extra,
                                        walk.base + p.extra + walk.group * (kExtra ? ExtraStream<D>::kBytes : 0),
                                        kExtra && (!kOptions || a.extra.any()) ? walk.thread : ~0u);
  RowsAhead ahead(p, walk.base, walk.warp, walk.lane);
  __syncthreads();
  walk.start();

  const u32 lane = walk.lane, stage = walk.base + p.stage + walk.warp * kOwn;
  const u32 result = stage + Unit<D>::kBytes;
  const Matrices<D> columns(Unit<D>::columns(lane)), as_rows(Unit<D>::rows(lane));
  Own<D> own{lane};
  Item item(p, 0);
  RowBits rows(p, own);
  char *q, *out, *lse;  // of the tile's columns
  u32 tile_at;          // of the warp's first unit in a block
  // of columns that are seen, the first of which is at `left`: as bits, or 0 and -inf
  [[maybe_unused]] int left;
  [[maybe_unused]] Columns seen;
  [[maybe_unused]] float column[kUnits][2], before[kCausal ? kUnits : 1][2];
  const auto begin = [&] {
    item = Item(p, walk.n), ahead.ready = -1;
    own.height = item.height, own.width = item.width;
    const int tile = item.strip * Strip<D>::kTiles + walk.tile, origin = box_origin<D>(p, item);
    own.x = 4 * tile;
    const int unit = p.x.axis.shift && own.active() ? p.x.units(tile, own.width).lo : tile;
    tile_at = (unit - origin) * Unit<D>::kBytes;
    left = 4 * unit - p.x.above;
    seen = Columns::of(p, own, left, kOptions ? p.ordered : kCausal);
#pragma unroll
    for (int u = 0; u < (kOptions ? 0 : kUnits); ++u)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        column[u][j] = seen.all >> (4 * u + j) & 1 ? 0.f : -INFINITY;
        gpu::keep(column[u][j]);
        if (kCausal) before[u][j] = seen.half >> (4 * u + j) & 1 ? 0.f : -INFINITY;
        if (kCausal) gpu::keep(before[u][j]);
      }
    q = own.column_of(item.in(a.q, p, item.owner), a.q), out = own.column_of(item.in(a.out, p, item.owner), a.out);
    lse = item.in(a.lse, p, item.owner) + own.column() * a.lse.cell;
  };

  const auto fetch = [&](int step) {  // queries of a step
    Own<D> of = own;
    of.y = 4 * step;
    of.copy(stage, q, a.q);
    ahead.arrived();
  };

  for_each_step<kExtra>(walk, item, own, extra, begin, [&](int s, int end) {
    ahead.wait(s, fetch);
    Operand<D> x;
    x.load(as_rows, stage);
    if (a.flip) x.flip(a.flip);
    ahead.prepare(walk.following(item.steps, s, end), item.steps.end, fetch);
    const int top = 4 * (item.steps.origin + walk.v) - p.y.above;
    rows.at(p, own, top);
    Softmax<D> softmax;
    bool exact = false;
    while (true) {
      softmax.start();
#pragma unroll 1
      for (int u0 = 0; u0 < (kOptions && !a.options.local ? 0 : p.unit_rows); u0 += kUnitRows) {
        float z[kUnitRows * kUnits][2][4];
        u32 values[kUnitRows * kUnits];
        const auto bit = [&](int uy, int h) { return 1u << (4 * (u0 + uy) + 2 * h); };
        const auto in_column = [&](int uy, int ux, int h, int e) {  // 0 or -inf
          const bool same = kCausal && (rows.own[e / 2] & bit(uy, h));
          return same ? before[kCausal ? ux : 0][e % 2] : column[ux][e % 2];
        };
#pragma unroll
        for (int uy = 0; uy < kUnitRows; ++uy) {
          const u32 block = walk.base + walk.wait(u0 + uy) * p.block + tile_at;
#pragma unroll
          for (int ux = 0; ux < kUnits; ++ux) {
            float (&score)[2][4] = z[uy * kUnits + ux];
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int e = 0; e < 4; ++e)
                score[h][e] =
                    kOptions ? 0.f : (rows.seen[e / 2] & bit(uy, h) ? 0.f : -INFINITY) + in_column(uy, ux, h, e);
            add_scores<T>(score, x, columns, block + ux * Unit<D>::kBytes);
            values[uy * kUnits + ux] = block + p.values + ux * Unit<D>::kBytes;
          }
        }
        if constexpr (kOptions) {
          if (a.options.table) {
            const Biases biases(a.options, item.owner);
#pragma unroll
            for (int u = 0; u < kUnits; ++u)
              biases.add<1>(z[u], a.scale, biases.first<1>(own, top + 4 * u0, left + 4 * u));
          }
          const HiddenKeys hidden(a.options, p, item, top + 4 * u0, left, lane);
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const u32 bits = rows.of(seen, r, bit(0, h)) & ~hidden.bits[h];
#pragma unroll
              for (int u = 0; u < kUnits; ++u)
#pragma unroll
                for (int j = 0; j < 2; ++j)
                  if (!(bits >> (4 * u + j) & 1)) z[u][h][2 * r + j] = -INFINITY;
            }
        } else if (exact) {
#pragma unroll
          for (int u = 0; u < kUnitRows * kUnits; ++u)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const bool seen = rows.seen[e / 2] & bit(u / kUnits, h);
                if (!seen || in_column(u / kUnits, u % kUnits, h, e) < 0) z[u][h][e] = -INFINITY;
              }
        }
        softmax.template add<T>(z, kOptions && a.options.table ? 1.f : a.scale, 0.f, as_rows, values, u0 == 0);
      }
      if (kOptions || exact || !__any_sync(~0u, !(softmax.sum[0] + softmax.sum[1] < INFINITY))) break;
      exact = true;
    }
    if (s + 1 == end) walk.release();
    if constexpr (kExtra) {
      int cy[2], cx;
      extra.centers(p, item, own, cy, cx);
#pragma unroll 1
      for (int i = 0; i < extra.slots; ++i) {
        const u32 seen = extra.seen(i, lane, cy, cx), keys = extra.wait(i);
        float z[2][2][4];
        u32 values[2];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          add_scores<T, true>(z[u], x, columns, keys + u * Unit<D>::kBytes);
          values[u] = keys + ExtraStream<D>::kValues + u * Unit<D>::kBytes;
          extra.hide(z[u], seen, u);
        }
        softmax.template add<T>(z, a.scale, extra.bias(i), as_rows, values);
        extra.release(i, lane);
      }
    }
    softmax.finish();
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (lane % 4 == 0 && own.inside(r))
        gpu::store_global_float(reinterpret_cast<float*>(lse + own.row(r) * a.lse.row), softmax.lse(r));
    __syncwarp();
    const auto over_sum = [&](int r) {  // 0 where no key is seen
      return kOptions && softmax.sum[r] == 0 ? 0.f : gpu::reciprocal(softmax.sum[r]);
    };
    store_rows<T>(softmax.acc, over_sum(0), over_sum(1), as_rows, result);
    __syncwarp();
    own.store(result, out, a.out);
  });
#endif
}

}  // namespace
}  // namespace cogview::cuda
