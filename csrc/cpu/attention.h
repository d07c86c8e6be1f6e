// What the attention operators' planners and kernels share.
#pragma once

#include "../attention.h"
#include "isa.h"

namespace cogview {

struct Host;

constexpr int kTile = 64;    // rows and columns of a tile of scores
constexpr int kNarrow = 8;   // rows at most of a kernel that reads keys where they lie
constexpr int kEnough = 32;  // work items for the threads of most machines

COGVIEW_INLINE constexpr int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Each thread's own piece of one allocation.
struct Scratch {
  char* data = nullptr;
  int64_t bytes = 0;
  COGVIEW_INLINE char* of(int slot) const { return data + slot * bytes; }
};

// Accumulators of the gradient of a tile's queries, transposed.
COGVIEW_INLINE int64_t dq_tile_size(const Attention& a) { return ceil_div(a.head_dim, 32) * 32 * kTile; }

// Bytes of scratch that a thread needs for the tile engine, or for Narrow.
COGVIEW_DECLARE(int64_t tile_scratch(Dtype dtype, int64_t head_dim))

}  // namespace cogview
