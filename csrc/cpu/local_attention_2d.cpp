#include "local_attention_2d.h"

#include "tile_narrow.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Columns of a tile by index, and which of them each row sees.
struct Cells {
  int64_t index[kTile];
  int count;
  uint64_t mask[kTile];
  double bias;
};

// Cells [y0, y1) x [x0, x1).
struct Box {
  int64_t y0, y1, x0, x1;
  Box within(Grid g) const { return {y0 < 0 ? 0 : y0, y1 > g.h ? g.h : y1, x0 < 0 ? 0 : x0, x1 > g.w ? g.w : x1}; }
  bool empty() const { return y0 >= y1 || x0 >= x1; }
};

// A rectangle of at most 64 cells in raster order, as the columns of a tile.
struct Chunk {
  Box box;
  int64_t width;
  uint64_t first_column;  // bit of the first cell of each row
  explicit Chunk(Box b) : box(b), width(b.x1 - b.x0), first_column(0) {
    for (int64_t i = 0; i < 64; i += width) first_column |= uint64_t(1) << i;
  }
  int count() const { return int((box.y1 - box.y0) * width); }
  void fill(int64_t grid_width, Cells& tile) const {
    tile.count = 0;
    for (int64_t y = box.y0; y < box.y1; ++y)
      for (int64_t x = box.x0; x < box.x1; ++x) tile.index[tile.count++] = y * grid_width + x;
  }
  // The chunk's cells inside a box.
  uint64_t bits(const Box& b) const {
    int64_t x0 = b.x0 - box.x0, x1 = b.x1 - box.x0;
    x0 = x0 < 0 ? 0 : x0, x1 = x1 > width ? width : x1;
    if (x0 >= x1) return 0;
    // the same columns of every row: one row's bits times the first column's (rows do not overlap)
    return range_bits(0, count()) & range_bits((b.y0 - box.y0) * width, (b.y1 - box.y0) * width) &
           (range_bits(x0, x1) * first_column);
  }
  // Number of the chunk's cells before (y, x) in raster order; may be below 0 or beyond the count.
  int64_t before(int64_t y, int64_t x) const {
    const int64_t column = x - box.x0;
    return (y - box.y0) * width + (column < 0 ? 0 : column > width ? width : column);
  }
};

// Cuts a box into as few chunks as strips of equal width give.
template <class F>
void each_chunk(const Box& b, F&& f) {
  if (b.empty()) return;
  const int64_t h = b.y1 - b.y0, w = b.x1 - b.x0;
  int64_t best_strips = 0, best = 0;
  for (int64_t strips = (w + 63) / 64; strips <= w && strips < (w + 63) / 64 + 4; ++strips) {
    const int64_t width = (w + strips - 1) / strips, rows = 64 / width, chunks = strips * ((h + rows - 1) / rows);
    if (!best || chunks < best) best = chunks, best_strips = strips;
  }
  const int64_t width = (w + best_strips - 1) / best_strips, rows = 64 / width;
  for (int64_t y = b.y0; y < b.y1; y += rows)
    for (int64_t x = b.x0; x < b.x1; x += width)
      f(Chunk(Box{y, y + rows < b.y1 ? y + rows : b.y1, x, x + width < b.x1 ? x + width : b.x1}));
}

// Which keys a cell sees, and which queries see a cell.
struct Geometry {
  const LocalArgs& a;

  Box around(int64_t y, int64_t x, Grid kernel) const {
    return {y - kernel.h / 2, y + kernel.h / 2 + 1, x - kernel.w / 2, x + kernel.w / 2 + 1};
  }
  Box coarse_around(int64_t y, int64_t x) const { return around(y / a.ratio.h, x / a.ratio.w, a.coarse_kernel); }
  // Fine cells whose coarse window holds the coarse cell (y, x).
  Box seen_from(int64_t y, int64_t x) const {
    const Box c = around(y, x, a.coarse_kernel);
    return {c.y0 * a.ratio.h, c.y1 * a.ratio.h, c.x0 * a.ratio.w, c.x1 * a.ratio.w};
  }

  uint64_t prefix_bits(int64_t b, int64_t first) const {
    const int64_t n = a.prefix_len - first < 64 ? a.prefix_len - first : 64;
    if (!a.prefix_mask) return range_bits(0, n);
    uint64_t bits = 0;
    for (int64_t c = 0; c < n; ++c) bits |= uint64_t(a.prefix_mask[b * a.prefix_len + first + c]) << c;
    return bits;
  }
};

struct Keys {
  const Tensor4 &k, &v;
};

// Tiles of the keys that n queries at raster indices cells[] see; their bounding box is `box`.
template <class Step>
void visit_keys(const LocalArgs& a, int64_t b, const int64_t* cells, int n, const Box& box, Step&& step) {
  const Geometry g{a};
  const int64_t width = a.grid.w;
  Cells tile;
  tile.bias = a.prefix_bias;
  for (int64_t p = 0; p < a.prefix_len; p += kTile) {
    tile.count = int(a.prefix_len - p < kTile ? a.prefix_len - p : kTile);
    for (int c = 0; c < tile.count; ++c) tile.index[c] = p + c;
    const uint64_t bits = g.prefix_bits(b, p);
    for (int r = 0; r < n; ++r) tile.mask[r] = bits;
    if (bits) step(Keys{a.prefix_k, a.prefix_v}, tile);
  }
  if (a.coarse_grid.h) {
    const Box first = g.coarse_around(box.y0, box.x0), last = g.coarse_around(box.y1 - 1, box.x1 - 1);
    tile.bias = a.coarse_bias;
    each_chunk(Box{first.y0, last.y1, first.x0, last.x1}.within(a.coarse_grid), [&](const Chunk& chunk) {
      chunk.fill(a.coarse_grid.w, tile);
      for (int r = 0; r < n; ++r) tile.mask[r] = chunk.bits(g.coarse_around(cells[r] / width, cells[r] % width));
      step(Keys{a.coarse_k, a.coarse_v}, tile);
    });
  }
  const Box first = g.around(box.y0, box.x0, a.kernel), last = g.around(box.y1 - 1, box.x1 - 1, a.kernel);
  tile.bias = 0;
  each_chunk(Box{first.y0, a.raster_causal ? box.y1 : last.y1, first.x0, last.x1}.within(a.grid),
             [&](const Chunk& chunk) {
               chunk.fill(width, tile);
               if (a.raster_causal) {  // cells after the last query: a cache may not have been written there
                 const int64_t seen = chunk.before(cells[n - 1] / width, cells[n - 1] % width + 1);
                 if (seen <= 0) return;
                 if (seen < tile.count) tile.count = int(seen);
               }
               for (int r = 0; r < n; ++r) {
                 const int64_t y = cells[r] / width, x = cells[r] % width;
                 tile.mask[r] = chunk.bits(g.around(y, x, a.kernel));
                 if (a.raster_causal) tile.mask[r] &= range_bits(0, chunk.before(y, x + 1));
               }
               step(Keys{a.k, a.v}, tile);
             });
}

template <class T>
Acc<T>* stat(void* p, const LocalArgs& a, int64_t b, int64_t h) {
  return p ? static_cast<Acc<T>*>(p) + (b * a.heads + h) * a.seqlen_q : nullptr;
}

// Cell `tile` of a grid cut into tiles.
Box tile_box(Grid grid, Grid tile, int64_t number) {
  const int64_t across = (grid.w + tile.w - 1) / tile.w, y = number / across * tile.h, x = number % across * tile.w;
  return Box{y, y + tile.h, x, x + tile.w}.within(grid);
}

int list_cells(const Box& box, int64_t width, int64_t* cells) {
  int n = 0;
  for (int64_t y = box.y0; y < box.y1; ++y)
    for (int64_t x = box.x0; x < box.x1; ++x) cells[n++] = y * width + x;
  return n;
}

// The queries of one work item: their rows in the tensor, their raster indices and the box around them.
struct QueryItem {
  int64_t b, h, kv, row[kTile], cell[kTile];
  int n;
  Box box;
  QueryItem(const LocalArgs& a, int64_t item, bool decode) {
    b = item % (a.batch * a.heads) / a.heads, h = item % a.heads, kv = h / (a.heads / a.kv_heads);
    const int64_t number = item / (a.batch * a.heads);
    if (decode) {
      n = int(a.seqlen_q - number * kTile < kTile ? a.seqlen_q - number * kTile : kTile);
      const int64_t most = a.grid.h * a.grid.w - a.seqlen_q, length = a.cache_seqlens[b] - a.seqlen_q;
      const int64_t offset = length < 0 ? 0 : length > most ? most : length;  // contents are not trusted
      for (int r = 0; r < n; ++r) row[r] = number * kTile + r, cell[r] = offset + row[r];
      const int64_t w = a.grid.w, y0 = cell[0] / w, y1 = cell[n - 1] / w;
      box = y0 == y1 ? Box{y0, y1 + 1, cell[0] % w, cell[n - 1] % w + 1} : Box{y0, y1 + 1, 0, w};
    } else {
      box = tile_box(a.grid, a.query_tile, number);
      n = list_cells(box, a.grid.w, cell);
      for (int r = 0; r < n; ++r) row[r] = cell[r];
    }
  }
};

template <class T, class Engine, class Show>
void forward_tile(const LocalArgs& a, const QueryItem& it, Engine& engine, Show&& show) {
  engine.begin(RowSet<T>{a.q.at<T>(it.b, it.h), a.q.stride[2], it.row, it.n}, a.scale);
  visit_keys(a, it.b, it.cell, it.n, it.box, [&](const Keys& x, const Cells& tile) {
    show(RowSet<T>{x.k.template at<T>(it.b, it.kv), x.k.stride[2], tile.index, tile.count},
         RowSet<T>{x.v.template at<T>(it.b, it.kv), x.v.stride[2], tile.index, tile.count}, tile.mask, tile.bias);
  });
  Acc<T>* lse = stat<T>(a.lse, a, it.b, it.h);
  for (int r = 0; r < it.n; ++r) {
    const Acc<T> value = engine.finish(r, a.out.at<T>(it.b, it.h) + it.row[r] * a.out.stride[2]);
    if (lse) lse[it.row[r]] = value;
  }
}

template <class T>
void run_forward(const LocalArgs& a, const QueryItem& it, char* scratch) {
  const int d = int(a.head_dim);
  if (it.n <= kNarrow) {
    Narrow<T> engine;
    Arena arena{scratch};
    engine.take(arena, d);
    forward_tile<T>(a, it, engine, [&](const RowSet<T>& keys, const RowSet<T>& values, Mask mask, double bias) {
      engine.step({keys, values}, mask, bias, {});
    });
  } else {
    Group<T, Forward> one(Arena{scratch}, d, 1);
    forward_tile<T>(a, it, one.owners[0], [&](const RowSet<T>& keys, const RowSet<T>& values, Mask mask, double bias) {
      one.tiles[0].pack(keys, values, d);
      one.owners[0].step(one.work, one.tiles[0], mask, bias);
    });
  }
}
template <class T>
void forward(const LocalArgs& a, int64_t item, char* scratch) {
  run_forward<T>(a, QueryItem(a, item, false), scratch);
}
template <class T>
void decode(const LocalArgs& a, int64_t item, char* scratch) {
  run_forward<T>(a, QueryItem(a, item, true), scratch);
}

template <class T>
void grad_query(const LocalArgs& a, int64_t item, char* scratch) {
  const QueryItem it(a, item, false);
  Group<T, GradQuery> one(Arena{scratch}, int(a.head_dim), 1);
  GradQuery<T>& engine = one.owners[0];
  const T *dout = a.dout.at<T>(it.b, it.h), *out = a.out.at<T>(it.b, it.h);
  engine.begin(RowSet<T>{a.q.at<T>(it.b, it.h), a.q.stride[2], it.row, it.n},
               RowSet<T>{dout, a.dout.stride[2], it.row, it.n}, a.scale);
  const Acc<T>*lse = stat<T>(a.lse, a, it.b, it.h), *dlse = stat<T>(a.dlse, a, it.b, it.h);
  Acc<T>* delta = stat<T>(a.delta, a, it.b, it.h);
  for (int r = 0; r < it.n; ++r) {
    const int64_t i = it.row[r];
    delta[i] = row_dot(dout + i * a.dout.stride[2], out + i * a.out.stride[2], int(a.head_dim)) - (dlse ? dlse[i] : 0);
    engine.set_row(r, lse[i], delta[i]);
  }
  visit_keys(a, it.b, it.cell, it.n, it.box, [&](const Keys& x, const Cells& tile) {
    one.tiles[0].pack(RowSet<T>{x.k.template at<T>(it.b, it.kv), x.k.stride[2], tile.index, tile.count},
                      RowSet<T>{x.v.template at<T>(it.b, it.kv), x.v.stride[2], tile.index, tile.count},
                      int(a.head_dim));
    engine.step(one.work, one.tiles[0], tile.mask, tile.bias);
  });
  for (int r = 0; r < it.n; ++r) engine.finish(r, a.dq.at<T>(it.b, it.h) + it.row[r] * a.dq.stride[2]);
}

// A tile of keys of one kind: their rows, and `visit(step)`, which walks the queries that see them.
template <class T, class Visit>
void grad_key_tile(const LocalArgs& a, int64_t b, int64_t kv, const Tensor4& k, const Tensor4& v, const Tensor4& dk,
                   const Tensor4& dv, const int64_t* index, int n, char* scratch, Visit&& visit) {
  Group<T, GradKey> one(Arena{scratch}, int(a.head_dim), 1);
  GradKey<T>& engine = one.owners[0];
  engine.begin(RowSet<T>{k.at<T>(b, kv), k.stride[2], index, n}, RowSet<T>{v.at<T>(b, kv), v.stride[2], index, n},
               a.scale);
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
    visit([&](const Cells& tile) {
      one.tiles[0].pack(RowSet<T>{a.q.at<T>(b, h), a.q.stride[2], tile.index, tile.count},
                        RowSet<T>{a.dout.at<T>(b, h), a.dout.stride[2], tile.index, tile.count},
                        stat<T>(a.lse, a, b, h), stat<T>(a.delta, a, b, h), int(a.head_dim));
      engine.step(one.work, one.tiles[0], tile.mask, tile.bias);
    });
  for (int r = 0; r < n; ++r)
    engine.finish(r, dk.at<T>(b, kv) + index[r] * dk.stride[2], dv.at<T>(b, kv) + index[r] * dv.stride[2]);
}

// Tiles of queries in a box of the image; mask_of(chunk, row) gives a row's bits.
template <class Mask, class Step>
void visit_queries(const LocalArgs& a, const Box& box, int rows, double bias, Mask&& mask_of, Step&& step) {
  Cells tile;
  tile.bias = bias;
  each_chunk(box.within(a.grid), [&](const Chunk& chunk) {
    chunk.fill(a.grid.w, tile);
    for (int r = 0; r < rows; ++r) tile.mask[r] = mask_of(chunk, r);
    step(tile);
  });
}

template <class T>
void grad_key(const LocalArgs& a, int64_t item, char* scratch) {
  const Geometry g{a};
  const int64_t pairs = a.batch * a.kv_heads, b = item % pairs / a.kv_heads, kv = item % a.kv_heads;
  int64_t number = item / pairs, cells[kTile];
  const Box image{0, a.grid.h, 0, a.grid.w};
  // prefix tiles first: every query sees them, so they take longest
  if (number < a.prefix_tiles()) {
    const int64_t first = number * kTile;
    const int n = int(a.prefix_len - first < kTile ? a.prefix_len - first : kTile);
    for (int r = 0; r < n; ++r) cells[r] = first + r;
    const uint64_t seen = g.prefix_bits(b, first);
    grad_key_tile<T>(a, b, kv, a.prefix_k, a.prefix_v, a.prefix_dk, a.prefix_dv, cells, n, scratch, [&](auto&& step) {
      visit_queries(
          a, image, n, a.prefix_bias,
          [&](const Chunk& c, int r) { return seen >> r & 1 ? range_bits(0, c.count()) : 0; }, step);
    });
    return;
  }
  number -= a.prefix_tiles();
  if (number < a.tiles(a.coarse_grid, a.coarse_tile)) {
    const Box box = tile_box(a.coarse_grid, a.coarse_tile, number);
    const int64_t width = a.coarse_grid.w;
    const int n = list_cells(box, width, cells);
    const Box first = g.seen_from(box.y0, box.x0), last = g.seen_from(box.y1 - 1, box.x1 - 1);
    grad_key_tile<T>(a, b, kv, a.coarse_k, a.coarse_v, a.coarse_dk, a.coarse_dv, cells, n, scratch, [&](auto&& step) {
      visit_queries(
          a, Box{first.y0, last.y1, first.x0, last.x1}, n, a.coarse_bias,
          [&](const Chunk& c, int r) { return c.bits(g.seen_from(cells[r] / width, cells[r] % width)); }, step);
    });
    return;
  }
  number -= a.tiles(a.coarse_grid, a.coarse_tile);
  const Box box = tile_box(a.grid, a.query_tile, number);
  const int64_t width = a.grid.w;
  const int n = list_cells(box, width, cells);
  const Box first = g.around(box.y0, box.x0, a.kernel), last = g.around(box.y1 - 1, box.x1 - 1, a.kernel);
  grad_key_tile<T>(a, b, kv, a.k, a.v, a.dk, a.dv, cells, n, scratch, [&](auto&& step) {
    visit_queries(
        a, Box{a.raster_causal ? box.y0 : first.y0, last.y1, first.x0, last.x1}, n, 0,
        [&](const Chunk& c, int r) {
          const int64_t y = cells[r] / width, x = cells[r] % width;
          const uint64_t bits = c.bits(g.around(y, x, a.kernel));
          return a.raster_causal ? bits & range_bits(c.before(y, x), 64) : bits;
        },
        step);
  });
}

}  // namespace

COGVIEW_TILE_KERNEL(local_2d_fwd, LocalArgs, forward)
COGVIEW_TILE_KERNEL(local_2d_decode, LocalArgs, decode)
COGVIEW_TILE_KERNEL(local_2d_grad_query, LocalArgs, grad_query)
COGVIEW_TILE_KERNEL(local_2d_grad_key, LocalArgs, grad_key)

}  // namespace COGVIEW_ISA
}  // namespace cogview
