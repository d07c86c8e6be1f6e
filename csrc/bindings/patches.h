// How 2D local attention cuts its grids into strips or patches and those into work.
#pragma once

#include <algorithm>
#include <vector>

#include "../cpu/local_attention_2d.h"

namespace cogview {
namespace {

// Sum over the pieces of `rows` along an axis of how many pieces of `columns` their windows meet.
int64_t meetings(const Axis& axis, int64_t rows, Cut columns) {
  int64_t sum = 0;
  for (int64_t first = 0; first < axis.queries; first += rows)
    sum += columns.pieces(axis.windows({first, std::min(first + rows, axis.queries)})).size();
  return sum;
}

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

// Shapes of query and key patches, both 2^n by 64 / 2^n cells, for the least work. The engine multiplies the strips of
// 16 queries by the halves of 32 keys that meet; a patch costs about as much as 8 of those, packing keys as 4.
void choose_patches(const Axis& y, const Axis& x, Patches* queries, Patches* keys) {
  struct Best {
    Cut cut;
    int64_t strips, patches;
  };
  const auto best = [](const Axis& axis, int64_t strip, int64_t patch, int64_t half, int64_t size) {
    Best b{};
    for (const int64_t offset : {int64_t(0), axis.radius % size}) {
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
Grid choose_colors(const LocalArgs& a, const Patches& p, bool coarse) {
  Grid most{1, 1};
  for (int64_t n = 0; n < a.phases(); ++n) {
    const Phase phase(a, n);
    const Axis &y = coarse ? phase.coarse_y : phase.y, &x = coarse ? phase.coarse_x : phase.x;
    most.h = std::max(most.h, colors(y, p.y, p.backward.h, a.queries.y));
    most.w = std::max(most.w, colors(x, p.x, p.backward.w, a.queries.x));
  }
  return most;
}

}  // namespace
}  // namespace cogview
