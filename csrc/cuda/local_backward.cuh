// Backward of 2D local attention, 16-bit dtypes: two passes of one kernel, each with the same bits every time.
//
// kKeys = false: a warp owns 4 x 4 queries (x = q, y = dout) and streams keys (a = k, b = v): dq, and of each query,
// for what owns keys, its log-sum-exp in base 2 and -delta.
//
// kKeys = true: a warp owns 4 x 4 keys (x = k, y = v) and streams queries (a = q, b = dout): dk and dv.
//
// In both z = x a, dp = y b, ds = p (dp - delta), first += ds a; of keys second += p b.
//
// Memory. Reads its owners' rows, writes their gradients, once; what it streams as local_walk.cuh and local_extra.cuh
// have it. With several query heads to one of keys it walks over the same keys for each of them, and keeps its sums in
// float32 in between in `sums`.
#pragma once

#include "local_extra.cuh"
#include "local_options.cuh"
#include "local_own.cuh"

namespace cogview::cuda {

struct BackwardArgs {
  Strips p;
  Plane x, y, out, a, b, first, second;
  Plane stats;              // float of each query: lse in base 2, and -delta
  int64_t second_stats;     // bytes from one to the other
  Plane cells;              // of [batch, heads, cells], in elements: of lse, dlse, stats and sums
  const float *lse, *dlse;  // dlse may be null
  float *sums, *sums2;      // [D] of each key, where p.repeats > 1
  float scale, step;        // > 0, in base 2; what logits are products times
  u32 flip;                 // 0x80008000 to negate x in z
  Extra extra;
  LocalOptions options;
};

// What a block has of its queries' statistics: 16 of each unit, then the others of each unit.
struct Stats {
  Plane stats;
  int64_t second;
  const char* at = nullptr;
  int left = 0, width = 0;
  __device__ void aim(const Strips& p, const Item& item, int box_left) {
    at = item.in(stats, p, item.other), left = box_left, width = item.width;
  }
  __device__ void load(const Strips& p, u32 thread, int top, int height, u32 to, u32 threads) const {
    for (u32 i = thread; i < 16u * p.units; i += threads) {
      const int y = top + static_cast<int>(i % 16 / 4), x = left + static_cast<int>(i / 16 * 4 + i % 4);
      const bool there = y >= 0 && y < height && x >= 0 && x < width;
      const char* from = at + y * stats.row + x * stats.cell;
      gpu::copy4(to + 4 * i, from, there);
      gpu::copy4(to + 4 * i + 64 * p.units, from + second, there);
    }
  }
};

namespace {

template <class T, int D, bool kKeys, bool kExtra, bool kOptions>
__global__ void __launch_bounds__(most_threads(D, kKeys ? Pass::grad_key : Pass::grad_query), 1)
    local_backward(const __grid_constant__ BackwardArgs a) {
#ifndef COGVIEW_BEFORE_SM_80
  const Strips& p = a.p;
  constexpr u32 kOwn = own_bytes(D, kKeys ? Pass::grad_key : Pass::grad_query);
  constexpr u32 kUnit = Unit<D>::kBytes;  // own ones: x, y, result and, of queries, out
  using Also = std::conditional_t<kKeys, Stats, Nothing>;
  Also also{};
  if constexpr (kKeys) also.stats = a.stats, also.second = a.second_stats;
  Walk<D, 0, Also> walk(p, a.a, a.b, also);
  [[maybe_unused]] ExtraStream<D> extra(a.extra,
                                        walk.base + p.extra + walk.group * (kExtra ? ExtraStream<D>::kBytes : 0),
                                        kExtra && (!kOptions || a.extra.any()) ? walk.thread : ~0u);
  RowsAhead ahead(p, walk.base, walk.warp, walk.lane);
  __syncthreads();
  walk.start();

  const u32 lane = walk.lane, stage = walk.base + p.stage + walk.warp * kOwn;
  [[maybe_unused]] const u32 own_lse = stage + 4 * kUnit;  // and its gradient, of each row
  const Matrices<D> as_columns(Unit<D>::columns(lane)), as_rows(Unit<D>::rows(lane));
  Own<D> own{lane};
  Item item(p, 0);
  char *x_in, *y_in, *out_in, *first_in, *second_in;  // of the tile's columns
  int64_t cells_at;
  RowBits rows(p, own);
  int tile = 0, units = 0;
  u32 tile_at;
  Columns columns;
  const auto begin = [&] {
    item = Item(p, walk.n), ahead.ready = -1;
    own.height = item.height, own.width = item.width;
    const int t = item.strip * Strip<D>::kTiles + walk.tile, origin = box_origin<D>(p, item);
    own.x = 4 * t;
    if (!own.active()) return;
    const Span reach = p.x.units(t, own.width);
    tile = reach.lo, units = reach.hi - reach.lo, tile_at = (tile - origin) * kUnit;
    columns = Columns::of(p, own, 4 * tile - p.x.above, p.ordered);
    const auto in = [&](const Plane& t) { return own.column_of(item.in(t, p, item.owner), t); };
    x_in = in(a.x), y_in = in(a.y), first_in = in(a.first);
    if constexpr (kKeys) second_in = in(a.second);
    if constexpr (!kKeys) out_in = in(a.out);
    cells_at = item.offset(a.cells, p, item.owner);
  };
  const auto cell_at = [&](int r) { return cells_at + own.row(r) * a.cells.row + own.column() * a.cells.cell; };
  const auto fetch = [&](int step) {  // own rows of a step
    Own<D> of = own;
    of.y = 4 * step;
    of.copy(stage, x_in, a.x);
    of.copy(stage + kUnit, y_in, a.y);
    if constexpr (!kKeys) {
      of.copy(stage + 3 * kUnit, out_in, a.out);
      const int row = lane % 16, y = of.y + row / 4, x = of.x + row % 4;
      const float* from = lane < 16 ? a.lse : a.dlse;
      const bool there = from && y < of.height && x < of.width;
      gpu::copy4(own_lse + 8 * row + lane / 16 * 4,
                 (there ? from : a.lse) + (there ? cells_at + y * a.cells.row + x * a.cells.cell : 0), there);
    }
    ahead.arrived();
  };

  for_each_step<kExtra>(walk, item, own, extra, begin, [&](int s, int end) {
    ahead.wait(s, fetch);
    Operand<D> x, y;
    x.load(as_rows, stage);
    y.load(as_rows, stage + kUnit);
    float lse[2] = {}, delta[2] = {};
    if constexpr (!kKeys) {
      Operand<D> out;
      out.load(as_rows, stage + 3 * kUnit);
      row_products<T>(delta, y, out);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!own.inside(r)) continue;
        const float2 of_row = gpu::load_shared_pair(own_lse + lane / 4 * 8 + 64 * r);
        lse[r] = of_row.x * kLog2e, delta[r] -= of_row.y;
        if (kOptions && lse[r] == -INFINITY) lse[r] = delta[r] = 0;  // no keys: whatever came for it
        if (lane % 4) continue;
        float* to = reinterpret_cast<float*>(a.stats.at) + cell_at(r);
        gpu::store_global_float(to, lse[r]);
        gpu::store_global_float(to + a.second_stats / 4, -delta[r]);
      }
    }
    if (a.flip) x.flip(a.flip);
    ahead.prepare(walk.following(item.steps, s, end), item.steps.end, fetch);

    float acc[D / 8][4], acc2[kKeys ? D / 8 : 2][4];
    clear(acc), clear(acc2);
    const auto each_sum = [&](auto access) {  // in float32, between walks
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (!own.inside(r)) continue;
        float* at = a.sums + cell_at(r) * D + lane % 4 * 2;
        float* at2 = a.sums2 + cell_at(r) * D + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          access(reinterpret_cast<float2*>(at + 8 * j), acc[j] + 2 * r);
          access(reinterpret_cast<float2*>(at2 + 8 * j), acc2[kKeys ? j : 0] + 2 * r);
        }
      }
    };
    if (kKeys && item.repeat) each_sum([](const float2* from, float* x) { x[0] = from->x, x[1] = from->y; });

    // what a unit adds to the gradients
    const auto add = [&](float (&z)[2][4], u32 a_at, u32 b_at, float scale, auto lse_of, auto start) {
      float dp[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[h][e] = start(h, e);
      add_scores<T>(dp, y, as_columns, b_at);
      u32 w[4], ds[4];
      grad_scores<T>(w, ds, z, dp, scale, lse_of);
      add_rows<T>(acc, ds, as_rows, a_at);
      if constexpr (kKeys) add_rows<T>(acc2, w, as_rows, b_at);
    };
    const float scale = kOptions && a.options.table ? 1.f : a.scale;  // of scores that have their biases
    const int top = 4 * (item.steps.origin + walk.v) - p.y.above;
    int from = max(-top, 0) / 4, to = min(p.unit_rows, (own.height - top + 3) / 4);
    if (p.y.axis.shift) {
      const Span reach = p.y.units(s, own.height);
      from = reach.lo - item.steps.origin - walk.v, to = reach.hi - item.steps.origin - walk.v;
    }
    if (kOptions && !a.options.local) to = from;
    rows.at(p, own, top);
    if constexpr (kOptions && kKeys) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (HiddenKeys::own(a.options, p, item, own, r)) rows.seen[r] = 0;
    }
#pragma unroll 1
    for (int uy = from; uy < to; ++uy) {
      const u32 slot = walk.wait(uy), block = slot * p.block + tile_at;
      u32 seen[2][2];  // of half and row: bit 4 u + j
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int r = 0; r < 2; ++r) seen[h][r] = rows.of(columns, r, 1u << (4 * uy + 2 * h));
      if constexpr (kOptions && !kKeys) {
        const HiddenKeys hidden(a.options, p, item, top + 4 * uy, 4 * tile - p.x.above, lane);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int r = 0; r < 2; ++r) seen[h][r] &= ~hidden.bits[h];
      }
#pragma unroll 1
      for (int ux = 0; ux < units; ++ux) {
        const u32 at = walk.base + block + ux * kUnit;
        float z[2][4];
        add_scores<T, true>(z, x, as_columns, at);
        if constexpr (kOptions) {
          if (a.options.table) {
            const Biases biases(a.options, kKeys ? item.other : item.owner);
            constexpr int kSign = kKeys ? -1 : 1;
            biases.add<kSign>(z, a.scale, biases.first<kSign>(own, top + 4 * uy, 4 * (tile + ux) - p.x.above));
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (!(seen[h][e / 2] >> e % 2 & 1)) z[h][e] = -INFINITY;
            if (e % 2) seen[h][e / 2] >>= 4;
          }
        if constexpr (kKeys) {
          float2 lse_of[2], start[2];  // of the lane's columns
          const u32 of = walk.base + p.rows + slot * p.row_block + tile_at / kUnit * 64 + 64 * ux + lane % 4 * 8;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            lse_of[h] = gpu::load_shared_pair(of + 32 * h);
            start[h] = gpu::load_shared_pair(of + 32 * h + 64 * p.units);
          }
          add(
              z, at, at + p.values, scale, [&](int h, int e) { return e % 2 ? lse_of[h].y : lse_of[h].x; },
              [&](int h, int e) { return e % 2 ? start[h].y : start[h].x; });
        } else {
          add(
              z, at, at + p.values, scale, [&](int, int e) { return lse[e / 2]; },
              [&](int, int e) { return -delta[e / 2]; });
        }
      }
    }
    if (s + 1 == end) walk.release();
    if constexpr (kExtra) {
      int cy[2], cx;
      extra.centers(p, item, own, cy, cx);
#pragma unroll 1
      for (int i = 0; i < extra.slots; ++i) {
        const u32 seen = extra.seen(i, lane, cy, cx), keys = extra.wait(i);
        const float bias = extra.bias(i);
#pragma unroll 1
        for (int u = 0; u < 2; ++u) {
          float z[2][4];
          add_scores<T, true>(z, x, as_columns, keys + u * kUnit);
          extra.hide(z, seen, u);
          add(
              z, keys + u * kUnit, keys + ExtraStream<D>::kValues + u * kUnit, a.scale,
              [&](int, int e) { return lse[e / 2] - bias; }, [&](int, int e) { return -delta[e / 2]; });
        }
        extra.release(i, lane);
      }
    }
    if (kKeys && item.repeat + 1 < p.repeats) {
      each_sum([](float2* to, const float* x) { *to = {x[0], x[1]}; });
    } else {
      const auto store = [&](const auto& sums, float factor, char* in, const Plane& to) {
        __syncwarp();
        store_rows<T>(sums, factor, factor, as_rows, stage + 2 * kUnit);
        __syncwarp();
        own.store(stage + 2 * kUnit, in, to);
      };
      store(acc, a.step, first_in, a.first);
      if constexpr (kKeys) store(acc2, 1.f, second_in, a.second);
    }
  });
#endif
}

}  // namespace
}  // namespace cogview::cuda
