// Loops over the elements of a row, one vector at a time. Included by kernel files only.
#pragma once

#include <type_traits>

#include "vec.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// How many elements of a vector exist: all of them, known to the compiler, or the n of a row's end.
template <class A>
using Whole = std::integral_constant<int, kLanes<A>>;

template <class T, class N>
inline Vec<Acc<T>> load(const T* p, N n) {
  if constexpr (std::is_same_v<N, int>)
    return load_partial(p, n);
  else
    return load(p);
}
template <class T, class N>
inline void put(T* p, Vec<Acc<T>> v, N n) {
  if constexpr (std::is_same_v<N, int>)
    store_partial(p, v, n);
  else
    store(p, v);
}

// The first n lanes, then zeros.
template <class A, class N>
inline Vec<A> first(Vec<A> v, N n) {
  if constexpr (std::is_same_v<N, int>)
    return select_bits<A>((uint64_t(1) << n) - 1, v, A(0));
  else
    return v;
}

// As T has it.
template <class T>
inline Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, Acc<T>>) return v;
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  return load(buffer);
}

// f(column, how many) for every vector of n columns.
template <class A, class F>
inline void each(int64_t n, F&& f) {
  constexpr int w = kLanes<A>;
  int64_t j = 0;
  for (; j + w <= n; j += w) f(j, Whole<A>{});
  if (j < n) f(j, int(n - j));
}

// The same with f(column, how many, accumulators): K vectors of which there are several copies, so that one need not
// wait for another.
constexpr int kCopies = 4;
template <class A, int K, int C, class F>
inline void accumulate(int64_t n, Vec<A> (&acc)[C][K], F&& f) {
  constexpr int w = kLanes<A>;
  int64_t j = 0;
  for (; j + C * w <= n; j += C * w)
    for (int c = 0; c < C; ++c) f(j + c * w, Whole<A>{}, acc[c]);
  for (; j + w <= n; j += w) f(j, Whole<A>{}, acc[0]);
  if (j < n) f(j, int(n - j), acc[1]);
}
template <class A, int K>
struct Totals {
  A at[K];
};
template <class A, int K, int C = kCopies, class F>
inline Totals<A, K> sums(int64_t n, F&& f) {
  static_assert(C == 2 || C == 4);
  Vec<A> acc[C][K] = {};
  accumulate<A>(n, acc, f);
  Totals<A, K> total;
  for (int k = 0; k < K; ++k) {
    Vec<A> sum = acc[0][k] + acc[1][k];
    if constexpr (C == 4) sum += acc[2][k] + acc[3][k];
    total.at[k] = hsum(sum);
  }
  return total;
}

// Copies a row in whole cache lines around the caches, its ends through them.
template <class T>
inline void stream_row(T* to, const T* from, int64_t n) {
  constexpr int64_t line = 64;
  char* p = reinterpret_cast<char*>(to);
  const char* q = reinterpret_cast<const char*>(from);
  const int64_t bytes = n * int64_t(sizeof(T)), head = -reinterpret_cast<uintptr_t>(p) & (line - 1);
  if (bytes < head + line) return static_cast<void>(std::memcpy(p, q, size_t(bytes)));
  std::memcpy(p, q, size_t(head));
  int64_t at = head;
  for (; at + line <= bytes; at += line)
    for (int64_t k = 0; k < line; k += kVecBytes) {
      VecU32 v;
      std::memcpy(&v, q + at + k, sizeof v);
      stream(p + at + k, v);
    }
  std::memcpy(p + at, q + at, size_t(bytes - at));
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
