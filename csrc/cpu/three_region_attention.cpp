#include "three_region_attention.h"

#include "tile_engine.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

struct Geometry {
  const ThreeRegionArgs& a;
  int64_t b;

  int64_t window_start(int64_t i) const {
    const int64_t start = (i / a.block_size - a.window_blocks + 1) * a.block_size;
    return start < 0 ? 0 : start;
  }
  // First query that no longer has key j in its window, and so sees it as a pivot.
  int64_t window_end(int64_t j) const { return (j / a.block_size + a.window_blocks) * a.block_size; }

  int64_t pivot(int64_t n) const { return a.pivots[b * a.num_pivots + n]; }
  // Number of pivots before position `end`: they ascend, padding is at the back.
  int64_t pivots_before(int64_t end) const {
    int64_t lo = 0, hi = a.num_pivots;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2, p = pivot(mid);
      if (p >= 0 && p < end)
        lo = mid + 1;
      else
        hi = mid;
    }
    return lo;
  }

  // The pivots [first, first + 64) as columns or rows. Contents are not trusted: what is out of range is row 0, and its
  // bit is missing from the result.
  uint64_t pivot_rows(int64_t first, int64_t* index, int* count) const {
    uint64_t valid = 0;
    *count = int(a.num_pivots - first < kTile ? a.num_pivots - first : kTile);
    for (int c = 0; c < *count; ++c) {
      const int64_t p = pivot(first + c);
      const bool ok = p >= 0 && p < a.seqlen_k;
      index[c] = ok ? p : 0;
      valid |= uint64_t(ok) << c;
    }
    return valid;
  }

  // Tiles of the keys that queries [first, first + n) see.
  template <class Step>
  void visit_keys(int64_t first, int n, Step&& step) const {
    Tile tile;
    const int64_t last = first + n - 1;
    tile.bias = a.pivot_bias;
    const int64_t visible = pivots_before(window_start(last));
    for (int64_t t = 0; t < visible; t += kTile) {
      const uint64_t valid = pivot_rows(t, tile.index, &tile.count);
      if (visible - t < tile.count) tile.count = int(visible - t);  // a cache has not been written at later ones
      int64_t start = -1, before = 0;
      for (int r = 0; r < n; ++r) {
        if (window_start(first + r) != start) start = window_start(first + r), before = pivots_before(start);
        tile.mask[r] = valid & range_bits(0, before - t);
      }
      step(tile);
    }
    tile.bias = 0;
    for (int64_t j = window_start(first); j <= last; j += kTile) {
      tile.count = int(last + 1 - j < kTile ? last + 1 - j : kTile);
      for (int c = 0; c < tile.count; ++c) tile.index[c] = j + c;
      for (int r = 0; r < n; ++r) tile.mask[r] = range_bits(window_start(first + r) - j, first + r + 1 - j);
      step(tile);
    }
  }

  // Tiles of the queries [from, to), where row r of the caller sees columns [lo(r), hi(r)).
  template <class Range, class Step>
  void visit_queries(int64_t from, int64_t to, int rows, double bias, Range&& range, Step&& step) const {
    Tile tile;
    tile.bias = bias;
    for (int64_t i = from; i < to; i += kTile) {
      tile.count = int(to - i < kTile ? to - i : kTile);
      for (int c = 0; c < tile.count; ++c) tile.index[c] = i + c;
      for (int r = 0; r < rows; ++r) {
        int64_t lo, hi;
        range(r, &lo, &hi);
        tile.mask[r] = range_bits(lo - i, (hi < to ? hi : to) - i);
      }
      step(tile);
    }
  }
};

template <class T>
Acc<T>* stat(void* p, const ThreeRegionArgs& a, int64_t b, int64_t h) {
  return p ? static_cast<Acc<T>*>(p) + (b * a.heads + h) * a.seqlen_q : nullptr;
}

// A query tile's place in the work: the last tiles, which have most keys, first.
struct QueryItem {
  int64_t b, h, kv, first, position;
  int n;
  int64_t index[kTile];
  QueryItem(const ThreeRegionArgs& a, int64_t item) {
    const int64_t tiles = a.query_tiles();
    first = (tiles - 1 - item / (a.batch * a.heads)) * kTile;
    b = item % (a.batch * a.heads) / a.heads, h = item % a.heads, kv = h / (a.heads / a.kv_heads);
    n = int(a.seqlen_q - first < kTile ? a.seqlen_q - first : kTile);
    for (int r = 0; r < n; ++r) index[r] = first + r;
    position = first;
    if (a.cache_seqlens.data) {  // clamped: contents are not trusted
      const int64_t length = a.cache_seqlens[b], offset = length - a.seqlen_q, most = a.seqlen_k - a.seqlen_q;
      position += offset < 0 ? 0 : offset > most ? most : offset;
    }
  }
};

template <class T, class Engine>
void forward_tile(const ThreeRegionArgs& a, const QueryItem& it, Engine&& engine) {
  const T *k = a.k.at<T>(it.b, it.kv), *v = a.v.at<T>(it.b, it.kv);
  engine.begin(RowSet<T>{a.q.at<T>(it.b, it.h), a.q.stride[2], it.index, it.n}, a.scale);
  Geometry{a, it.b}.visit_keys(it.position, it.n,
                               [&](const Tile& tile) { engine.step(k, a.k.stride[2], v, a.v.stride[2], tile); });
  Acc<T>* lse = stat<T>(a.lse, a, it.b, it.h);
  for (int r = 0; r < it.n; ++r) {
    const Acc<T> value = engine.finish(r, a.out.at<T>(it.b, it.h) + it.index[r] * a.out.stride[2]);
    if (lse) lse[it.index[r]] = value;
  }
}

template <class T>
void forward(const ThreeRegionArgs& a, int64_t item, char* scratch) {
  const QueryItem it(a, item);
  if (it.n <= kNarrow)
    forward_tile<T>(a, it, Narrow<T>(Arena{scratch}, int(a.head_dim)));
  else
    forward_tile<T>(a, it, Forward<T>(Arena{scratch}, int(a.head_dim)));
}

template <class T>
void grad_query(const ThreeRegionArgs& a, int64_t item, char* scratch) {
  const QueryItem it(a, item);
  GradQuery<T> engine(Arena{scratch}, int(a.head_dim));
  const T *k = a.k.at<T>(it.b, it.kv), *v = a.v.at<T>(it.b, it.kv);
  const T *dout = a.dout.at<T>(it.b, it.h), *out = a.out.at<T>(it.b, it.h);
  engine.begin(RowSet<T>{a.q.at<T>(it.b, it.h), a.q.stride[2], it.index, it.n},
               RowSet<T>{dout, a.dout.stride[2], it.index, it.n}, a.scale);
  const Acc<T>*lse = stat<T>(a.lse, a, it.b, it.h), *dlse = stat<T>(a.dlse, a, it.b, it.h);
  Acc<T>* delta = stat<T>(a.delta, a, it.b, it.h);
  for (int r = 0; r < it.n; ++r) {
    const int64_t i = it.index[r];
    delta[i] = row_delta(dout + i * a.dout.stride[2], out + i * a.out.stride[2], int(a.head_dim), dlse ? dlse[i] : 0);
    engine.set_row(r, lse[i], delta[i]);
  }
  Geometry{a, it.b}.visit_keys(it.position, it.n,
                               [&](const Tile& tile) { engine.step(k, a.k.stride[2], v, a.v.stride[2], tile); });
  for (int r = 0; r < it.n; ++r) engine.finish(r, a.dq.at<T>(it.b, it.h) + it.index[r] * a.dq.stride[2]);
}

// Runs visit(step) once per query head of the group, with `step` bound to that head.
template <class T, class Visit>
void each_head(const ThreeRegionArgs& a, int64_t b, int64_t kv, GradKey<T>& engine, Visit&& visit) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
    visit([&](const Tile& tile) {
      engine.step(a.q.at<T>(b, h), a.q.stride[2], a.dout.at<T>(b, h), a.dout.stride[2], stat<T>(a.lse, a, b, h),
                  stat<T>(a.delta, a, b, h), tile);
    });
}

template <class T>
void grad_pivot(const ThreeRegionArgs& a, int64_t item, char* scratch) {
  const int64_t pairs = a.batch * a.kv_heads, first = item / pairs * kTile;
  const int64_t b = item % pairs / a.kv_heads, kv = item % a.kv_heads, d = a.head_dim;
  const Geometry geometry{a, b};
  GradKey<T> engine(Arena{scratch}, int(d));
  int64_t index[kTile];
  int n;
  const uint64_t valid = geometry.pivot_rows(first, index, &n);
  engine.begin(RowSet<T>{a.k.at<T>(b, kv), a.k.stride[2], index, n},
               RowSet<T>{a.v.at<T>(b, kv), a.v.stride[2], index, n}, a.scale);
  if (valid)
    each_head<T>(a, b, kv, engine, [&](auto&& step) {
      geometry.visit_queries(
          geometry.window_end(index[0]), a.seqlen_q, n, a.pivot_bias,
          [&](int r, int64_t* lo, int64_t* hi) {
            *lo = geometry.window_end(index[r]), *hi = valid >> r & 1 ? a.seqlen_q : 0;
          },
          step);
    });
  for (int r = 0; r < n; ++r) {
    const int64_t at = ((b * a.kv_heads + kv) * a.num_pivots + first + r) * d;
    std::memcpy(static_cast<Acc<T>*>(a.pivot_dk) + at, engine.dk(r), d * sizeof(Acc<T>));
    std::memcpy(static_cast<Acc<T>*>(a.pivot_dv) + at, engine.dv(r), d * sizeof(Acc<T>));
  }
}

template <class T>
void grad_key(const ThreeRegionArgs& a, int64_t item, char* scratch) {
  const int64_t pairs = a.batch * a.kv_heads, first = item / pairs * kTile, d = a.head_dim;
  const int64_t b = item % pairs / a.kv_heads, kv = item % a.kv_heads;
  const Geometry geometry{a, b};
  GradKey<T> engine(Arena{scratch}, int(d));
  int64_t index[kTile];
  const int n = int(a.seqlen_k - first < kTile ? a.seqlen_k - first : kTile);
  for (int r = 0; r < n; ++r) index[r] = first + r;
  engine.begin(RowSet<T>{a.k.at<T>(b, kv), a.k.stride[2], index, n},
               RowSet<T>{a.v.at<T>(b, kv), a.v.stride[2], index, n}, a.scale);
  const int64_t end = geometry.window_end(index[n - 1]);
  each_head<T>(a, b, kv, engine, [&](auto&& step) {
    geometry.visit_queries(
        first, end < a.seqlen_q ? end : a.seqlen_q, n, 0,
        [&](int r, int64_t* lo, int64_t* hi) { *lo = index[r], *hi = geometry.window_end(index[r]); }, step);
  });
  // a key of this tile that is also a pivot of later queries: its other part, summed here and rounded once
  for (int64_t p = geometry.pivots_before(first); p < a.num_pivots; ++p) {
    const int64_t r = geometry.pivot(p) - first;
    if (r < 0 || r >= n) break;
    const int64_t at = ((b * a.kv_heads + kv) * a.num_pivots + p) * d;
    for (int64_t j = 0; j < d; ++j) {
      engine.dk(int(r))[j] += static_cast<const Acc<T>*>(a.pivot_dk)[at + j];
      engine.dv(int(r))[j] += static_cast<const Acc<T>*>(a.pivot_dv)[at + j];
    }
  }
  for (int r = 0; r < n; ++r)
    engine.finish(r, a.dk.at<T>(b, kv) + index[r] * a.dk.stride[2], a.dv.at<T>(b, kv) + index[r] * a.dv.stride[2]);
}

}  // namespace

COGVIEW_TILE_KERNEL(three_region_fwd, ThreeRegionArgs, forward)
COGVIEW_TILE_KERNEL(three_region_grad_query, ThreeRegionArgs, grad_query)
COGVIEW_TILE_KERNEL(three_region_grad_pivot, ThreeRegionArgs, grad_pivot)
COGVIEW_TILE_KERNEL(three_region_grad_key, ThreeRegionArgs, grad_key)

}  // namespace COGVIEW_ISA
}  // namespace cogview
