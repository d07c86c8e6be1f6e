// Plans the passes of 2D local attention over strips: on the host, without CUDA.
#pragma once

#include <algorithm>

#include "local_strips.h"

namespace cogview::cuda {

// What a call asks for, exactly; 0: what is tuned.
struct StripChoice {
  int groups = 0, blocks = 0, unit_rows = 0;
  bool any() const { return groups || blocks || unit_rows; }
};

struct StripChoices {  // of the passes
  StripChoice forward, grad_query, grad_key;
};

struct Chip {
  int multiprocessors, shared;  // bytes that a block may have
  int capability;               // 90: sm_90
};

// What is best of a chip, by head_dim, as `python -m benchmarks.sweep` measures it. Windows that it does not fit take
// fewer groups and other blocks; 0: 3 groups, of grad_key 2, the blocks that there is room for, one row of units.
struct Tuned {
  int capability, head_dim;
  StripChoices of;
};
constexpr Tuned kTuned[] = {
    {90, 64, {{3, 0, 0}, {3, 0, 0}, {2, 0, 0}}},
    {90, 128, {{0, 0, 0}, {2, 5, 0}, {2, 4, 0}}},
};

inline StripChoice tuned(int capability, Pass pass, int head_dim) {
  for (const Tuned& row : kTuned)
    if (row.capability == capability && row.head_dim == head_dim)
      return pass == Pass::forward ? row.of.forward : pass == Pass::grad_query ? row.of.grad_query : row.of.grad_key;
  return {};
}

struct StripPlan {
  Strips p;
  int units, unit_rows;  // of a warp, at once in the forward
  int threads, bytes;    // shared
  bool extra, options;   // kernels of which kind
};

constexpr int kMostUnits = 5;  // columns of units that a warp sees: 17 columns of cells

inline Reach reach(const Window& w, bool rows, bool keys) {
  const int kernel = static_cast<int>(rows ? w.kernel.h : w.kernel.w);
  const Axis axis{kernel / 2, static_cast<int>(rows ? w.grid.h : w.grid.w),
                  static_cast<int>(rows ? w.dilation.h : w.dilation.w), w.shift};
  const bool ordered = rows && w.raster_causal;
  return {axis, ordered && keys ? 0 : axis.radius, ordered && !keys ? 0 : axis.radius, keys};
}

// Whether the image's keys have more to them than windows, or there are none of them.
inline bool has_options(const LocalAttention& a) { return a.key_mask || a.bias.table || !a.window.kernel.h; }

// Units that `tiles` tiles side by side need of one axis, at most.
inline int units_at_once(const Reach& r, int tiles) {
  int most = tiles - 1 + r.most_units();
  if (!r.axis.shift) return most;
  for (const int phase : {0, r.axis.dilation - 1}) {
    const int n = r.axis.cells(phase), count = (n + 3) / 4;
    for (int t = 0; t < count; t += tiles == 1 ? 1 : tiles) {
      const Span from = r.units(t, n), to = r.units(std::min(t + tiles, count) - 1, n);
      most = std::max(most, to.hi - from.lo);
    }
  }
  return most;
}

// False: the window is larger than the kernels take, or it does not fit into shared memory, or not as it was chosen.
inline bool plan_strips(const LocalAttention& a, Pass pass, const Chip& chip, const StripChoice& choice,
                        StripPlan* plan) {
  const int dim = static_cast<int>(a.head_dim), tiles = strip_tiles(dim), unit = 32 * dim;
  const bool keys = pass == Pass::grad_key;
  Strips& p = plan->p;
  p = {};
  p.repeats = keys ? static_cast<int>(a.heads / a.kv_heads) : 1;
  p.heads = static_cast<int>(keys ? a.kv_heads : a.heads), p.group = static_cast<int>(a.heads / a.kv_heads);
  p.y = reach(a.window, true, keys), p.x = reach(a.window, false, keys), p.ordered = a.window.raster_causal;
  plan->units = std::max(2, p.x.most_units());
  p.unit_rows = units_at_once(p.y, 1);
  p.units = units_at_once(p.x, tiles) + plan->units - p.x.most_units();
  if (a.coarse.grid.h * a.coarse.grid.w >= kMostCoarse || a.window.grid.h * a.window.grid.w >= INT32_MAX / 2)
    return false;
  if (plan->units > kMostUnits || p.unit_rows > 8 || units_at_once(p.x, 1) > 8) return false;
  plan->options = has_options(a);
  const bool extra_keys = !keys && (a.prefix.len || a.coarse.grid.h);
  plan->extra = extra_keys || (!keys && plan->options);
  if (pass == Pass::forward && plan->extra) {  // fewer instances
    const int more = (plan->units <= 3 ? 3 : kMostUnits) - plan->units;
    plan->units += more, p.units += more;
  }

  const int own = own_bytes(dim, pass), extra = extra_keys ? extra_bytes(dim) : 0;
  p.block = p.units * unit, p.row_block = keys ? p.units * 128 : 0;
  const int most = most_threads(dim, pass) / (32 * tiles), slot = 2 * p.block + p.row_block;
  const auto fixed = [&](int groups) {
    return groups * (tiles * own + extra) + 8 * (2 * kStepBarriers + groups * tiles);
  };
  const StripChoice wish = tuned(chip.capability, pass, dim);
  const int usual = wish.groups ? wish.groups : keys ? 2 : 3;
  for (p.groups = std::min(choice.groups ? choice.groups : usual, most); p.groups; --p.groups) {
    const int room = std::min((chip.shared - fixed(p.groups)) / slot, kStepBarriers / (p.groups + 1));
    const int least = p.unit_rows + p.groups - 1;  // each works on a step of its own
    const int wished = wish.blocks ? std::max(wish.blocks, least) : 8 + p.unit_rows;
    p.blocks = choice.blocks ? choice.blocks : std::min(wished, room);
    if (p.blocks >= least && p.blocks <= room) break;
  }
  if (!p.groups || (choice.groups && p.groups != choice.groups)) return false;
  p.late = std::min(p.groups, p.blocks - (p.unit_rows + p.groups - 1));
  p.values = p.blocks * p.block, p.stage = 2 * p.values;
  p.rows = p.stage + p.groups * tiles * own;
  p.extra = p.rows + p.blocks * p.row_block;
  p.full = p.extra + p.groups * extra, p.done = p.full + 8 * p.blocks;
  plan->threads = 32 * tiles * p.groups;
  plan->bytes = p.done + 8 * (kStepBarriers + p.groups * tiles);

  const auto count = [](int n, int of) { return (n + of - 1) / of; };
  const int steps = count(p.y.axis.cells(0), 4);
  p.strips = count(p.x.axis.cells(0), 4 * tiles);
  const int64_t columns = a.batch * p.heads * p.strips * p.x.axis.dilation * p.y.axis.dilation;
  // so many chunks that the last round of items is not long: each costs the blocks above it again
  int64_t best = INT64_MAX;
  for (int chunks = 1; chunks <= steps; ++chunks) {
    const int size = count(steps, chunks);
    const int64_t rounds = (columns * count(steps, size) + chip.multiprocessors - 1) / chip.multiprocessors;
    const int64_t cost = rounds * (size + p.unit_rows) + p.unit_rows;
    if (cost < best) best = cost, p.chunk_steps = size;
  }
  p.chunks = count(steps, p.chunk_steps);
  if (columns * p.chunks > INT32_MAX / 2) return false;
  p.items = static_cast<int>(columns * p.chunks);
  for (int chunk = 0; chunk < p.chunks; ++chunk)
    for (const int phase : {0, p.y.axis.dilation - 1}) {
      const int n = p.y.axis.cells(phase);
      const Steps s(p.y, n, chunk, p.chunk_steps, p.unit_rows);
      int last = 0;  // virtual step that has steps
      for (int v = 0; v <= s.end - s.first + p.unit_rows; ++v)
        if (s.begin(v) < s.begin(v + 1)) last = v;
      p.virtual_steps = std::max(p.virtual_steps, last + p.unit_rows);
    }
  // each walk's steps must meet the same groups
  if (p.repeats > 1) p.virtual_steps = count(p.virtual_steps, p.groups) * p.groups;
  const bool all = (choice.unit_rows ? choice.unit_rows : wish.unit_rows) > 1 && pass == Pass::forward &&
                   has_all_rows(dim, plan->units, p.unit_rows, p.ordered, plan->extra);
  plan->unit_rows = all ? p.unit_rows : 1;
  return !choice.unit_rows || choice.unit_rows == plan->unit_rows;
}

}  // namespace cogview::cuda
