// The online-softmax tile engine: three-region attention, and local attention where there is a tile unit.
//
// An owner is up to 64 rows whose result is being summed up, a tile up to 64 columns that are packed once and shown to
// every owner of a group that sees them. Two passes: Forward (rows are queries, columns keys) and GradKey (rows are
// keys, columns queries), which sums up the columns' own gradient beside: no atomics, bitwise repeatable. Scores are
// kept in units of log2.
#pragma once

#include "tile_pack.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Scores up to this size need no maximum: 2^s and sums of 2^s times values of up to 2^50 stay inside float's range.
constexpr double kBounded = 60;

// The columns [lo, hi), multiples of 32, of a strip of rows, outside of which its mask has nothing.
struct Part {
  int strip, lo, hi;
};
struct Parts {
  Part at[kTile / kStrip];
  int count = 0;
  Parts(int rows, Mask mask) {
    for (int first = 0; first < rows; first += kStrip) {
      uint64_t any = mask ? 0 : ~uint64_t(0);
      for (int r = first; mask && r < rows && r < first + kStrip; ++r) any |= mask[r];
      if (any) at[count++] = {first / kStrip, uint32_t(any) ? 0 : 32, any >> 32 ? kTile : 32};
    }
  }
};

// What one owner at a time works with: scores s, probabilities p and dout-products dp of two strips, of which one is
// multiplied while the other is in vectors; gradients of scores ds of all strips.
template <class T>
struct Workspace {
  struct Strip {
    Acc<T>*s, *dp;
    Operand<T>* p;
  } strip[2];
  Operand<T>*ds, *ds_pairs;
  static constexpr int64_t plane = kStrip * kTile, ds_plane = kTile * kTile;
  void take(Arena& arena) {
    for (Strip& x : strip) {
      x.s = arena.take<Acc<T>>(plane), x.dp = arena.take<Acc<T>>(plane);
      x.p = arena.take<Operand<T>>(plane * kPlanes<T>);
      // rows that an owner lacks are multiplied too
      if (arena.base) std::memset(static_cast<void*>(x.p), 0, sizeof(*x.p) * plane * kPlanes<T>);
    }
    ds = arena.take<Operand<T>>(ds_plane * kPlanes<T>), ds_pairs = arena.take<Operand<T>>(ds_plane * kPlanes<T>);
    if (arena.base) std::memset(static_cast<void*>(ds), 0, sizeof(*ds) * ds_plane * kPlanes<T>);
  }
};

// What is added to scores, in log2: one number, or vectors (local_bias.h).
template <class A>
struct Uniform {
  A value, most;  // most: its size
  explicit Uniform(double bias) : value(A(bias * kLog2e)), most(std::abs(value)) {}
  A of(int, int) const { return value; }
  void add(int, int, Vec<A>) const {}  // of its gradient
};

// Parts of an owner's rows in a pipeline: while one is in vectors, the products `before` of the next one and `after` of
// the last one are under way, so that no product waits for what has just been written. All are told the part and which
// of the two strips of the workspace it is in; f also a row.
template <class Before, class F, class After>
inline void each_part(const Parts& parts, int rows, Before&& before, F&& f, After&& after) {
  for (int i = 0; i <= parts.count; ++i) {
    if (i == 0 && parts.count) before(parts.at[0], 0);
    if (i + 1 < parts.count) before(parts.at[i + 1], (i + 1) & 1);
    if (i < parts.count) {
      const int first = parts.at[i].strip * kStrip;
      for (int r = first; r < rows && r < first + kStrip; ++r) f(parts.at[i], i & 1, r);
    }
    if (i > 0) after(parts.at[i - 1], (i - 1) & 1);
  }
}

constexpr int kGroup = 16;                  // owners at most
constexpr int kBatch = 32;                  // tiles at most
constexpr int64_t kBatchBytes = 256 << 10;  // what may stay in the L2 cache beside the owners

// Owners that share tiles, in one thread's scratch.
template <class T, template <class> class Engine>
struct Group {
  using Tile = typename Engine<T>::Tile;
  Workspace<T> work;
  Engine<T> owners[kGroup];
  Tile tiles[kBatch];

  Group(Arena arena, int d, int count) {
    work.take(arena);
    for (int i = 0; i < count; ++i) owners[i].take(arena, d);
    const int64_t before = arena.used;
    tiles[0].take(arena, d);
    const int64_t fit = kBatchBytes / (arena.used - before);
    batch_ = int(fit < 4 ? 4 : fit > kBatch ? kBatch : fit);
    for (int i = 1; i < batch_; ++i) tiles[i].take(arena, d);
    bytes_ = arena.used;
  }
  static int64_t bytes(int d) { return Group(Arena{nullptr}, d, kGroup).bytes_; }

  // pack(number, tile) once for each of n tiles, then see(owner, number, tile) by every owner, in the order of numbers.
  template <class Pack, class See>
  void meet(int count, int64_t n, Pack&& pack, See&& see) {
    for (int64_t first = 0; first < n; first += batch_) {
      const int here = int(n - first < batch_ ? n - first : batch_);
      for (int i = 0; i < here; ++i) pack(first + i, tiles[i]);
      for (int o = 0; o < count; ++o)
        for (int i = 0; i < here; ++i) see(owners[o], o, first + i, tiles[i]);
    }
  }

 private:
  int batch_;
  int64_t bytes_;
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
