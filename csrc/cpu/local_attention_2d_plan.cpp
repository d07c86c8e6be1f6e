// How 2D local attention cuts its grids into strips or patches and those into work, and the launches it takes.
#include <utility>
#include <vector>

#include "host.h"
#include "local_attention_2d.h"

namespace cogview {
namespace {

// Whether windows are those of the coarse grid.
bool coarse_only(const LocalAttention& a) { return !a.window.kernel.h && a.coarse.grid.h; }

BiasPlan plan_bias(const LocalAttention& a) {
  if (!a.bias.table) return {};
  const Phase first(a, 0);
  return {first.y.reach(), first.x.reach()};
}
void take_parts(BiasPlan* bias, const LocalAttention& a, const Host& host, int64_t slots) {
  bias->slots = slots;
  bias->parts = host.memory(a.batch * a.heads * slots * bias->size() * accumulator_bytes(a.dtype));
}

// ---- on lanes ----

// The shape of 16 cells whose windows hold the fewest keys; a strip costs about as much as 24 of those.
Grid choose_strip(const Axis& y, const Axis& x) {
  const auto keys = [](const Axis& axis, int64_t size) {
    int64_t sum = 0, count = 0;
    for (int64_t first = 0; first < axis.queries; first += size, ++count)
      sum += axis.windows({first, std::min(first + size, axis.queries)}).size();
    return std::pair<int64_t, int64_t>(sum, count);
  };
  Grid best;
  int64_t least = 0;
  for (int64_t h = 1; h <= 16; h *= 2) {
    const auto [rows, down] = keys(y, h);
    const auto [columns, across] = keys(x, 16 / h);
    const int64_t cost = rows * columns + 24 * down * across;
    if (!best.h || cost < least) least = cost, best = {h, 16 / h};
  }
  return best;
}

// Strips of queries, and work items: up to `chunks` for each head of keys, none much smaller than its windows. In the
// backward `chunks` must not depend on the threads, since it decides in which order gradients are summed up.
LocalLanePlan plan_strips(const LocalAttention& a, int64_t chunks) {
  const Phase first(a, 0);
  LocalLanePlan plan{};
  plan.problem = a;
  plan.bias = plan_bias(a);
  plan.strip = coarse_only(a) ? choose_strip(first.coarse_y, first.coarse_x) : choose_strip(first.y, first.x);
  const int64_t bands = std::max<int64_t>(1, first.y.queries / std::max(plan.strip.h, first.y.size() - 1));
  plan.chunks = std::min(chunks, phases(a.window) * bands);
  plan.bands = ceil_div(plan.chunks, phases(a.window));
  return plan;
}

void forward_on_lanes(const LocalAttention& a, const Host& host) {
  LocalLanePlan plan = plan_strips(a, ceil_div(4 * host.threads, a.batch * a.kv_heads));
  plan.scratch = scratch(host, COGVIEW_PICK(local_lanes_scratch)(plan, false));
  run_items(host, COGVIEW_PICK(local_lanes_fwd), plan, a.batch * a.kv_heads * plan.chunks);
}

void backward_on_lanes(const LocalAttention& a, const Host& host) {
  const int64_t pairs = a.batch * a.kv_heads, shared = shared_keys(a);
  // sums for the prefix and the coarse keys, of every work item, are to take about as much memory as query at most, but
  // a few items are worth more
  const int64_t most = std::max<int64_t>(4, a.seqlen_q * (a.heads / a.kv_heads) / (2 * shared + 1));
  LocalLanePlan plan = plan_strips(a, std::min(ceil_div(kEnough, pairs), most));
  const int64_t row = ceil_div(a.head_dim, 32) * 32 * accumulator_bytes(a.dtype);
  plan.shared_sums = host.memory(pairs * plan.chunks * 2 * shared * row);
  plan.scratch = scratch(host, COGVIEW_PICK(local_lanes_scratch)(plan, true));
  if (a.bias.table) take_parts(&plan.bias, a, host, plan.chunks);
  run_items(host, COGVIEW_PICK(local_lanes_bwd), plan, pairs * plan.chunks);
  run_items(host, COGVIEW_PICK(local_lanes_finish), plan, pairs * shared, 64);
  if (a.bias.table) run_items(host, COGVIEW_PICK(local_finish_bias), LocalBiasPlan{a, plan.bias, {}}, a.heads);
}

// ---- on tiles ----

// Sum over the pieces of `rows` along an axis of how many pieces of `columns` their windows meet.
int64_t meetings(const Axis& axis, int64_t rows, Cut columns) {
  int64_t sum = 0;
  for (int64_t first = 0; first < axis.queries; first += rows)
    sum += columns.pieces(axis.windows({first, std::min(first + rows, axis.queries)})).size();
  return sum;
}

// Shapes of query and key patches, both 2^n by 64 / 2^n cells, for the least work. The engine multiplies the strips of
// 16 queries by the halves of 32 keys that meet; a patch costs about as much as 8 of those, packing keys as 4.
void choose_patches(const Axis& y, const Axis& x, Patches* queries, Patches* keys) {
  struct Best {
    Cut cut;
    int64_t strips, patches;
  };
  const auto best = [](const Axis& axis, int64_t strip, int64_t patch, int64_t half, int64_t size) {
    Best b{};
    for (const int64_t offset : {int64_t(0), axis.before % size}) {
      const int64_t strips = meetings(axis, strip, {half, offset});
      if (b.strips && strips >= b.strips) continue;
      b = {{size, offset}, strips, meetings(axis, patch, {size, offset})};
    }
    return b;
  };
  int64_t least = 0;
  for (int64_t qh = 1; qh <= 64; qh *= 2)
    for (int64_t kh = 1; kh <= 64; kh *= 2) {
      const int64_t qw = 64 / qh, kw = 64 / kh;
      const Best by = best(y, std::max<int64_t>(1, 16 / qw), qh, std::max<int64_t>(1, 32 / kw), kh);
      const Best bx = best(x, std::min<int64_t>(16, qw), qw, std::min<int64_t>(32, kw), kw);
      const Cut qy{qh}, qx{qw};
      const int64_t cost = by.strips * bx.strips + by.patches * bx.patches +
                           8 * qy.count(y.queries) * qx.count(x.queries) +
                           4 * by.cut.count(y.keys) * bx.cut.count(x.keys);
      if (least && cost >= least) continue;
      least = cost;
      if (queries) queries->y = qy, queries->x = qx;
      keys->y = by.cut, keys->x = bx.cut;
    }
}

// A nearly square group of at most `most` patches, small enough that `heads` make enough groups.
Grid choose_group(Grid grid, const Patches& p, int64_t heads, int64_t most, int64_t enough) {
  const Grid patches{p.y.count(grid.h), p.x.count(grid.w)};
  Grid group{1, 1};
  for (;;) {
    const bool tall = group.h < patches.h && (group.h * p.y.size <= group.w * p.x.size || group.w >= patches.w);
    if (!tall && group.w >= patches.w) return group;
    const Grid next = tall ? Grid{group.h * 2, group.w} : Grid{group.h, group.w * 2};
    const Grid groups = groups_of(grid, p, next);
    if (next.h * next.w > most || heads * groups.h * groups.w < enough) return group;
    group = next;
  }
}

// The least distance between groups of `group` pieces of keys that share no piece of queries.
int64_t colors(const Axis& axis, Cut keys, int64_t group, Cut queries) {
  std::vector<Span> seen;  // of each group; a phase may have no query that sees it
  for (int64_t i = 0; i < keys.count(axis.keys); i += group) {
    const Span by = axis.seen_by(Span{keys.piece(i).lo, keys.piece(i + group - 1).hi}.within(axis.keys));
    seen.push_back(by.empty() ? Span{} : queries.pieces(by));
  }
  const auto share = [&](size_t i, size_t j) { return !seen[i].within(seen[j]).empty(); };
  size_t n = 1;
  for (size_t i = 0; i < seen.size(); ++i)
    for (size_t j = i + n; j < seen.size(); ++j)
      if (share(i, j)) n = j - i + 1;
  return int64_t(n);
}

// Of all phases together.
Grid choose_colors(const LocalTilePlan& plan, const Patches& p, bool coarse) {
  Grid most{1, 1};
  for (int64_t n = 0; n < phases(plan.problem.window); ++n) {
    const Phase phase(plan.problem, n);
    const Axis &y = coarse ? phase.coarse_y : phase.y, &x = coarse ? phase.coarse_x : phase.x;
    most.h = std::max(most.h, colors(y, p.y, p.backward.h, plan.queries.y));
    most.w = std::max(most.w, colors(x, p.x, p.backward.w, plan.queries.x));
  }
  return most;
}

// Patches of the queries, the keys and the coarse keys. What the backward uses of them depends on the shape alone, so
// that results do not depend on the number of threads.
LocalTilePlan plan_patches(const LocalAttention& a, const Host& host, bool backward) {
  const Phase first(a, 0);
  const int64_t pairs = a.batch * a.kv_heads, n = phases(a.window);
  LocalTilePlan plan{};
  plan.problem = a;
  plan.bias = plan_bias(a);
  if (coarse_only(a))
    choose_patches(first.coarse_y, first.coarse_x, &plan.queries, &plan.coarse);
  else
    choose_patches(first.y, first.x, &plan.queries, &plan.keys);
  plan.queries.forward = choose_group(first.grid(), plan.queries, a.batch * a.heads * n, 16, 4 * host.threads);
  plan.keys.backward = choose_group(first.grid(), plan.keys, pairs * n, 8, kEnough);
  if (a.coarse.grid.h) {
    if (!coarse_only(a)) choose_patches(first.coarse_y, first.coarse_x, nullptr, &plan.coarse);
    plan.coarse.backward = choose_group(a.coarse.grid, plan.coarse, pairs, 8, kEnough);
  }
  int64_t room = 0;
  if (a.bias.table) {
    plan.bias.cells = (backward ? plan.queries : plan.keys).vector(), plan.bias.of_keys = !backward;
    const int64_t lanes = plan.bias.lanes(plan.bias.cells);
    plan.bias.values = host.memory(a.heads * lanes * accumulator_bytes(a.dtype));
    room = plan.bias.padded(plan.bias.cells) + lanes + 4 * kBiasLanes;
  }
  plan.scratch = scratch(host, COGVIEW_PICK(tile_scratch)(a.dtype, a.head_dim) + room * accumulator_bytes(a.dtype));
  if (a.bias.table)  // small tables at once, that no thread has to be woken up for
    run_items(host, COGVIEW_PICK(local_tiles_bias), plan, a.heads, 1 + (1 << 16) / room);
  return plan;
}

void forward_on_tiles(const LocalAttention& a, const Host& host) {
  const LocalTilePlan plan = plan_patches(a, host, false);
  const Grid groups = groups_of(phase_grid(a.window), plan.queries, plan.queries.forward);
  run_items(host, COGVIEW_PICK(local_tiles_fwd), plan, a.batch * a.heads * phases(a.window) * groups.h * groups.w);
}

// Runs a kernel for groups of key patches, color by color.
void run_colors(const Host& host, void (*kernel)(const LocalTilePlan&, int64_t, int64_t, int), LocalTilePlan& plan,
                Patches& p, Grid grid, int64_t heads) {
  for (p.color.h = 0; p.color.h < p.colors.h; ++p.color.h)
    for (p.color.w = 0; p.color.w < p.colors.w; ++p.color.w) {
      const Grid groups = groups_of_color(grid, p);
      run_items(host, kernel, plan, heads * groups.h * groups.w);
    }
}

void backward_on_tiles(const LocalAttention& a, const Host& host) {
  LocalTilePlan plan = plan_patches(a, host, true);
  const int64_t pairs = a.batch * a.kv_heads, heads = a.batch * a.heads, patches = heads * plan.query_patches();
  const int64_t size = accumulator_bytes(a.dtype);
  plan.delta = host.memory(heads * a.seqlen_q * size);
  plan.dq_sums = host.memory(patches * dq_tile_size(a) * size);
  run_items(host, COGVIEW_PICK(local_tiles_prepare), plan, patches);
  if (a.prefix.len > 0) {
    // their parts take less memory than query, key and value
    const int64_t most = std::max<int64_t>(1, a.seqlen_q / (2 * a.prefix.len + 1));
    plan.prefix_chunks = std::clamp<int64_t>(kEnough / pairs, 1, most);
    for (void** parts : {&plan.prefix_dks, &plan.prefix_dvs})
      *parts = host.memory(pairs * plan.prefix_chunks * a.prefix.len * a.head_dim * size);
    run_items(host, COGVIEW_PICK(local_tiles_grad_prefix), plan, pairs * plan.prefix_chunks);
    run_items(host, COGVIEW_PICK(local_tiles_finish_prefix), plan, pairs * prefix_tiles(a));
  }
  if (a.coarse.grid.h) {
    plan.coarse.colors = choose_colors(plan, plan.coarse, true);
    run_colors(host, COGVIEW_PICK(local_tiles_grad_coarse), plan, plan.coarse, a.coarse.grid, pairs);
  }
  if (a.window.kernel.h) {
    const Grid grid = phase_grid(a.window);
    plan.keys.colors = choose_colors(plan, plan.keys, false);
    const Grid groups = groups_of_color(grid, plan.keys);  // of the first color, which has most
    if (a.bias.table) take_parts(&plan.bias, a, host, phases(a.window) * groups.h * groups.w);
    run_colors(host, COGVIEW_PICK(local_tiles_grad_key), plan, plan.keys, grid, pairs * phases(a.window));
  }
  run_items(host, COGVIEW_PICK(local_tiles_finish), plan, patches);
  if (a.bias.table) run_items(host, COGVIEW_PICK(local_finish_bias), LocalBiasPlan{a, plan.bias, {}}, a.heads);
}

}  // namespace

void local_fwd(const LocalAttention& a, const Host& host) {
  (COGVIEW_PICK(local_on_tiles)(a.dtype, false) ? forward_on_tiles : forward_on_lanes)(a, host);
}

void local_bwd(const LocalAttention& a, const Host& host) {
  (COGVIEW_PICK(local_on_tiles)(a.dtype, true) ? backward_on_tiles : backward_on_lanes)(a, host);
}

void local_decode(const LocalAttention& a, const Host& host) {
  LocalDecodePlan plan{};
  plan.problem = a;
  const int64_t group = a.heads / a.kv_heads, items = a.batch * a.kv_heads * a.seqlen_q;
  // heads that share keys together, but enough items for all threads
  plan.heads = std::clamp<int64_t>(group / ceil_div(host.threads, items), 1, kNarrow);
  plan.scratch = scratch(host, COGVIEW_PICK(tile_scratch)(a.dtype, a.head_dim));
  run_items(host, COGVIEW_PICK(local_lanes_decode), plan, items * ceil_div(group, plan.heads));
}

}  // namespace cogview
