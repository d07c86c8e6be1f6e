// Three-region block-sparse attention on the tile engine.
//
// Memory. Tensors come with any strides but a last one of 1, and aligned to their elements only; scratch and the sums
// are aligned to 64 bytes. Rows are packed into scratch, once for a group of owners.
//   forward     reads q, k, v, pivots; writes out and lse, each row once.
//   rows        the same for a few queries, of which each key and value is read once, where it lies.
//   prepare     reads dout, out, dlse; writes delta, and zeros to dq_sums.
//   grad_pivot  reads q, dout, lse, delta, the pivots' k and v; adds to dq_sums of its own chunk of queries, writes
//               that chunk's pivot_dk and pivot_dv.
//   grad_key    reads the same of the queries that have its keys in their windows; adds to dq_sums of these, which no
//               other group of the same color does, and pivot_dk and pivot_dv of its keys to their gradients, in the
//               order of the chunks; writes dk and dv, each row once.
//   finish      reads dq_sums; writes dq.
#include "three_region_attention.h"

#include "kernel.h"
#include "narrow.h"
#include "tile_forward.h"
#include "tile_grad_key.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

struct Geometry {
  const ThreeRegionAttention& a;
  int64_t sequence;
  const Sequence& s;

  Geometry(const ThreeRegionPlan& plan, int64_t n) : a(plan.problem), sequence(n), s(plan.sequences[n]) {}

  int64_t window_start(int64_t i) const { return cogview::window_start(a, i); }
  // First query that no longer has key j in its window, and so sees it as a pivot.
  int64_t window_end(int64_t j) const { return (j / a.block_size + a.window_blocks) * a.block_size; }

  int64_t pivot(int64_t n) const { return a.pivots[sequence * a.num_pivots + n]; }
  int64_t pivots_before(int64_t end) const { return cogview::pivots_before(a, sequence, s.pivots, end); }

  // The pivots [first, end) as rows or columns; returns how many. They were checked; that rows exist is seen to again.
  int pivot_rows(int64_t first, int64_t end, int64_t* index) const {
    const int count = int(end - first < kTile ? end - first : kTile);
    for (int c = 0; c < count; ++c) {
      const int64_t p = pivot(first + c);
      index[c] = s.first_key + (p >= 0 && p < s.keys ? p : 0);
    }
    return count;
  }
};

// The queries [first, end) of a sequence, and the tiles of keys they see: pivots first, then windows, cut at multiples
// of 64. Row t stands at position offset + t.
struct Queries {
  const ThreeRegionAttention& a;
  Geometry geometry;
  int64_t end, offset;
  int64_t pivots, window;  // how many pivots the last query sees; first key of the first query's window

  Queries(const ThreeRegionPlan& plan, int64_t n, int64_t first, int64_t end)
      : a(plan.problem), geometry(plan, n), end(end), offset(geometry.s.offset) {
    pivots = geometry.pivots_before(geometry.window_start(offset + end - 1));
    window = geometry.window_start(offset + first) / kTile * kTile;
  }

  int64_t pivot_tiles() const { return ceil_div(pivots, kTile); }
  int64_t key_tiles() const { return pivot_tiles() + ceil_div(offset + end - window, kTile); }

  // Keys of a tile, of which a cache may hold no more; returns how many. Which are packed together does not depend on
  // the queries, nor do results on how those are grouped.
  int keys(int64_t number, int64_t* index) const {
    const Sequence& s = geometry.s;
    if (number < pivot_tiles()) return geometry.pivot_rows(number * kTile, s.pivots, index);
    const int64_t first = s.first_key + window + (number - pivot_tiles()) * kTile;
    return rows_from(first, s.first_key + offset + s.queries, index);
  }

  // Calls step(mask, bias) if the queries [from, from + n) see any of a tile's keys.
  template <class Step>
  void see(int64_t from, int n, int64_t number, Step&& step) const {
    const int64_t top = offset + from, last = top + n - 1;
    uint64_t mask[kTile];
    if (number < pivot_tiles()) {
      const int64_t t = number * kTile;
      if (geometry.pivots_before(geometry.window_start(last)) <= t) return;
      if (geometry.pivots_before(geometry.window_start(top)) >= t + kTile) return step(nullptr, a.pivot_bias);
      each_row(
          top, n, [&](int64_t start) { return geometry.pivots_before(start) - t; },
          [&](int r, int64_t before) { mask[r] = range_bits(0, before); });
      return step(mask, a.pivot_bias);
    }
    const int64_t j = window + (number - pivot_tiles()) * kTile;
    if (j > last || j + kTile <= geometry.window_start(top)) return;
    if (j + kTile - 1 <= top && geometry.window_start(last) <= j) return step(nullptr, 0.0);
    each_row(
        top, n, [&](int64_t start) { return start - j; },
        [&](int r, int64_t start) { mask[r] = range_bits(start, top + r + 1 - j); });
    step(mask, 0.0);
  }

  // f(row, of(first key of its window)) for n queries from position top; `of` once for each block of them.
  template <class Of, class F>
  void each_row(int64_t top, int n, Of&& of, F&& f) const {
    int64_t block_end = top, value = 0;
    for (int r = 0; r < n; ++r) {
      if (top + r == block_end) {
        value = of(geometry.window_start(top + r));
        block_end = ((top + r) / a.block_size + 1) * a.block_size;
      }
      f(r, value);
    }
  }
};

// A piece of queries of one head.
struct QueryGroup {
  const ThreeRegionAttention& a;
  const Piece& piece;
  const Sequence& s;
  int64_t h, kv;
  Queries queries;

  QueryGroup(const ThreeRegionPlan& plan, int64_t item)
      : a(plan.problem),
        piece(plan.pieces[item / a.heads]),
        s(plan.sequences[piece.sequence]),
        h(item % a.heads),
        kv(h / (a.heads / a.kv_heads)),
        queries(plan, piece.sequence, piece.begin, piece.end) {}

  int tiles() const { return int(ceil_div(piece.end - piece.begin, kTile)); }
  // Rows of tile o of the group in the tensors; returns how many.
  int rows(int o, int64_t* index) const {
    return rows_from(s.first_query + piece.begin + o * kTile, s.first_query + piece.end, index);
  }

  // Shows every tile of keys to every owner that sees it.
  template <class T, template <class> class Engine>
  void meet(Group<T, Engine>& group) const {
    group.meet(
        tiles(), queries.key_tiles(),
        [&](int64_t number, auto& tile) {
          int64_t index[kTile];
          const int n = queries.keys(number, index);
          tile.pack(rows_of<T>(a.k, s.b, kv, index, n), rows_of<T>(a.v, s.b, kv, index, n), int(a.head_dim));
        },
        [&](Engine<T>& owner, int o, int64_t number, const auto& tile) {
          queries.see(piece.begin + o * kTile, owner.rows, number,
                      [&](Mask mask, double bias) { owner.step(group.work, tile, mask, bias); });
        });
  }
};

// Some heads that share a key head and queries of each, from the first on: at most 64 rows, head after head.
struct FewRows {
  int64_t sequence, h, kv, first;
  int heads, queries;
  int rows() const { return heads * queries; }
  FewRows row(int r) const { return {sequence, h + r / queries, kv, first + r % queries, 1, 1}; }
};

// Against tiles of keys one after another: show(tile, mask, bias, next tile). Returns what finish_rows does.
template <class T, class Engine, class Show>
uint64_t few_rows(const ThreeRegionPlan& plan, const FewRows& it, Engine& engine, Show&& show) {
  const ThreeRegionAttention& a = plan.problem;
  const Queries queries(plan, it.sequence, it.first, it.first + it.queries);
  const int n = it.queries, rows = it.rows();
  const int64_t b = queries.geometry.s.b, first = queries.geometry.s.first_query + it.first;
  int64_t offset[kTile];
  for (int r = 0; r < rows; ++r) offset[r] = r / n * a.q.stride[1] + (first + r % n) * a.q.stride[2];
  engine.begin(RowSet<T>{a.q.at<T>(b, it.h), 1, offset, rows}, a.scale);
  each_tile<T>(
      queries.key_tiles(),
      [&](int64_t number, int64_t* index) {
        const int count = queries.keys(number, index);
        return Columns<T>{rows_of<T>(a.k, b, it.kv, index, count), rows_of<T>(a.v, b, it.kv, index, count)};
      },
      [&](int64_t number, const Columns<T>& tile, const Columns<T>& next) {
        queries.see(it.first, n, number, [&](Mask mask, double bias) {
          uint64_t masks[kTile];
          for (int r = 0; mask && r < rows; ++r) masks[r] = mask[r % n];
          show(tile, mask ? masks : nullptr, bias, next);
        });
      });
  return engine.finish([&](int r) { return a.out.at<T>(b, it.h + r / n) + (first + r % n) * a.out.stride[2]; },
                       [&](int r, Acc<T> value) { stat<T>(a.lse, a, b, it.h + r / n)[first + r % n] = value; });
}

// At most 8 rows.
template <class T>
uint64_t narrow_rows(const ThreeRegionPlan& plan, const FewRows& it, char* scratch) {
  Narrow<T> engine;
  Arena arena{scratch};
  engine.take(arena, int(plan.problem.head_dim));
  return few_rows<T>(plan, it, engine, [&](const Columns<T>& tile, Mask mask, double bias, const Columns<T>& next) {
    engine.step(tile, mask, bias, next);
  });
}

template <class T>
void forward(const ThreeRegionPlan& plan, int64_t item, char* scratch) {
  const ThreeRegionAttention& a = plan.problem;
  const QueryGroup it(plan, item);
  Group<T, Forward> group(Arena{scratch}, int(a.head_dim), it.tiles());
  int64_t index[kTile];
  for (int o = 0; o < it.tiles(); ++o) {
    const int n = it.rows(o, index);
    group.owners[o].begin(rows_of<T>(a.q, it.s.b, it.h, index, n), a.scale);
  }
  it.meet(group);
  Acc<T>* lse = stat<T>(a.lse, a, it.s.b, it.h);
  uint64_t spoilt[kGroup];
  for (int o = 0; o < it.tiles(); ++o) {
    const int64_t top = it.s.first_query + it.piece.begin + o * kTile;
    spoilt[o] = group.owners[o].finish([&](int r) { return a.out.at<T>(it.s.b, it.h) + (top + r) * a.out.stride[2]; },
                                       [&](int r, Acc<T> value) { lse[top + r] = value; });
  }
  for (int o = 0; o < it.tiles(); ++o) {
    const FewRows rows{it.piece.sequence, it.h, it.kv, it.piece.begin + o * kTile, 1, kTile};
    each_bit(spoilt[o], [&](int r) { narrow_rows<T>(plan, rows.row(r), scratch); });
  }
}

template <class T>
void decode(const ThreeRegionPlan& plan, int64_t item, char* scratch) {
  const ThreeRegionAttention& a = plan.problem;
  const int64_t group = a.heads / a.kv_heads, parts = ceil_div(group, plan.decode_heads);
  const int64_t b = item / (a.kv_heads * parts), kv = item / parts % a.kv_heads;
  const int64_t first = item % parts * plan.decode_heads, h = kv * group + first;
  const int d = int(a.head_dim), heads = int(group - first < plan.decode_heads ? group - first : plan.decode_heads);
  const FewRows it{b, h, kv, 0, heads, int(a.seqlen_q)};
  uint64_t spoilt;
  if (it.rows() <= kNarrow) {
    spoilt = narrow_rows<T>(plan, it, scratch);
  } else {
    Group<T, Forward> one(Arena{scratch}, d, 1);
    spoilt =
        few_rows<T>(plan, it, one.owners[0], [&](const Columns<T>& tile, Mask mask, double bias, const Columns<T>&) {
          one.tiles[0].pack(tile.keys, tile.values, d);
          one.owners[0].step(one.work, one.tiles[0], mask, bias);
        });
  }
  if (it.queries > 1) each_bit(spoilt, [&](int r) { narrow_rows<T>(plan, it.row(r), scratch); });
}

// Where the gradient of 64 queries is summed up, transposed.
template <class T>
Acc<T>* dq_tile(const ThreeRegionPlan& plan, const Sequence& s, int64_t h, int64_t number) {
  const ThreeRegionAttention& a = plan.problem;
  return static_cast<Acc<T>*>(plan.dq_sums) + (s.tiles_before * a.heads + h * s.tiles() + number) * dq_tile_size(a);
}
// Where the gradients of the pivots are summed up, by chunk of queries.
template <class T>
Acc<T>* pivot_part(void* parts, const ThreeRegionPlan& plan, const Sequence& s, int64_t kv, int64_t chunk, int64_t p) {
  return static_cast<Acc<T>*>(parts) + (s.sums_before + (kv * s.chunks + chunk) * s.pivots + p) * plan.problem.head_dim;
}

template <class T>
void prepare(const ThreeRegionPlan& plan, int64_t item, char*) {
  const ThreeRegionAttention& a = plan.problem;
  const QueryGroup it(plan, item);
  for (int o = 0; o < it.tiles(); ++o) {
    Acc<T>* dq = dq_tile<T>(plan, it.s, it.h, it.piece.begin / kTile + o);
    std::memset(static_cast<void*>(dq), 0, sizeof(Acc<T>) * dq_tile_size(a));
    int64_t index[kTile];
    set_delta<T>(a, plan.delta, it.s.b, it.h, index, it.rows(o, index));
  }
}

template <class T>
void finish_query(const ThreeRegionPlan& plan, int64_t item, char*) {
  const ThreeRegionAttention& a = plan.problem;
  const QueryGroup it(plan, item);
  for (int o = 0; o < it.tiles(); ++o) {
    int64_t index[kTile];
    const int rows = it.rows(o, index);
    write_transposed<T>(dq_tile<T>(plan, it.s, it.h, it.piece.begin / kTile + o), Acc<T>(a.scale), index, rows,
                        int(a.head_dim), a.dq.at<T>(it.s.b, it.h), a.dq.stride[2]);
  }
}

// The queries [lo, hi) that see each row of an owner; rows that nobody sees have none.
struct Seen {
  int64_t lo[kTile], hi[kTile], first, last, all_from, all_to;  // some row is seen in [first, last), all in the others
  void close(int rows) {
    first = all_to = INT64_MAX, last = all_from = 0;
    for (int r = 0; r < rows; ++r) {
      if (lo[r] < first) first = lo[r];
      if (lo[r] > all_from) all_from = lo[r];
      if (hi[r] > last) last = hi[r];
      if (hi[r] < all_to) all_to = hi[r];
    }
  }
};

// Shows the queries [from, to) of every head of key head kv to owners of key rows, in tiles cut at multiples of 64.
template <class T>
void meet_queries(const ThreeRegionPlan& plan, const Sequence& s, int64_t kv, int64_t from, int64_t to, double bias,
                  Group<T, GradKey>& group, int owners, const Seen* seen) {
  const ThreeRegionAttention& a = plan.problem;
  const int64_t heads = a.heads / a.kv_heads, first = from / kTile;
  for (int64_t h = kv * heads; h < (kv + 1) * heads && from < to; ++h)
    group.meet(
        owners, ceil_div(to - first * kTile, kTile),
        [&](int64_t number, auto& tile) {
          int64_t index[kTile];
          const int n = rows_from(s.first_query + (first + number) * kTile, s.first_query + to, index);
          tile.pack(rows_of<T>(a.q, s.b, h, index, n), rows_of<T>(a.dout, s.b, h, index, n), stat<T>(a.lse, a, s.b, h),
                    stat<T>(plan.delta, a, s.b, h), int(a.head_dim));
          tile.dq = dq_tile<T>(plan, s, h, first + number);
        },
        [&](GradKey<T>& owner, int o, int64_t number, const auto& tile) {
          const int64_t i = (first + number) * kTile, end = i + kTile < to ? i + kTile : to;
          const Seen& x = seen[o];
          if (end <= x.first || i >= x.last) return;
          // queries beyond the last one are zero and change nothing
          if (i >= x.all_from && end <= x.all_to) return owner.step(group.work, tile, nullptr, bias);
          uint64_t mask[kTile];
          for (int r = 0; r < owner.rows; ++r) mask[r] = range_bits(x.lo[r] - i, x.hi[r] - i);
          owner.step(group.work, tile, mask, bias);
        });
}

// A chunk of queries and all pivots: the chunk's dq, and the chunk's part of the pivots' dk and dv.
template <class T>
void grad_pivot(const ThreeRegionPlan& plan, int64_t item, char* scratch) {
  const ThreeRegionAttention& a = plan.problem;
  const Piece& chunk = plan.pieces[item / a.kv_heads];
  const Geometry geometry(plan, chunk.sequence);
  const Sequence& s = geometry.s;
  const int64_t kv = item % a.kv_heads, d = a.head_dim;
  for (int64_t first = 0; first < s.pivots; first += plan.key_group * kTile) {
    const int64_t end = first + plan.key_group * kTile < s.pivots ? first + plan.key_group * kTile : s.pivots;
    const int owners = int(ceil_div(end - first, kTile));
    Group<T, GradKey> group(Arena{scratch}, int(d), owners);
    Seen seen[kGroup];
    int64_t from = chunk.end;
    for (int o = 0; o < owners; ++o) {
      int64_t index[kTile];
      const int n = geometry.pivot_rows(first + o * kTile, end, index);
      group.owners[o].begin(rows_of<T>(a.k, s.b, kv, index, n), rows_of<T>(a.v, s.b, kv, index, n), a.scale);
      for (int r = 0; r < n; ++r) {
        seen[o].lo[r] = geometry.window_end(index[r] - s.first_key);
        seen[o].hi[r] = s.queries;
      }
      seen[o].close(n);
      if (seen[o].first < from) from = seen[o].first;
    }
    if (from < chunk.begin) from = chunk.begin;
    meet_queries<T>(plan, s, kv, from, chunk.end, a.pivot_bias, group, owners, seen);
    for (int64_t p = first; p < end; ++p) {
      GradKey<T>& owner = group.owners[(p - first) / kTile];
      const int r = int((p - first) % kTile);
      std::memcpy(pivot_part<T>(plan.pivot_dk, plan, s, kv, chunk.number, p), owner.dk(r), d * sizeof(Acc<T>));
      std::memcpy(pivot_part<T>(plan.pivot_dv, plan, s, kv, chunk.number, p), owner.dv(r), d * sizeof(Acc<T>));
    }
  }
}

// A group of key tiles and the queries that have them in their windows.
template <class T>
void grad_key(const ThreeRegionPlan& plan, int64_t item, char* scratch) {
  const ThreeRegionAttention& a = plan.problem;
  const Piece& keys = plan.pieces[item / a.kv_heads];
  const Geometry geometry(plan, keys.sequence);
  const Sequence& s = geometry.s;
  const int64_t kv = item % a.kv_heads, d = a.head_dim;
  const int owners = int(ceil_div(keys.end - keys.begin, kTile));
  Group<T, GradKey> group(Arena{scratch}, int(d), owners);
  Seen seen[kGroup];
  for (int o = 0; o < owners; ++o) {
    int64_t index[kTile];
    const int n = rows_from(s.first_key + keys.begin + o * kTile, s.first_key + keys.end, index);
    group.owners[o].begin(rows_of<T>(a.k, s.b, kv, index, n), rows_of<T>(a.v, s.b, kv, index, n), a.scale);
    for (int r = 0; r < n; ++r) {
      seen[o].lo[r] = index[r] - s.first_key;
      seen[o].hi[r] = geometry.window_end(seen[o].lo[r]);
    }
    seen[o].close(n);
  }
  const int64_t last = geometry.window_end(keys.end - 1), to = last < s.queries ? last : s.queries;
  meet_queries<T>(plan, s, kv, keys.begin, to, 0, group, owners, seen);
  // a key of this group that is also a pivot of later queries: its other parts, summed here and rounded once
  for (int64_t p = geometry.pivots_before(keys.begin); p < s.pivots; ++p) {
    const int64_t j = geometry.pivot(p);
    if (j < keys.begin || j >= keys.end) break;
    GradKey<T>& owner = group.owners[(j - keys.begin) / kTile];
    const int r = int((j - keys.begin) % kTile);
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk)
      for (int64_t c = 0; c < d; ++c) {
        owner.dk(r)[c] += pivot_part<T>(plan.pivot_dk, plan, s, kv, chunk, p)[c];
        owner.dv(r)[c] += pivot_part<T>(plan.pivot_dv, plan, s, kv, chunk, p)[c];
      }
  }
  for (int64_t j = keys.begin; j < keys.end; ++j)
    group.owners[(j - keys.begin) / kTile].finish(int((j - keys.begin) % kTile),
                                                  a.dk.at<T>(s.b, kv) + (s.first_key + j) * a.dk.stride[2],
                                                  a.dv.at<T>(s.b, kv) + (s.first_key + j) * a.dv.stride[2]);
}

}  // namespace

COGVIEW_KERNEL(three_region_tiles_fwd, ThreeRegionPlan, forward<T>, true)
COGVIEW_KERNEL(three_region_rows, ThreeRegionPlan, decode<T>, true)
COGVIEW_KERNEL(three_region_prepare, ThreeRegionPlan, prepare<T>, true)
COGVIEW_KERNEL(three_region_grad_pivot, ThreeRegionPlan, grad_pivot<T>, true)
COGVIEW_KERNEL(three_region_grad_key, ThreeRegionPlan, grad_key<T>, true)
COGVIEW_KERNEL(three_region_finish, ThreeRegionPlan, finish_query<T>, true)

}  // namespace COGVIEW_ISA
}  // namespace cogview
