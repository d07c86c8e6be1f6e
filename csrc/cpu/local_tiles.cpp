// 2D local attention on the tile unit, for the dtypes that it multiplies.
//
// Memory. Tensors come with any strides but a last one of 1, and aligned to their elements only; scratch and the sums
// are aligned to 64 bytes. Rows are packed into scratch, once for a group of owners.
//   forward        reads q, k, v, prefix, coarse; writes out and lse, each row once.
//   prepare        reads dout, out, dlse; writes delta, and zeros to dq_sums.
//   grad_prefix    reads q, dout, lse, delta, prefix; adds to dq_sums of its own chunk of queries, writes that chunk's
//                  prefix_dks and prefix_dvs, which finish_prefix sums in the order of the chunks and writes.
//   grad_coarse, grad_key  read the same of the queries that see their keys; add to dq_sums of these, which no other
//                  group of the same color does; write dk and dv, each row once.
//   finish         reads dq_sums; writes dq.
// With a bias a tile's columns lie where they lie in a whole patch, also at the edges of the image, for vectors of the
// table to fit; grad_key then adds to the part of the table's gradient that is the item's own.
#include "local_attention_2d.h"

#include "kernel.h"
#include "local_bias.h"
#include "local_cell.h"
#include "tile_forward.h"
#include "tile_grad_key.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

using A = float;  // of all dtypes on tiles

template <class T>
void fill_bias(const LocalTilePlan& plan, int64_t h, char* scratch) {
  Arena arena{scratch};
  BiasVectors<A> table;
  table.take(arena, plan.bias, plan.bias.cells, plan.bias.of_keys, false, bias_values<A>(plan.bias, h));
  table.fill(plan.problem.bias, h);
}

// ---- forward ----

// A group of query patches of one head, and the tiles of keys they see: prefix, coarse, local.
struct QueryGroup {
  const LocalAttention& a;
  int64_t b, kv;
  Phase phase;
  Pieces own, coarse, local;
  BiasVectors<A> bias;  // if there is a table

  QueryGroup(const LocalTilePlan& plan, int64_t b, int64_t kv, int64_t number, Grid groups)
      : a(plan.problem),
        b(b),
        kv(kv),
        phase(a, number / (groups.h * groups.w)),
        own(group_of(plan.queries, phase.grid(), plan.queries.forward, number / groups.w % groups.h,
                     number % groups.w)) {
    if (!own.count()) return;
    const Owner all = owner(bounds(own));
    coarse = pieces_of(plan.coarse, a.coarse.grid, all.coarse.y, all.coarse.x);
    if (a.window.kernel.h) local = pieces_of(plan.keys, phase.grid(), all.local.y, all.local.x);
  }
  int64_t tiles() const { return prefix_tiles(a) + coarse.count() + local.count(); }

  // The patch of a tile of cells.
  Patch patch(int64_t number) const {
    const int64_t n = number - prefix_tiles(a);
    if (n < coarse.count()) return n < 0 ? Patch{} : coarse[n];
    return a.bias.table ? local.in_place(n - coarse.count()) : local[n - coarse.count()];
  }

  template <class T>
  void pack(int64_t number, const Patch& patch, typename Forward<T>::Tile& tile) const {
    int64_t index[kTile];
    const auto as = [&](const Tensor4& k, const Tensor4& v, int n) {
      tile.pack(rows_of<T>(k, b, kv, index, n), rows_of<T>(v, b, kv, index, n), int(a.head_dim));
    };
    if (number < prefix_tiles(a)) {
      tile.valid = prefix_bits(a.prefix, b, number * kTile);
      as(a.prefix.k, a.prefix.v, rows_from(number * kTile, a.prefix.len, index));
    } else if (number < prefix_tiles(a) + coarse.count()) {
      as(a.coarse.k, a.coarse.v, patch.list(0, a.coarse.grid.w, 1, index));
    } else if (!a.bias.table && !a.key_mask) {
      tile.valid = ~uint64_t(0);
      as(a.k, a.v, patch.list(phase, index));
    } else {
      tile.valid = list_seen(patch, phase, shown_keys(a, b), index);
      if (tile.valid) as(a.k, a.v, patch.count());
    }
  }

  // A patch of queries and what it sees of the other grids.
  struct Owner {
    Patch rows, coarse, local;
  };
  Owner owner(const Patch& rows) const {
    Owner x{rows, {}, {phase.y.windows(rows.y), phase.x.windows(rows.x)}};
    if (a.coarse.grid.h) x.coarse = {phase.coarse_y.windows(rows.y), phase.coarse_x.windows(rows.x)};
    if (a.window.raster_causal && rows.y.hi < x.local.y.hi) x.local.y.hi = rows.y.hi;
    return x;
  }

  // Calls step(mask, bias) if an owner sees any of a tile's keys.
  template <class Step>
  void see(const Owner& owner, int64_t number, const Patch& tile, uint64_t valid, Step&& step) const {
    uint64_t mask[kTile];
    if (number < prefix_tiles(a)) {
      if (valid == ~uint64_t(0)) return step(nullptr, a.prefix.bias);
      for (int r = 0; r < owner.rows.count(); ++r) mask[r] = valid;
      step(mask, a.prefix.bias);
    } else if (number < prefix_tiles(a) + coarse.count()) {
      if (meet(owner.coarse, tile))
        step(masks(
                 owner.rows, tile, Order::none, mask, [&](int64_t y) { return phase.coarse_y.window(y); },
                 [&](int64_t x) { return phase.coarse_x.window(x); }),
             a.coarse.bias);
    } else if (valid && meet(owner.local, tile)) {
      const Mask all = masks(
          owner.rows, tile, a.window.raster_causal ? Order::columns_before : Order::none, mask,
          [&](int64_t y) { return phase.y.window(y); }, [&](int64_t x) { return phase.x.window(x); });
      const Mask seen = only(valid, all, owner.rows.count(), mask);
      if (!a.bias.table) return step(seen, 0.0);
      Places at[kTile];
      bias.places(owner.rows, tile, at);
      step(seen, TileBias<A>{bias.values, nullptr, at, bias.most()});
    }
  }
};

template <class T>
void forward(const LocalTilePlan& plan, int64_t item, char* scratch) {
  const LocalAttention& a = plan.problem;
  const int64_t pairs = a.batch * a.heads, b = item % pairs / a.heads, h = item % a.heads;
  QueryGroup it(plan, b, h / (a.heads / a.kv_heads), item / pairs,
                groups_of(phase_grid(a.window), plan.queries, plan.queries.forward));
  const int owners = int(it.own.count());
  Arena arena{scratch};
  if (a.bias.table) it.bias.take(arena, plan.bias, plan.bias.cells, true, false, bias_values<A>(plan.bias, h));
  Group<T, Forward> group(arena, int(a.head_dim), owners);
  QueryGroup::Owner owner[kGroup];
  Patch patch[kBatch];
  int64_t index[kTile];
  for (int o = 0; o < owners; ++o) {
    owner[o] = it.owner(it.own[o]);
    const int n = owner[o].rows.list(it.phase, index);
    group.owners[o].begin(rows_of<T>(a.q, b, h, index, n), a.scale);
  }
  if (owners)
    group.meet(
        owners, it.tiles(),
        [&](int64_t number, auto& tile) {
          Patch& place = patch[&tile - group.tiles];
          place = it.patch(number);
          it.pack<T>(number, place, tile);
        },
        [&](Forward<T>& engine, int o, int64_t number, const auto& tile) {
          it.see(owner[o], number, patch[&tile - group.tiles], tile.valid,
                 [&](Mask mask, const auto& bias) { engine.step(group.work, tile, mask, bias); });
        });
  Acc<T>* lse = stat<T>(a.lse, a, b, h);
  uint64_t spoilt[kGroup];
  for (int o = 0; o < owners; ++o) {
    owner[o].rows.list(it.phase, index);
    spoilt[o] = group.owners[o].finish([&](int r) { return a.out.at<T>(b, h) + index[r] * a.out.stride[2]; },
                                       [&](int r, Acc<T> value) { lse[index[r]] = value; });
  }
  for (int o = 0; o < owners; ++o) {
    if (!spoilt[o]) continue;
    owner[o].rows.list(it.phase, index);
    each_bit(spoilt[o],
             [&](int r) { attend_cell<T>(a, {b, h, it.kv, index[r], 1}, index[r], a.seqlen_q, Arena{scratch}); });
  }
}

// ---- backward ----

// A patch of queries by its number over all phases; a phase may lack some. With a bias a whole one.
struct QueryPatch {
  Phase phase;
  Patch patch;
  bool whole = false;
  QueryPatch(const LocalTilePlan& plan, int64_t number) : phase(plan.problem, number / plan.patches_of_phase()) {
    const int64_t across = plan.queries.x.count(phase_grid(plan.problem.window).w),
                  n = number % plan.patches_of_phase();
    const Patch all{plan.queries.y.piece(n / across), plan.queries.x.piece(n % across)};
    patch = {all.y.within(phase.y.queries), all.x.within(phase.x.queries)};
    if (plan.problem.bias.table && patch.count()) patch.x = all.x, whole = true;
  }
  // Returns bits of the cells that there are.
  uint64_t list(int64_t* index) const {
    return whole ? list_seen(patch, phase, nullptr, index) : range_bits(0, patch.list(phase, index));
  }
};

// Where the gradient of a patch of queries is summed up, transposed.
template <class T>
Acc<T>* dq_patch(const LocalTilePlan& plan, int64_t b, int64_t h, int64_t number) {
  const LocalAttention& a = plan.problem;
  return static_cast<Acc<T>*>(plan.dq_sums) + ((b * a.heads + h) * plan.query_patches() + number) * dq_tile_size(a);
}
// Where the gradients of the prefix are summed up, by chunk of queries.
template <class T>
Acc<T>* prefix_part(void* parts, const LocalTilePlan& plan, int64_t b, int64_t kv, int64_t chunk, int64_t p) {
  const LocalAttention& a = plan.problem;
  return static_cast<Acc<T>*>(parts) +
         (((b * a.kv_heads + kv) * plan.prefix_chunks + chunk) * a.prefix.len + p) * a.head_dim;
}

template <class T>
void prepare(const LocalTilePlan& plan, int64_t item, char*) {
  const LocalAttention& a = plan.problem;
  const int64_t number = item % plan.query_patches(), h = item / plan.query_patches() % a.heads;
  const int64_t b = item / plan.query_patches() / a.heads;
  const QueryPatch it(plan, number);
  std::memset(static_cast<void*>(dq_patch<T>(plan, b, h, number)), 0, sizeof(Acc<T>) * dq_tile_size(a));
  int64_t index[kTile];
  it.list(index);
  set_delta<T>(a, plan.delta, b, h, index, it.patch.count());
}

template <class T>
void finish(const LocalTilePlan& plan, int64_t item, char*) {
  const LocalAttention& a = plan.problem;
  const int64_t number = item % plan.query_patches(), h = item / plan.query_patches() % a.heads;
  const int64_t b = item / plan.query_patches() / a.heads;
  const QueryPatch it(plan, number);
  int64_t index[kTile];
  Acc<T>* dq = dq_patch<T>(plan, b, h, number);
  const uint64_t there = it.list(index);
  const int n = __builtin_popcountll(there);
  if (n < it.patch.count()) {  // of a whole patch those that there are, to the front
    const auto move = [&](auto* x) {
      int to = 0;
      each_bit(there, [&](int c) { x[to++] = x[c]; });
    };
    move(index);
    for (int64_t row = 0; row < a.head_dim; ++row) move(dq + row * kTile);
  }
  write_transposed<T>(dq, Acc<T>(a.scale), index, n, int(a.head_dim), a.dq.at<T>(b, h), a.dq.stride[2]);
}

// Queries as a tile's columns.
struct Shown {
  Patch patch;
  uint64_t there;
};

// Shows n patches of the queries of head h to owners of keys: number_of(i) is a patch's number over all phases,
// see(owner, o, tile, queries) has an owner take its step.
template <class T, class Number, class See>
void meet_queries(const LocalTilePlan& plan, int64_t b, int64_t h, Group<T, GradKey>& group, int owners, int64_t n,
                  Number&& number_of, See&& see) {
  const LocalAttention& a = plan.problem;
  Shown shown[kBatch];
  group.meet(
      owners, n,
      [&](int64_t i, auto& tile) {
        const QueryPatch it(plan, number_of(i));
        int64_t index[kTile];
        shown[&tile - group.tiles] = {it.patch, it.list(index)};
        const int count = it.patch.count();
        tile.pack(rows_of<T>(a.q, b, h, index, count), rows_of<T>(a.dout, b, h, index, count), stat<T>(a.lse, a, b, h),
                  stat<T>(plan.delta, a, b, h), int(a.head_dim));
        tile.dq = dq_patch<T>(plan, b, h, number_of(i));
      },
      [&](GradKey<T>& owner, int o, int64_t, const auto& tile) {
        const Shown& queries = shown[&tile - group.tiles];
        if (queries.patch.count()) see(owner, o, tile, queries);
      });
}

template <class T>
void begin_keys(const LocalAttention& a, GradKey<T>& owner, const Tensor4& k, const Tensor4& v, int64_t b, int64_t kv,
                const int64_t* index, int n) {
  owner.begin(rows_of<T>(k, b, kv, index, n), rows_of<T>(v, b, kv, index, n), a.scale);
}

// A chunk of the queries and the whole prefix: the chunk's part of the prefix's gradients.
template <class T>
void grad_prefix(const LocalTilePlan& plan, int64_t item, char* scratch) {
  const LocalAttention& a = plan.problem;
  const int64_t pairs = a.batch * a.kv_heads, b = item % pairs / a.kv_heads, kv = item % a.kv_heads, d = a.head_dim;
  const int64_t chunk = item / pairs, from = chunk * plan.query_patches() / plan.prefix_chunks;
  const int64_t to = (chunk + 1) * plan.query_patches() / plan.prefix_chunks;
  for (int64_t first = 0; first < a.prefix.len; first += kGroup * kTile) {
    const int64_t left = (a.prefix.len - first + kTile - 1) / kTile;
    const int owners = int(left < kGroup ? left : kGroup);
    Group<T, GradKey> group(Arena{scratch}, int(d), owners);
    int64_t index[kTile];
    for (int o = 0; o < owners; ++o) {
      const int n = rows_from(first + o * kTile, a.prefix.len, index);
      replace_unseen(prefix_bits(a.prefix, b, first + o * kTile), n, index);
      begin_keys(a, group.owners[o], a.prefix.k, a.prefix.v, b, kv, index, n);
    }
    const int64_t heads = a.heads / a.kv_heads;
    for (int64_t h = kv * heads; h < (kv + 1) * heads; ++h)
      meet_queries<T>(
          plan, b, h, group, owners, to - from, [&](int64_t i) { return from + i; },
          [&](GradKey<T>& owner, int o, const auto& tile, const Shown& queries) {
            const uint64_t valid = prefix_bits(a.prefix, b, first + o * kTile);
            uint64_t mask[kTile];
            for (int r = 0; r < kTile; ++r) mask[r] = valid >> r & 1 ? queries.there : 0;
            owner.step(group.work, tile, mask, a.prefix.bias);
          });
    for (int o = 0; o < owners; ++o)
      for (int r = 0; r < group.owners[o].rows; ++r) {
        const int64_t p = first + o * kTile + r;
        std::memcpy(prefix_part<T>(plan.prefix_dks, plan, b, kv, chunk, p), group.owners[o].dk(r), d * sizeof(Acc<T>));
        std::memcpy(prefix_part<T>(plan.prefix_dvs, plan, b, kv, chunk, p), group.owners[o].dv(r), d * sizeof(Acc<T>));
      }
  }
}

// The parts of 64 prefix keys, summed in the order of the chunks.
template <class T>
void finish_prefix(const LocalTilePlan& plan, int64_t item, char*) {
  const LocalAttention& a = plan.problem;
  const int64_t number = item % prefix_tiles(a), kv = item / prefix_tiles(a) % a.kv_heads;
  const int64_t b = item / prefix_tiles(a) / a.kv_heads;
  for (int64_t p = number * kTile; p < a.prefix.len && p < (number + 1) * kTile; ++p) {
    Acc<T>*dk = prefix_part<T>(plan.prefix_dks, plan, b, kv, 0, p),
    *dv = prefix_part<T>(plan.prefix_dvs, plan, b, kv, 0, p);
    for (int64_t chunk = 1; chunk < plan.prefix_chunks; ++chunk)
      for (int64_t c = 0; c < a.head_dim; ++c) {
        dk[c] += prefix_part<T>(plan.prefix_dks, plan, b, kv, chunk, p)[c];
        dv[c] += prefix_part<T>(plan.prefix_dvs, plan, b, kv, chunk, p)[c];
      }
    write_row(dk, Acc<T>(a.scale), int(a.head_dim), a.prefix.dk.at<T>(b, kv) + p * a.prefix.dk.stride[2]);
    write_row(dv, Acc<T>(1), int(a.head_dim), a.prefix.dv.at<T>(b, kv) + p * a.prefix.dv.stride[2]);
  }
}

// A grid of keys: its cell (y, x) is row first + y * down + x * right of the tensors.
struct KeyGrid {
  const Patches& cut;
  Grid grid;
  int64_t first, down, right;
  const Tensor4 &k, &v, &dk, &dv;
  double bias;
  const bool* shown;  // of each row of the tensors; null: all
};
struct Axes {
  const Axis &y, &x;
};

// Group `number` of the patches of keys of a color, and the queries of the phases [from, to) that see them; with a
// table also the item's own part of its gradient, number `bias_slot`; -1: without.
template <class T, class AxesOf>
void grad_patches(const LocalTilePlan& plan, int64_t pair, const KeyGrid& keys, int64_t number, Grid groups,
                  int64_t from, int64_t to, Order order, int64_t bias_slot, char* scratch, AxesOf&& axes_of) {
  const LocalAttention& a = plan.problem;
  const int64_t b = pair / a.kv_heads, kv = pair % a.kv_heads, heads = a.heads / a.kv_heads;
  const Patches& cut = keys.cut;
  const Pieces own = group_of(cut, keys.grid, cut.backward, number / groups.w * cut.colors.h + cut.color.h,
                              number % groups.w * cut.colors.w + cut.color.w);
  const int owners = int(own.count());
  Arena arena{scratch};
  BiasVectors<A> table;
  if (bias_slot >= 0) {
    table.take(arena, plan.bias, plan.bias.cells, false, true, bias_values<A>(plan.bias, kv * heads));
    const bool first = !cut.color.h && !cut.color.w;
    for (int64_t h = kv * heads; first && h < (kv + 1) * heads; ++h)
      std::memset(static_cast<void*>(bias_part<A>(plan.bias, a, b, h, bias_slot)), 0, sizeof(A) * plan.bias.size());
  }
  if (!owners) return;  // a smaller phase
  Group<T, GradKey> group(arena, int(a.head_dim), owners);
  const auto list = [&](int o, int64_t* index) { return own[o].list(keys.first, keys.down, keys.right, index); };
  int64_t index[kTile];
  uint64_t shown[kGroup];
  for (int o = 0; o < owners; ++o) {
    const int n = list(o, index);
    shown[o] = keys.shown ? shown_bits(keys.shown, index, n) : ~uint64_t(0);
    replace_unseen(shown[o], n, index);
    begin_keys(a, group.owners[o], keys.k, keys.v, b, kv, index, n);
  }
  for (int64_t n = from; n < to; ++n) {
    const Phase phase(a, n);
    const Axes axes = axes_of(phase);
    const auto seen_by = [&](const Patch& rows) {
      Patch by{axes.y.seen_by(rows.y), axes.x.seen_by(rows.x)};
      if (order == Order::columns_after && rows.y.lo > by.y.lo) by.y.lo = rows.y.lo;
      return by;
    };
    Patch rows[kGroup], by[kGroup];
    for (int o = 0; o < owners; ++o) rows[o] = own[o], by[o] = seen_by(rows[o]);
    const Patch all = seen_by(bounds(own));
    const Pieces queries = pieces_of(plan.queries, phase.grid(), all.y, all.x);
    const auto number_of = [&](int64_t i) {
      return n * plan.patches_of_phase() + queries.number(i, plan.queries.x.count(phase_grid(a.window).w));
    };
    for (int64_t h = kv * heads; h < (kv + 1) * heads; ++h) {
      if (bias_slot >= 0) table.values = bias_values<A>(plan.bias, h), table.clear_sums();
      meet_queries<T>(plan, b, h, group, owners, queries.count(), number_of,
                      [&](GradKey<T>& owner, int o, const auto& tile, const Shown& columns) {
                        if (!meet(by[o], columns.patch)) return;
                        uint64_t mask[kTile];
                        Mask seen = masks(
                            rows[o], columns.patch, order, mask, [&](int64_t y) { return axes.y.seen(y); },
                            [&](int64_t x) { return axes.x.seen(x); });
                        if (keys.shown) seen = only_rows(shown[o], seen, rows[o].count(), mask);
                        if (bias_slot < 0) return owner.step(group.work, tile, seen, keys.bias);
                        Places at[kTile];
                        table.places(rows[o], columns.patch, at);
                        owner.step(group.work, tile, seen, TileBias<A>{table.values, table.sums, at, table.most()});
                      });
      if (bias_slot >= 0) table.add_to(bias_part<A>(plan.bias, a, b, h, bias_slot));
    }
  }
  for (int o = 0; o < owners; ++o) {
    list(o, index);
    for (int r = 0; r < group.owners[o].rows; ++r)
      group.owners[o].finish(r, keys.dk.at<T>(b, kv) + index[r] * keys.dk.stride[2],
                             keys.dv.at<T>(b, kv) + index[r] * keys.dv.stride[2]);
  }
}

template <class T>
void grad_coarse(const LocalTilePlan& plan, int64_t item, char* scratch) {
  const LocalAttention& a = plan.problem;
  const Coarse& c = a.coarse;
  const int64_t pairs = a.batch * a.kv_heads;
  const KeyGrid keys{plan.coarse, c.grid, 0, c.grid.w, 1, c.k, c.v, c.dk, c.dv, c.bias, nullptr};
  grad_patches<T>(plan, item % pairs, keys, item / pairs, groups_of_color(keys.grid, keys.cut), 0, phases(a.window),
                  Order::none, -1, scratch, [](const Phase& p) { return Axes{p.coarse_y, p.coarse_x}; });
}

template <class T>
void grad_key(const LocalTilePlan& plan, int64_t item, char* scratch) {
  const LocalAttention& a = plan.problem;
  const int64_t pairs = a.batch * a.kv_heads, pair = item % pairs;
  const Grid groups = groups_of_color(phase_grid(a.window), plan.keys);
  const int64_t n = item / pairs / (groups.h * groups.w), number = item / pairs % (groups.h * groups.w);
  const Phase phase(a, n);
  const KeyGrid keys{plan.keys,
                     phase.grid(),
                     phase.first,
                     phase.down,
                     phase.right,
                     a.k,
                     a.v,
                     a.dk,
                     a.dv,
                     0.0,
                     shown_keys(a, pair / a.kv_heads)};
  const int64_t slot = a.bias.table ? n * (plan.bias.slots / phases(a.window)) + number : -1;
  grad_patches<T>(plan, pair, keys, number, groups, n, n + 1,
                  a.window.raster_causal ? Order::columns_after : Order::none, slot, scratch,
                  [](const Phase& p) { return Axes{p.y, p.x}; });
}

}  // namespace

COGVIEW_KERNEL(local_tiles_bias, LocalTilePlan, fill_bias<T>, kForwardOnTiles<T>)
COGVIEW_KERNEL(local_tiles_fwd, LocalTilePlan, forward<T>, kForwardOnTiles<T>)
COGVIEW_KERNEL(local_tiles_prepare, LocalTilePlan, prepare<T>, kBackwardOnTiles<T>)
COGVIEW_KERNEL(local_tiles_grad_prefix, LocalTilePlan, grad_prefix<T>, kBackwardOnTiles<T>)
COGVIEW_KERNEL(local_tiles_finish_prefix, LocalTilePlan, finish_prefix<T>, kBackwardOnTiles<T>)
COGVIEW_KERNEL(local_tiles_grad_coarse, LocalTilePlan, grad_coarse<T>, kBackwardOnTiles<T>)
COGVIEW_KERNEL(local_tiles_grad_key, LocalTilePlan, grad_key<T>, kBackwardOnTiles<T>)
COGVIEW_KERNEL(local_tiles_finish, LocalTilePlan, finish<T>, kBackwardOnTiles<T>)

}  // namespace COGVIEW_ISA
}  // namespace cogview
