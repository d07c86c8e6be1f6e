// 2D local attention on vectors: strips of 16 queries, in raster order, over the keys that they see. Where the tile
// unit multiplies a dtype, local_tiles.cpp takes its place.
//
// Memory. Tensors come with any strides but a last one of 1, and aligned to their elements only; scratch is aligned to
// 64 bytes. Keys and values are read where they lie, once a strip and head, if their dtype is what is multiplied and a
// row fills vectors; else rows are converted once a band, into a ring of the rows that one line of strips sees.
//   forward   reads q, k, v, prefix, coarse; writes out and lse, each row once.
//   backward  reads these, out, dout, lse, dlse; an item writes dq of its own queries and dk, dv of its own local keys,
//             summed in a ring in scratch and rounded once; it adds up its part of the prefix's and the coarse keys'
//             gradients in shared_sums, which `finish` sums in the order of the chunks and writes.
//   decode    reads exactly the keys that a token sees; writes out.
// Nothing is written by two items of a launch.
#include "local_attention_2d.h"

#include "kernel.h"
#include "lane_engine.h"
#include "local_bias.h"
#include "local_cell.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Keys on a grid, cell (y, x) in row first + y * down + x * right of the tensors, and who sees them.
template <class T>
struct KeySet {
  using A = Acc<T>;
  using E = Operand<T>;
  Axis y, x;
  int64_t first, down, right;
  const Tensor4 *k, *v;
  double bias;
  bool causal;
  const bool* exist;            // of each column; null: all
  const bool* shown = nullptr;  // of each row of the tensors
  A* flat = nullptr;            // the bias for each lane, in log2, where the local set has a table
  // The last `ring` rows, converted; null where keys are read where they lie.
  E *k_copy = nullptr, *v_copy = nullptr;
  int64_t ring = 0, copied = 0;
  // Where the gradients of the last `sum_ring` rows are summed up, `ld` apart.
  A *dk = nullptr, *dv = nullptr;
  int64_t sum_ring = 1, ld = 0;

  // Rows that at most a strip of so many lines sees.
  int64_t most_rows(int64_t lines) const {
    const int64_t most = (lines * y.step + y.ratio - 1) / y.ratio + y.size() + 1;
    return most < y.keys ? most : y.keys;
  }
  // What a strip sees.
  Patch window(const Patch& strip) const {
    Patch p{y.windows(strip.y), x.windows(strip.x)};
    if (causal && strip.y.hi < p.y.hi) p.y.hi = strip.y.hi;
    return p;
  }
  // Column 0 of a row.
  const E* at(const Tensor4& from, const E* copy, int64_t b, int64_t kv, int64_t row) const {
    if (copy) return copy + row % ring * x.keys * ld;
    return reinterpret_cast<const E*>(from.at<T>(b, kv)) + (first + row * down) * from.stride[2];
  }
};

template <class T>
constexpr bool reads_in_place(int64_t d) {
  return std::is_same_v<T, Operand<T>> && d % kRowPad<T> == 0;
}

// The lines of one phase that a work item owns.
struct Band {
  Phase phase;
  Span lines;
  Band(const LocalLanePlan& plan, int64_t unit) : phase(plan.problem, unit / plan.bands) {
    const int64_t n = unit % plan.bands, high = plan.strip.h, strips = ceil_div(phase.y.queries, high);
    lines = Span{n * strips / plan.bands * high, (n + 1) * strips / plan.bands * high}.within(phase.y.queries);
  }
};

// What a bias table adds, of each head of a group: for whole strips and for what is left of a line, of which phases
// have two lengths.
template <class A>
struct Tables {
  BiasVectors<A>* of = nullptr;
  int64_t heads = 0, wide[3] = {};

  void take(Arena& arena, const LocalLanePlan& plan, int64_t kv, bool backward) {
    const LocalAttention& a = plan.problem;
    const int64_t longest = phase_grid(a.window).w, w = plan.strip.w;
    heads = a.heads / a.kv_heads;
    wide[0] = longest < w ? 0 : w, wide[1] = longest % w,
    wide[2] = a.window.grid.w % a.window.dilation.w ? (longest - 1) % w : 0;
    of = arena.take<BiasVectors<A>>(3 * heads);
    for (int64_t i = 0; i < 3 * heads; ++i) {
      BiasVectors<A> table;
      if (wide[i % 3]) table.take(arena, plan.bias, {plan.strip.h, wide[i % 3]}, false, backward);
      if (!arena.base) continue;
      of[i] = table;
      if (wide[i % 3]) table.fill(a.bias, kv * heads + i / 3);
      if (table.sums) table.clear_sums();
    }
  }
  const BiasVectors<A>& find(int64_t head, int64_t width) const {
    return of[3 * head + (width == wide[0] ? 0 : width == wide[1] ? 1 : 2)];
  }
  // What they summed up, as a part of the gradient.
  void write(const LocalLanePlan& plan, int64_t b, int64_t kv, int64_t slot) const {
    for (int64_t i = 0; i < 3 * heads; ++i) {
      A* part = bias_part<A>(plan.bias, plan.problem, b, kv * heads + i / 3, slot);
      if (i % 3 == 0) std::memset(static_cast<void*>(part), 0, sizeof(A) * plan.bias.size());
      if (wide[i % 3]) of[i].add_to(part);
    }
  }
};

// What a thread works with: the keys of one head.
template <class T>
struct Keys {
  using A = Acc<T>;
  const LocalLanePlan& plan;
  const LocalAttention& a = plan.problem;
  const Tables<A>& tables;
  int64_t b, kv, ld;
  KeySet<T> sets[3];          // local, prefix, coarse
  int count = 0, shared = 0;  // shared: sets behind the local one
  A* nowhere = nullptr;       // for gradients of what has no table

  Keys(const LocalLanePlan& plan, const Tables<A>& tables, int64_t b, int64_t kv, const Phase& phase)
      : plan(plan), tables(tables), b(b), kv(kv), ld(round_up(a.head_dim, kRowPad<T>)) {
    const Prefix& prefix = a.prefix;
    const Coarse& coarse = a.coarse;
    if (a.window.kernel.h)
      sets[count++] = {phase.y, phase.x, phase.first, phase.down, phase.right, &a.k, &a.v, 0.0, a.window.raster_causal,
                       nullptr};
    shared = count;
    if (shared) sets[0].shown = shown_keys(a, b);
    const auto everyone = [](int64_t queries, int64_t keys) {
      return Axis{queries, keys, queries + keys, queries + keys};
    };
    if (prefix.len) {
      const bool* exist = prefix.mask ? prefix.mask + b * prefix.len : nullptr;
      const Axis y = everyone(phase.y.queries, 1), x = everyone(phase.x.queries, prefix.len);
      sets[count++] = {y, x, 0, 0, 1, &prefix.k, &prefix.v, prefix.bias, false, exist};
    }
    if (coarse.grid.h)
      sets[count++] = {phase.coarse_y, phase.coarse_x, 0,           coarse.grid.w, 1,
                       &coarse.k,      &coarse.v,      coarse.bias, false,         nullptr};
    for (int i = 0; i < count; ++i) sets[i].ld = ld;
  }

  // Room for copies and for sums of the gradients of the local keys.
  void take(Arena& arena, bool backward) {
    for (int i = 0; i < count; ++i) {
      KeySet<T>& s = sets[i];
      s.ring = s.most_rows(plan.strip.h);
      const int64_t n = s.ring * s.x.keys * ld;
      if (!reads_in_place<T>(a.head_dim)) s.k_copy = arena.take<Operand<T>>(n), s.v_copy = arena.take<Operand<T>>(n);
      if (i < shared && backward) s.dk = arena.take<A>(n), s.dv = arena.take<A>(n), s.sum_ring = s.ring;
    }
    if (!a.bias.table) return;
    nowhere = arena.take<A>(kQueries);
    for (int i = shared; i < count; ++i) {
      sets[i].flat = arena.take<A>(kQueries);
      for (int l = 0; arena.base && l < kQueries; ++l) sets[i].flat[l] = A(sets[i].bias * kLog2e);
    }
  }

  // Copies what strips of these lines see, if anything is copied; lines only go forward.
  void enter(Span lines) {
    if (reads_in_place<T>(a.head_dim)) return;
    for (int i = 0; i < count; ++i) {
      KeySet<T>& s = sets[i];
      const Span rows = s.window({lines, {0, s.x.queries}}).y;
      if (s.copied < rows.lo) s.copied = rows.lo;
      for (; s.copied < rows.hi; ++s.copied)
        for (int64_t column = 0; column < s.x.keys; ++column) {
          const int64_t from = s.first + s.copied * s.down + column * s.right;
          const int64_t to = (s.copied % s.ring * s.x.keys + column) * ld;
          copy_padded(s.k->template at<T>(b, kv) + from * s.k->stride[2], s.k_copy + to);
          copy_padded(s.v->template at<T>(b, kv) + from * s.v->stride[2], s.v_copy + to);
        }
    }
  }
  void copy_padded(const T* x, Operand<T>* to) const { copy_row<T>(x, int(a.head_dim), to, int(ld), 0); }

  // Lists the keys of a set in `rows` that a strip of a head sees, and calls full() whenever the list is.
  template <class Full>
  void list(const KeySet<T>& s, int64_t h, const Patch& strip, Span rows, bool backward, KeyList<T>& keys,
            Full&& full) const {
    const Patch window = s.window(strip);
    rows = rows.within(window.y);
    const int wide = int(strip.x.size());
    uint64_t every_line = 0;
    for (int i = 0; i < strip.y.size(); ++i) every_line |= uint64_t(1) << (i * wide);
    const A bias = A(s.bias * kLog2e);
    const auto across = [&](Span x) { return uint16_t(range_bits(x.lo - strip.x.lo, x.hi - strip.x.lo) * every_line); };
    const auto down = [&](Span y) {
      return uint16_t(range_bits((y.lo - strip.y.lo) * wide, (y.hi - strip.y.lo) * wide));
    };
    const int64_t next_k = s.k_copy ? ld : s.right * s.k->stride[2], next_v = s.v_copy ? ld : s.right * s.v->stride[2];
    for (int64_t left = window.x.lo; left < window.x.hi; left += kListed) {
      // Of each column that some lane sees: these lanes, those at or behind it in a line, and where it is in a row.
      uint16_t seen[kListed], behind[kListed], here[kListed];
      int64_t at_x[kListed], at_k[kListed], at_v[kListed], at_sum[kListed];
      int n = 0;
      for (int64_t x = left; x < window.x.hi && x < left + kListed; ++x) {
        seen[n] = s.exist && !s.exist[x] ? uint16_t(0) : across(s.x.seen(x).within(strip.x));
        behind[n] = s.causal ? across(Span{x, strip.x.hi}.within(strip.x)) : uint16_t(0);
        at_x[n] = x, at_k[n] = x * next_k, at_v[n] = x * next_v, at_sum[n] = x * ld;
        n += seen[n] != 0;
      }
      for (int64_t y = rows.lo; y < rows.hi; ++y) {
        if (keys.count + n > kListed) full();
        const Span lines = s.y.seen(y).within(strip.y);
        const uint16_t before = down(s.causal ? Span{y + 1, strip.y.hi}.within(lines) : lines);
        const uint16_t own = s.causal ? down(Span{y, y + 1}.within(lines)) : uint16_t(0);
        if (!before && !own) continue;
        const Operand<T>*k = s.at(*s.k, s.k_copy, b, kv, y), *v = s.at(*s.v, s.v_copy, b, kv, y);
        A *dk = s.dk + y % s.sum_ring * s.x.keys * ld, *dv = s.dv + y % s.sum_ring * s.x.keys * ld;
        const uint16_t* at_all = seen;
        if (s.shown) {
          const bool* row = s.shown + s.first + y * s.down;
          for (int i = 0; i < n; ++i) here[i] = row[at_x[i] * s.right] ? seen[i] : uint16_t(0);
          at_all = here;
        }
        const bool some = own || s.shown;  // some of these keys may be seen by no lane
        const int from = keys.count;
        int count = from;
        for (int i = 0; i < n; ++i) {
          const uint16_t lanes = at_all[i] & (before | (own & behind[i]));
          keys.k[count] = k + at_k[i], keys.v[count] = v + at_v[i], keys.bias[count] = bias, keys.lanes[count] = lanes;
          if (backward) keys.dk[count] = dk + at_sum[i], keys.dv[count] = dv + at_sum[i];
          count += some ? lanes != 0 : 1;
        }
        keys.count = count;
        if (!keys.tables) continue;
        const BiasVectors<A>& table = tables.find(h - kv * tables.heads, wide);
        for (int i = 0, to = from; i < n; ++i) {
          const int64_t at = s.flat ? 0 : table.place(strip.y.lo, strip.x.lo, y, at_x[i]);
          keys.table[to] = (s.flat ? s.flat : table.values) + at, keys.dtable[to] = s.flat ? nowhere : table.sums + at;
          to += !some || (at_all[i] & (before | (own & behind[i])));
        }
      }
    }
  }
};

// f(band) of every band of a chunk.
template <class F>
void each_band(const LocalLanePlan& plan, int64_t chunk, F&& f) {
  const int64_t units = phases(plan.problem.window) * plan.bands;
  for (int64_t unit = chunk * units / plan.chunks; unit < (chunk + 1) * units / plan.chunks; ++unit) {
    const Band band(plan, unit);
    if (!band.lines.empty() && band.phase.x.queries) f(band);
  }
}

// f(the lines of a row of strips, so high), for the rows that have any of `lines`.
template <class F>
void each_line(int64_t high, const Phase& phase, Span lines, F&& f) {
  for (int64_t y = lines.lo / high * high; y < lines.hi; y += high) f(Span{y, y + high}.within(phase.y.queries));
}

// f(head, strip) of every strip of a row, head after head.
template <class F>
void each_strip(const LocalLanePlan& plan, const Phase& phase, int64_t kv, Span lines, F&& f) {
  const int64_t heads = plan.problem.heads / plan.problem.kv_heads, wide = plan.strip.w;
  for (int64_t h = kv * heads; h < (kv + 1) * heads; ++h)
    for (int64_t x = 0; x < phase.x.queries; x += wide) f(h, Patch{lines, Span{x, x + wide}.within(phase.x.queries)});
}

// ---- forward ----

template <class T>
void forward(const LocalLanePlan& plan, int64_t item, char* scratch) {
  const LocalAttention& a = plan.problem;
  const int64_t pairs = a.batch * a.kv_heads, b = item % pairs / a.kv_heads, kv = item % a.kv_heads;
  Arena arena{scratch};
  LaneForward<T> engine;
  engine.take(arena, int(a.head_dim));
  KeyList<T>& list = *arena.take<KeyList<T>>(1);
  list.count = 0, list.tables = a.bias.table;
  Tables<Acc<T>> tables;
  if (list.tables) tables.take(arena, plan, kv, false);
  const int64_t used = arena.used;
  each_band(plan, item / pairs, [&](const Band& band) {
    Keys<T> keys(plan, tables, b, kv, band.phase);
    arena.used = used;
    keys.take(arena, false);
    each_line(plan.strip.h, band.phase, band.lines, [&](Span lines) {
      keys.enter(lines);
      each_strip(plan, band.phase, kv, lines, [&](int64_t h, const Patch& strip) {
        int64_t index[kTile];
        engine.begin(rows_of<T>(a.q, b, h, index, strip.list(band.phase, index)), a.scale);
        for (int i = 0; i < keys.count; ++i)
          keys.list(keys.sets[i], h, strip, {0, keys.sets[i].y.keys}, false, list, [&] { engine.step(list); });
        engine.step(list);
        Acc<T>* lse = stat<T>(a.lse, a, b, h);
        const uint64_t spoilt = engine.finish([&](int r) { return a.out.at<T>(b, h) + index[r] * a.out.stride[2]; },
                                              [&](int r, Acc<T> value) { lse[index[r]] = value; });
        each_bit(spoilt, [&](int r) { attend_cell<T>(a, {b, h, kv, index[r], 1}, index[r], a.seqlen_q, arena); });
      });
    });
  });
}

// ---- backward ----

// Where the gradients of the prefix and the coarse keys are summed up, by chunk; dk, then dv.
template <class T>
Acc<T>* shared_sums(const LocalLanePlan& plan, int64_t b, int64_t kv, int64_t chunk) {
  const LocalAttention& a = plan.problem;
  return static_cast<Acc<T>*>(plan.shared_sums) +
         ((b * a.kv_heads + kv) * plan.chunks + chunk) * 2 * shared_keys(a) * round_up(a.head_dim, kRowPad<T>);
}

// A work item owns the queries and the local keys of its bands. It computes the gradients of all its queries, and with
// the queries of other bands that see its keys, those of its keys.
template <class T>
void backward(const LocalLanePlan& plan, int64_t item, char* scratch) {
  const LocalAttention& a = plan.problem;
  using A = Acc<T>;
  const int64_t pairs = a.batch * a.kv_heads, b = item % pairs / a.kv_heads, kv = item % a.kv_heads;
  const int64_t ld = round_up(a.head_dim, kRowPad<T>), shared = shared_keys(a) * ld;
  A* sums = shared_sums<T>(plan, b, kv, item / pairs);
  if (shared) std::memset(static_cast<void*>(sums), 0, sizeof(A) * 2 * shared);
  Arena arena{scratch};
  LaneBackward<T> engine;
  engine.take(arena, int(a.head_dim));
  KeyList<T>& list = *arena.take<KeyList<T>>(1);
  list.count = 0, list.tables = a.bias.table;
  Tables<A> tables;
  if (list.tables) tables.take(arena, plan, kv, true);
  const int64_t used = arena.used;
  each_band(plan, item / pairs, [&](const Band& band) {
    Keys<T> keys(plan, tables, b, kv, band.phase);
    arena.used = used;
    keys.take(arena, true);
    KeySet<T>& local = keys.sets[0];  // if there is one
    const bool has_local = keys.shared > 0;
    const int64_t width = local.x.keys * ld;
    if (has_local) {
      std::memset(static_cast<void*>(local.dk), 0, sizeof(A) * local.ring * width);
      std::memset(static_cast<void*>(local.dv), 0, sizeof(A) * local.ring * width);
    }
    for (int64_t i = keys.shared, at = 0; i < keys.count; ++i) {
      KeySet<T>& s = keys.sets[i];
      s.dk = sums + at, s.dv = sums + shared + at, s.sum_ring = s.y.keys;
      at += s.y.keys * s.x.keys * ld;
    }

    // Rows of keys before `end` are complete.
    int64_t written = band.lines.lo;
    const auto write = [&](int64_t end) {
      for (; written < end && written < band.lines.hi; ++written) {
        A *dk = local.dk + written % local.ring * width, *dv = local.dv + written % local.ring * width;
        for (int64_t x = 0; x < local.x.keys; ++x) {
          const int64_t row = local.first + written * local.down + x * local.right;
          write_row(dk + x * ld, A(a.scale), int(a.head_dim), a.dk.at<T>(b, kv) + row * a.dk.stride[2]);
          write_row(dv + x * ld, A(1), int(a.head_dim), a.dv.at<T>(b, kv) + row * a.dv.stride[2]);
        }
        std::memset(static_cast<void*>(dk), 0, sizeof(A) * width);
        std::memset(static_cast<void*>(dv), 0, sizeof(A) * width);
      }
    };
    Span seen_by = has_local ? local.y.seen_by(band.lines) : band.lines;
    if (a.window.raster_causal) seen_by.lo = band.lines.lo;
    each_line(plan.strip.h, band.phase, seen_by, [&](Span lines) {
      if (has_local) write(local.window({lines, {0, local.x.queries}}).y.lo);
      keys.enter(lines);
      const bool own = !lines.within(band.lines).empty();
      each_strip(plan, band.phase, kv, lines, [&](int64_t h, const Patch& strip) {
        int64_t index[kTile];
        const int n = strip.list(band.phase, index);
        const RowSet<T> dout = rows_of<T>(a.dout, b, h, index, n), out = rows_of<T>(a.out, b, h, index, n);
        const A *lse = stat<T>(a.lse, a, b, h), *dlse = stat<T>(a.dlse, a, b, h);
        A lses[kQueries], delta[kQueries];
        for (int r = 0; r < n; ++r) {
          lses[r] = lse[index[r]];
          delta[r] = row_dot(dout.row(r), out.row(r), int(a.head_dim)) - (dlse ? dlse[index[r]] : 0);
        }
        engine.begin(rows_of<T>(a.q, b, h, index, n), dout, lses, delta, a.scale);
        const auto see = [&](KeySet<T>& s, Span of, bool to_keys) {
          keys.list(s, h, strip, of, true, list, [&] { engine.step(list, own, to_keys); });
        };
        if (own) {
          if (has_local) {  // keys of other bands
            see(local, {0, band.lines.lo}, false), see(local, {band.lines.hi, local.y.keys}, false);
            engine.step(list, true, false);
          }
          for (int i = keys.shared; i < keys.count; ++i) see(keys.sets[i], {0, keys.sets[i].y.keys}, true);
        }
        if (has_local) see(local, band.lines, true);
        engine.step(list, own, true);
        if (own) engine.finish([&](int r) { return a.dq.at<T>(b, h) + index[r] * a.dq.stride[2]; });
      });
    });
    if (has_local) write(band.lines.hi);
  });
  tables.write(plan, b, kv, item / pairs);
}

// A prefix or coarse key: its sums, in the order of the chunks.
template <class T>
void finish_shared(const LocalLanePlan& plan, int64_t item, char*) {
  using A = Acc<T>;
  const LocalAttention& a = plan.problem;
  const int64_t n = shared_keys(a), key = item % n, kv = item / n % a.kv_heads, b = item / n / a.kv_heads;
  const int64_t d = a.head_dim, ld = round_up(d, kRowPad<T>);
  const bool prefix = key < a.prefix.len;
  const int64_t row = prefix ? key : key - a.prefix.len;
  for (int second = 0; second < 2; ++second) {
    const auto part = [&](int64_t chunk) { return shared_sums<T>(plan, b, kv, chunk) + (second * n + key) * ld; };
    A* sum = part(0);
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
      for (int64_t j = 0; j < ld; j += kLanes<A>) store(sum + j, load(sum + j) + load(part(chunk) + j));
    const Tensor4& to = prefix ? (second ? a.prefix.dv : a.prefix.dk) : second ? a.coarse.dv : a.coarse.dk;
    write_row(sum, second ? A(1) : A(a.scale), int(d), to.at<T>(b, kv) + row * to.stride[2]);
  }
}

template <class T>
int64_t scratch_bytes(const LocalLanePlan& plan, bool back) {
  const LocalAttention& a = plan.problem;
  Arena arena{nullptr};
  if (back) {
    LaneBackward<T>().take(arena, int(a.head_dim));
  } else {
    LaneForward<T>().take(arena, int(a.head_dim));
  }
  arena.take<KeyList<T>>(1);
  Tables<Acc<T>> tables;
  if (a.bias.table) tables.take(arena, plan, 0, back);
  Keys<T>(plan, tables, 0, 0, Phase(a, 0)).take(arena, back);  // the largest phase
  if (!back) Narrow<T>().take(arena, int(a.head_dim));
  return arena.used;
}

// ---- decode ----

// One new token, for some of the heads that share its keys.
template <class T>
void decode(const LocalDecodePlan& plan, int64_t item, char* scratch) {
  const LocalAttention& a = plan.problem;
  const Grid grid = a.window.grid;
  const int64_t group = a.heads / a.kv_heads, parts = ceil_div(group, plan.heads);
  const int64_t t = item % a.seqlen_q, part = item / a.seqlen_q % parts, pair = item / a.seqlen_q / parts;
  const int64_t left = group - part * plan.heads, cells = grid.h * grid.w;
  const int64_t b = pair / a.kv_heads, kv = pair % a.kv_heads;
  const CellRow row{b, kv * group + part * plan.heads, kv, t, int(left < plan.heads ? left : plan.heads)};
  // clamped: contents are not trusted
  const auto clamp = [](int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; };
  const int64_t end = clamp(a.cache_seqlens[b], cells);
  const int64_t at = a.query_index.data ? clamp(a.query_index[b * a.seqlen_q + t], cells - 1)
                                        : clamp(a.cache_seqlens[b] - a.seqlen_q, cells - a.seqlen_q) + t;
  attend_cell<T>(a, row, at, end, Arena{scratch});
}

// ---- the gradient of a bias table ----

// A head's: its parts, in the order of samples and slots.
template <class A>
void finish_bias(const LocalBiasPlan& plan, int64_t h, char*) {
  const LocalAttention& a = plan.problem;
  const BiasPlan& bias = plan.bias;
  const Grid size = a.bias.size;
  A* table = static_cast<A*>(a.bias.grad) + h * size.h * size.w;
  std::memset(static_cast<void*>(table), 0, sizeof(A) * size.h * size.w);
  for (int64_t n = 0; n < a.batch * bias.slots; ++n) {
    const A* part = bias_part<A>(bias, a, n / bias.slots, h, n % bias.slots);
    for (int64_t y = bias.y.lo; y < bias.y.hi; ++y) {
      A* to = table + (size.h / 2 + y) * size.w + size.w / 2;
      for (int64_t x = bias.x.lo; x < bias.x.hi; ++x) to[x] += *part++;
    }
  }
}

}  // namespace

bool local_on_tiles(Dtype dtype, bool backward) {
  return by_dtype(dtype,
                  [&](auto x) { return backward ? kBackwardOnTiles<decltype(x)> : kForwardOnTiles<decltype(x)>; });
}
int64_t local_lanes_scratch(const LocalLanePlan& plan, bool backward) {
  return by_dtype(plan.problem.dtype, [&](auto x) { return scratch_bytes<OnVectors<decltype(x)>>(plan, backward); });
}

COGVIEW_KERNEL(local_lanes_fwd, LocalLanePlan, forward<OnVectors<T>>, !kForwardOnTiles<T>)
COGVIEW_KERNEL(local_lanes_bwd, LocalLanePlan, backward<OnVectors<T>>, !kBackwardOnTiles<T>)
COGVIEW_KERNEL(local_lanes_finish, LocalLanePlan, finish_shared<OnVectors<T>>, !kBackwardOnTiles<T>)
COGVIEW_KERNEL(local_finish_bias, LocalBiasPlan, finish_bias<Acc<T>>, true)
COGVIEW_KERNEL(local_lanes_decode, LocalDecodePlan, decode<T>, true)

}  // namespace COGVIEW_ISA
}  // namespace cogview
