// Products whose rows are read where they lie.
//
// Sixteen queries are the lanes of vectors. A score needs an element of the query of every lane, which are packed
// beside each other, and one of a key, which goes to all lanes; values are added up the same way with lanes along
// head_dim. So keys and values need no packing, can be picked one by one, and have to be copied only where a dtype has
// no instruction of its own or a row does not fill vectors. bfloat16 is multiplied in pairs of elements that lie beside
// each other, as one 32-bit unit; every other dtype's unit is an accumulator.
#pragma once

#include "operands.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int kQueries = 16;  // lanes
constexpr int kBlockKeys = kVecBytes == 64 ? 8 : kVecBytes == 32 ? 4 : 2;
template <class A>
constexpr int kLaneVecs = kQueries / kLanes<A>;

// What the length of a row has to be a multiple of.
template <class T>
constexpr int kRowPad = kPaired<T> ? 32 : kLanes<Acc<T>>;

// s[i] = the product of key i with every lane's query: `packed` is [units, 16].
template <class T, int M>
inline void dots(const Operand<T>* const* keys, const Acc<T>* packed, int units, Vec<Acc<T>> (*s)[kLaneVecs<Acc<T>>]) {
  using A = Acc<T>;
  constexpr int n = kLaneVecs<A>, l = kLanes<A>, chains = kPaired<T> ? 2 : 1;  // a product of pairs takes longer
  const Operand<T>* key[M];
  COGVIEW_UNROLL(i, M) key[i] = keys[i];
  Vec<A> acc[chains][M][n];
  COGVIEW_UNROLL(c, chains)
    COGVIEW_UNROLL(i, M)
      COGVIEW_UNROLL(v, n) acc[c][i][v] = Vec<A>{};
  for (int u = 0; u < units; u += chains)
    COGVIEW_UNROLL(c, chains) {
      Vec<A> q[n];
      COGVIEW_UNROLL(v, n) q[v] = load(packed + (u + c) * kQueries + v * l);
      COGVIEW_UNROLL(i, M) {
        const Vec<A> x = spread<T>(key[i] + (u + c) * kUnit<T>);
        COGVIEW_UNROLL(v, n) acc[c][i][v] = multiply_add<T>(acc[c][i][v], q[v], x);
      }
    }
  COGVIEW_UNROLL(i, M)
    COGVIEW_UNROLL(v, n) s[i][v] = chains == 2 ? acc[0][i][v] + acc[chains - 1][i][v] : acc[0][i][v];
}

// Units of W vectors from column j on, of the rows that make one.
template <class T, int W>
inline void load_units(const Operand<T>* const* rows, int64_t j, Vec<Acc<T>>* x) {
  if constexpr (kPaired<T>) {
    static_assert(W == 2);
    Pairs pairs[2];
    interleave(load_pairs(rows[0] + j), load_pairs(rows[1] + j), pairs);
    COGVIEW_UNROLL(w, 2) x[w] = bits_as<Vec<Acc<T>>>(pairs[w]);
  } else {
    COGVIEW_UNROLL(w, W) x[w] = load(rows[0] + j + w * kLanes<Acc<T>>);
  }
}

// out[i][j ...] += sum over units u of p[i * across + u * down] * rows u, for M rows and W vectors.
template <class T, int across, int down, int M, int W>
inline void add_products(int units, const Operand<T>* const* rows, int64_t j, const Acc<T>* p, Acc<T>* const* out) {
  using A = Acc<T>;
  Vec<A> acc[M][W];
  COGVIEW_UNROLL(i, M)
    COGVIEW_UNROLL(w, W) acc[i][w] = Vec<A>{};
  for (int u = 0; u < units; ++u) {
    Vec<A> x[W];
    load_units<T, W>(rows + u * kUnit<T>, j, x);
    COGVIEW_UNROLL(i, M) {
      const Vec<A> y = spread<T>(p + i * across + u * down);
      COGVIEW_UNROLL(w, W) acc[i][w] = multiply_add<T>(acc[i][w], x[w], y);
    }
  }
  COGVIEW_UNROLL(i, M)
    COGVIEW_UNROLL(w, W) {
      A* at = out[i] + j + w * kLanes<A>;
      store(at, load(at) + acc[i][w]);
    }
}

// The same for n rows, a multiple of 8, and all of their ld columns.
template <class T, int across, int down>
inline void add_products(int n, int units, const Operand<T>* const* rows, const Acc<T>* p, Acc<T>* const* out,
                         int64_t ld) {
  constexpr int M = kVecBytes == 64 ? 8 : 4, w = kLanes<Acc<T>>;
  for (int i = 0; i < n; i += M) {
    int64_t j = 0;
    for (; j + 2 * w <= ld; j += 2 * w) add_products<T, across, down, M, 2>(units, rows, j, p + i * across, out + i);
    if constexpr (!kPaired<T>)
      if (j < ld) add_products<T, across, down, M, 1>(units, rows, j, p + i * across, out + i);
  }
}

// [16, ld] as [units, 16].
template <class T>
inline void pack_queries(const Operand<T>* rows, int ld, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int w = kLanes<A>;
  const int units = ld / kUnit<T>;
  for (int first = 0; first < kQueries; first += w)
    for (int j = 0; j < units; j += w) {
      Vec<A> r[w];
      COGVIEW_UNROLL(i, w) std::memcpy(&r[i], rows + (first + i) * int64_t(ld) + j * kUnit<T>, sizeof r[i]);
      transpose<A>(r);
      COGVIEW_UNROLL(i, w) store(out + (j + i) * kQueries + first, r[i]);
    }
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
