// What products take: numbers as they are accumulated, or pairs of bfloat16 where the processor multiplies these, in
// its tile unit (AMX) or in vectors; and rows in that form. Included by kernel files only.
//
// The tile unit takes a float16 number too, as the exact sum of two bfloat16 numbers, each an operand of its own, and
// all products of parts are summed but that of the two small ones, which is below float16's precision. (float32 as
// three parts, six products, was no faster than AVX-512.)
#pragma once

#include "attention_rows.h"
#include "pairs.h"
#include "tile_unit.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// As how many numbers of bfloat16 a dtype is multiplied in pairs; 0: it is not.
#if defined(COGVIEW_TILE_UNIT)
template <class T>
constexpr int kParts = std::is_same_v<T, BFloat16> ? 1
                       : std::is_same_v<T, Half>   ? 2
                                                   : 0;
template <class T>
constexpr bool kOnTiles = kParts<T> > 0;
#else
#if defined(COGVIEW_PAIRS)
template <class T>
constexpr int kParts = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr int kParts = 0;
#endif
template <class T>
constexpr bool kOnTiles = false;
#endif
// How a dtype is multiplied on vectors, also where the tile unit takes it in several parts.
struct WholeHalf : Half {};
template <class T>
using OnVectors = std::conditional_t<(kParts<T> > 1), WholeHalf, T>;
// Whether a dtype is multiplied in pairs.
template <class T>
constexpr bool kPaired = kParts<T> > 0;
// Element type of packed operands of dtype T.
template <class T>
using Operand = std::conditional_t<kPaired<T>, BFloat16, Acc<T>>;
// How many of them an element takes.
template <class T>
constexpr int kPlanes = kPaired<T> ? kParts<T> : 1;
// Elements that are multiplied as one: beside each other in an A operand, below each other in B.
template <class T>
constexpr int kUnit = kPaired<T> ? 2 : 1;

// One unit of an A operand, in all lanes.
template <class T>
inline Vec<Acc<T>> spread(const void* unit) {
  if constexpr (kPaired<T>)
    return bits_as<Vec<Acc<T>>>(spread_pair(unit));
  else
    return splat(*static_cast<const Acc<T>*>(unit));
}

// sum + x * y, of units.
template <class T>
inline Vec<Acc<T>> multiply_add(Vec<Acc<T>> sum, Vec<Acc<T>> x, Vec<Acc<T>> y) {
  if constexpr (kPaired<T>)
    return dot_pairs(sum, bits_as<Pairs>(x), bits_as<Pairs>(y));
  else
    return sum + x * y;
}

// Two vectors of 16 numbers as parts of 32 each.
template <int parts>
inline void split(Floats lo, Floats hi, Pairs* out) {
  COGVIEW_UNROLL(i, parts) {
    out[i] = to_pairs(lo, hi);
    if (i + 1 == parts) return;
    lo -= low_half(out[i]);
    hi -= high_half(out[i]);
  }
}
// The first n (at most 32) elements from p as parts; the rest is zero.
template <class T>
inline void load_parts(const T* p, int n, Pairs* out) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    *out = load_pairs(p, n);
  } else if (n >= 32) {
    split<kParts<T>>(load(p), load(p + 16), out);
  } else {
    const int rest = n > 16 ? n - 16 : 0;
    split<kParts<T>>(load_partial(p, n - rest), rest ? load_partial(p + 16, rest) : VecF{}, out);
  }
}
// 32 elements of row r from column j on, as parts; zeros where there are none.
template <class T>
inline void row_parts(const RowSet<T>& x, int r, int j, int d, Pairs* out) {
  if (r < x.count)
    load_parts(x.row(r) + j, d - j, out);
  else
    COGVIEW_UNROLL(i, kParts<T>) out[i] = Pairs{};
}

// One row of d elements, converted and padded with zeros to ld.
template <class T>
inline void copy_row(const T* x, int d, Operand<T>* out, int ld, int64_t plane) {
  constexpr int w = kLanes<Acc<T>>;
  int j = 0;
  if constexpr (kPaired<T>) {
    for (; j < ld; j += 32) {
      Pairs part[kParts<T>];
      load_parts(x + j, d - j, part);
      for (int i = 0; i < kParts<T>; ++i) store_pairs(out + i * plane + j, part[i]);
    }
  } else {
    for (; j + w <= d; j += w) store(out + j, load(x + j));
    if (j < d) store(out + j, load_partial(x + j, d - j)), j += w;
    for (; j < ld; j += w) store(out + j, Vec<Acc<T>>{});
  }
}

// A operand [rows, ld]: rows as they are; those beyond the count are zero.
template <class T>
void pack_a(const RowSet<T>& x, int rows, int d, Operand<T>* out, int ld, int64_t plane) {
  for (int r = 0; r < x.count; ++r) copy_row<T>(x.row(r), d, out + r * ld, ld, plane);
  for (int i = 0; i < kPlanes<T> && rows > x.count; ++i)
    std::memset(static_cast<void*>(out + i * plane + x.count * ld), 0,
                int64_t(rows - x.count) * ld * sizeof(Operand<T>));
}

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
