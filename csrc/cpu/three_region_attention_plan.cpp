// How three-region attention is cut into work, over all sequences together, and the launches it takes.
#include <vector>

#include "host.h"
#include "three_region_attention.h"

namespace cogview {
namespace {

// Contents of pivots, lengths and padding are not trusted: what is out of range is left out or clamped.
std::vector<Sequence> sequences_of(const ThreeRegionAttention& a) {
  std::vector<Sequence> all(a.sequences);
  int64_t tiles = 0;
  for (int64_t n = 0; n < a.sequences; ++n) {
    Sequence& s = all[n];
    if (a.cu_seqlens.data) {
      s.first_query = s.first_key = a.cu_seqlens[n];
      s.queries = s.keys = a.cu_seqlens[n + 1] - s.first_key;
    } else {
      s.b = n, s.queries = a.seqlen_q;
      if (a.cache_leftpad.data) s.first_key = std::clamp<int64_t>(a.cache_leftpad[n], 0, a.seqlen_k);
      s.keys = a.seqlen_k - s.first_key;
      if (a.cache_seqlens.data)
        s.offset = std::clamp(a.cache_seqlens[n], a.seqlen_q, a.seqlen_k) - a.seqlen_q - s.first_key;
    }
    const int64_t end = std::min(s.keys, window_start(a, s.offset + s.queries - 1)), first = n * a.num_pivots;
    while (s.pivots < a.num_pivots && a.pivots[first + s.pivots] >= 0 && a.pivots[first + s.pivots] < end) ++s.pivots;
    s.tiles_before = tiles;
    tiles += s.tiles();
  }
  return all;
}

// How many of a sequence's tiles one work item takes: `size`, which share packed tiles, or so few that there are
// `enough` items.
int64_t group_size(const std::vector<Sequence>& all, int64_t heads, int64_t size, int64_t enough) {
  for (; size > 1; size /= 2) {
    int64_t groups = 0;
    for (const Sequence& s : all) groups += ceil_div(s.tiles(), size);
    if (heads * groups >= enough) break;
  }
  return size;
}

// Groups of tiles of every sequence, of which the first-th and then every step-th.
std::vector<Piece> groups_of(const std::vector<Sequence>& all, int64_t size, int64_t first = 0, int64_t step = 1) {
  std::vector<Piece> pieces;
  for (size_t n = 0; n < all.size(); ++n)
    for (int64_t g = first; g * size * kTile < all[n].queries; g += step)
      pieces.push_back({int64_t(n), g, g * size * kTile, std::min((g + 1) * size * kTile, all[n].queries)});
  return pieces;
}

template <class Work>
void sort_by(std::vector<Piece>& pieces, Work work) {
  std::stable_sort(pieces.begin(), pieces.end(), [&](const Piece& x, const Piece& y) { return work(x) > work(y); });
}

struct Work {
  const Host& host;
  std::vector<Sequence> sequences;
  std::vector<Piece> queries;  // those that see most keys first
  ThreeRegionPlan plan{};

  Work(const ThreeRegionAttention& a, const Host& host) : host(host), sequences(sequences_of(a)) {
    plan.problem = a;
    plan.sequences = sequences.data();
    plan.scratch = scratch(host, COGVIEW_PICK(tile_scratch)(a.dtype, a.head_dim));
  }
  void cut_queries() {
    queries = groups_of(sequences, group_size(sequences, plan.problem.heads, 16, 4 * host.threads));
    sort_by(queries, [](const Piece& x) { return x.end; });
  }
  void run(void (*kernel)(const ThreeRegionPlan&, int64_t, int64_t, int), const std::vector<Piece>& pieces,
           int64_t heads) {
    plan.pieces = pieces.data();
    run_items(host, kernel, plan, int64_t(pieces.size()) * heads);
  }
};

void run_forward(Work& work) {
  work.cut_queries();
  work.run(COGVIEW_PICK(three_region_tiles_fwd), work.queries, work.plan.problem.heads);
}

// Of the pivots' gradients. Sums take less memory than query, key and value.
std::vector<Piece> chunks_of(const ThreeRegionAttention& a, std::vector<Sequence>& all, int64_t* sums) {
  std::vector<Piece> pieces;
  for (size_t n = 0; n < all.size(); ++n) {
    Sequence& s = all[n];
    if (s.pivots == 0) continue;
    const int64_t most = std::max<int64_t>(1, s.queries / (2 * a.num_pivots + 1));
    const int64_t share = kEnough * s.queries / (a.batch * a.seqlen_q * a.kv_heads);
    s.chunks = std::clamp<int64_t>(share, 1, most), s.sums_before = *sums;
    *sums += a.kv_heads * s.chunks * s.pivots;
    for (int64_t c = 0; c < s.chunks; ++c)
      pieces.push_back({int64_t(n), c, c * s.tiles() / s.chunks * kTile,
                        std::min((c + 1) * s.tiles() / s.chunks * kTile, s.queries)});
  }
  sort_by(pieces, [](const Piece& x) { return x.end; });
  return pieces;
}

}  // namespace

void three_region_fwd(const ThreeRegionAttention& a, const Host& host) {
  Work work(a, host);
  run_forward(work);
}

// The backward is a sequence of launches in which no two items add to the same dq: pivots by chunks of queries, then
// every colors-th group of key tiles. How they are cut does not depend on threads, so results do not.
void three_region_bwd(const ThreeRegionAttention& a, const Host& host) {
  Work work(a, host);
  ThreeRegionPlan& plan = work.plan;
  work.cut_queries();
  int64_t tiles = 0, longest = 0, sums = 0;
  for (const Sequence& s : work.sequences) tiles += s.tiles(), longest = std::max(longest, s.queries);
  const std::vector<Piece> chunks = chunks_of(a, work.sequences, &sums);
  const int64_t size = accumulator_bytes(a.dtype);
  plan.delta = host.memory(a.batch * a.heads * a.seqlen_q * size);
  plan.dq_sums = host.memory(a.heads * tiles * dq_tile_size(a) * size);
  for (void** parts : {&plan.pivot_dk, &plan.pivot_dv}) *parts = host.memory(sums * a.head_dim * size);
  plan.key_group = group_size(work.sequences, a.kv_heads, 4, kEnough);
  work.run(COGVIEW_PICK(three_region_prepare), work.queries, a.heads);
  work.run(COGVIEW_PICK(three_region_grad_pivot), chunks, a.kv_heads);
  // groups of one color are so far apart that no query has two of them in its window
  const int64_t window = std::min(a.block_size * a.window_blocks, longest);
  const int64_t colors = 1 + ceil_div(window, plan.key_group * kTile);
  for (int64_t color = 0; color < colors; ++color) {
    std::vector<Piece> keys = groups_of(work.sequences, plan.key_group, color, colors);
    sort_by(keys,
            [&](const Piece& x) { return std::min(x.end - 1 + window, work.sequences[x.sequence].queries) - x.begin; });
    work.run(COGVIEW_PICK(three_region_grad_key), keys, a.kv_heads);
  }
  work.run(COGVIEW_PICK(three_region_finish), work.queries, a.heads);
}

void three_region_decode(const ThreeRegionAttention& a, const Host& host) {
  Work work(a, host);
  if (a.seqlen_q > kTile) return run_forward(work);  // a prompt
  // heads that share keys together, but enough items for all threads
  const int64_t group = a.heads / a.kv_heads, parts = ceil_div(host.threads, a.batch * a.kv_heads);
  work.plan.decode_heads = std::clamp<int64_t>(group / parts, 1, kTile / a.seqlen_q);
  run_items(host, COGVIEW_PICK(three_region_rows), work.plan,
            a.batch * a.kv_heads * ceil_div(group, work.plan.decode_heads));
}

}  // namespace cogview
