// How three-region attention is cut into work, and the launches it takes.
#include "host.h"
#include "three_region_attention.h"

namespace cogview {
namespace {

// How many of a head's tiles one work item takes: `size`, which share packed tiles, or so few that there are `enough`.
int64_t group_size(int64_t tiles, int64_t heads, int64_t size, int64_t enough) {
  while (size > 1 && heads * ceil_div(tiles, size) < enough) size /= 2;
  return size;
}

ThreeRegionPlan plan_tiles(const ThreeRegionAttention& a, const Host& host) {
  ThreeRegionPlan plan{};
  plan.problem = a;
  plan.query_group = group_size(plan.query_tiles(), a.batch * a.heads, 16, 4 * host.threads);
  plan.scratch = scratch(host, COGVIEW_PICK(tile_scratch)(a.dtype, a.head_dim));
  return plan;
}

void run_forward(const ThreeRegionPlan& plan, const Host& host) {
  const int64_t groups = ceil_div(plan.query_tiles(), plan.query_group);
  run_items(host, COGVIEW_PICK(three_region_tiles_fwd), plan, plan.problem.batch * plan.problem.heads * groups);
}

}  // namespace

void three_region_fwd(const ThreeRegionAttention& a, const Host& host) { run_forward(plan_tiles(a, host), host); }

void three_region_bwd(const ThreeRegionAttention& a, const Host& host) {
  ThreeRegionPlan plan = plan_tiles(a, host);
  const int64_t pairs = a.batch * a.kv_heads, heads = a.batch * a.heads, tiles = heads * plan.query_tiles();
  const int64_t size = accumulator_bytes(a.dtype);
  plan.delta = host.memory(heads * a.seqlen_q * size);
  plan.dq_sums = host.memory(tiles * dq_tile_size(a) * size);
  plan.key_group = group_size(plan.key_tiles(), pairs, 4, kEnough);
  // groups of one color are so far apart that no query has two of them in its window
  const int64_t window = std::min(a.block_size * a.window_blocks, a.seqlen_k);
  plan.colors = 1 + ceil_div(window, plan.key_group * kTile);
  run_items(host, COGVIEW_PICK(three_region_prepare), plan, tiles);
  if (a.num_pivots > 0) {
    // their parts take less memory than query, key and value
    const int64_t most = std::max<int64_t>(1, a.seqlen_q / (2 * a.num_pivots + 1));
    plan.pivot_chunks = std::clamp<int64_t>(kEnough / pairs, 1, most);
    for (void** parts : {&plan.pivot_dk, &plan.pivot_dv})
      *parts = host.memory(pairs * plan.pivot_chunks * a.num_pivots * a.head_dim * size);
    run_items(host, COGVIEW_PICK(three_region_grad_pivot), plan, pairs * plan.pivot_chunks);
  }
  const int64_t groups = ceil_div(plan.key_tiles(), plan.key_group);
  for (plan.color = 0; plan.color < plan.colors && plan.color < groups; ++plan.color)
    run_items(host, COGVIEW_PICK(three_region_grad_key), plan, pairs * ceil_div(groups - plan.color, plan.colors));
  run_items(host, COGVIEW_PICK(three_region_finish), plan, tiles);
}

void three_region_decode(const ThreeRegionAttention& a, const Host& host) {
  ThreeRegionPlan plan = plan_tiles(a, host);
  if (a.seqlen_q > kTile) return run_forward(plan, host);  // a prompt
  // heads that share keys together, but enough items for all threads
  const int64_t group = a.heads / a.kv_heads, parts = ceil_div(host.threads, a.batch * a.kv_heads);
  plan.decode_heads = std::clamp<int64_t>(group / parts, 1, kTile / a.seqlen_q);
  run_items(host, COGVIEW_PICK(three_region_rows), plan, a.batch * a.kv_heads * ceil_div(group, plan.decode_heads));
}

}  // namespace cogview
