// y = x weight^T + bias for few rows of x: what takes time is to read the weight once.
//
// Memory. Each thread reads its outputs' rows of the weight from front to end, some rows at a time, and asks for the
// next ones meanwhile. They are used from where they lie for 8, 4, 2 or 1 rows of x (16 on the tile unit), of which a
// first pass has made what is multiplied: accumulators, pairs of bfloat16 or blocks of them; int8 becomes accumulators
// as it is read. Further rows of x read the same rows of the weight from cache. An output is summed up in the same
// order whatever the number of rows: no row depends on the others.
#include "linear_decode.h"

#include "loops.h"
#include "operands.h"
#include "tile_gemm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// How a dtype is multiplied with int8: as accumulators.
struct WholeBFloat16 : BFloat16 {};
template <class T>
using Unpaired = std::conditional_t<std::is_same_v<T, BFloat16>, WholeBFloat16, OnVectors<T>>;

// Elements of a vector of units.
template <class T>
constexpr int kStep = kPaired<T> ? 32 : kLanes<Acc<T>>;

// A weight's elements, of type W, as they are multiplied by T.
template <class T, class W>
inline Vec<Acc<T>> units(const W* p) {
  if constexpr (kPaired<T>)
    return bits_as<Vec<Acc<T>>>(load_pairs(p));
  else
    return load(p);
}
template <class T, class W>
inline Vec<Acc<T>> units(const W* p, int n) {
  if constexpr (kPaired<T>)
    return bits_as<Vec<Acc<T>>>(load_pairs(p, n));
  else
    return load_partial(p, n);
}
template <class T>
inline Vec<Acc<T>> units(const int8_t* p) {
#if defined(__AVX512F__)  // GCC 12 makes halves of a conversion
  if constexpr (sizeof(Acc<T>) == 4)
    return bits_as<VecF>(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  if constexpr (sizeof(Acc<T>) == 4)
    return bits_as<VecF>(
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#endif
  typedef int8_t Bytes __attribute__((vector_size(kLanes<Acc<T>>)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec<Acc<T>>);
}
template <class T>
inline Vec<Acc<T>> units(const int8_t* p, int n) {
  int8_t bytes[kLanes<Acc<T>>] = {};
  std::memcpy(bytes, p, size_t(n));
  return units<T>(bytes);
}

// M rows of x from `row` on, N outputs from n on.
template <class T, class W, int M, int N>
inline void products(const LinearPlan& a, int64_t row, int64_t n) {
  using A = Acc<T>;
  constexpr int step = kStep<T>;
  const W *w[N], *weight = static_cast<const W*>(a.weight) + n * a.weight_stride;
  const Operand<T>* x[M];
  COGVIEW_UNROLL(i, N) w[i] = weight + i * a.weight_stride;
  COGVIEW_UNROLL(r, M)
    x[r] = reinterpret_cast<const Operand<T>*>(static_cast<const char*>(a.packed) + (row + r) * a.packed_bytes);
  Vec<A> acc[M][N];
  COGVIEW_UNROLL(r, M)
    COGVIEW_UNROLL(i, N) acc[r][i] = Vec<A>{};
  const auto add = [&](int64_t j, auto&& of) {
    Vec<A> y[M];
    COGVIEW_UNROLL(r, M) std::memcpy(&y[r], x[r] + j, sizeof y[r]);
    COGVIEW_UNROLL(i, N) {
      const Vec<A> v = of(w[i] + j);
      COGVIEW_UNROLL(r, M) acc[r][i] = multiply_add<T>(acc[r][i], v, y[r]);
    }
  };
  int64_t j = 0;
  for (; j + step <= a.in; j += step)
    add(j, [&](const W* p) {
      __builtin_prefetch(p + N * a.weight_stride);
      return units<T>(p);
    });
  if (j < a.in) add(j, [&](const W* p) { return units<T>(p, int(a.in - j)); });
  COGVIEW_UNROLL(r, M) {
    T* y = static_cast<T*>(a.y) + (row + r) * a.out + n;
    COGVIEW_UNROLL(i, N) {
      A total = hsum(acc[r][i]);
      if (a.scale) total *= static_cast<const A*>(a.scale)[n + i];
      if (a.bias) total += load_partial(static_cast<const T*>(a.bias) + n + i, 1)[0];
      store_partial(y + i, splat(total), 1);
    }
  }
}

// Outputs [n, end) of M rows, N at a time.
template <class T, class W, int M, int N>
inline void outputs(const LinearPlan& a, int64_t row, int64_t n, int64_t end) {
  for (; n + N <= end; n += N) products<T, W, M, N>(a, row, n);
  for (; n < end; ++n) products<T, W, M, 1>(a, row, n);
}

#if defined(COGVIEW_TILE_UNIT)
// On the tile unit a group of rows is blocks of 32 x 16 elements, pairs of its rows' elements beside each other; rows
// that are not there are zeros.
void pack_blocks(const LinearPlan& a, int64_t group, BFloat16* out) {
  for (int64_t j = 0; j < a.in; j += 32, out += kBlock) {
    Pairs x[kRows] = {};
    for (int64_t r = 0, row = group * kRows; r < kRows && row < a.x_rows.count; ++r, ++row)
      x[r] = load_pairs(static_cast<const BFloat16*>(a.x) + a.x_rows.offset(row) + j, int(a.in - j));
    transpose_pairs(x);
    std::memcpy(static_cast<void*>(out), x, sizeof x);
  }
}

// Outputs from n on, as many as there are, of a group of rows.
void tile_products(const LinearPlan& a, int64_t group, int64_t n) {
  const int64_t stride = a.weight_stride, outs = a.out - n;
  const BFloat16* w = static_cast<const BFloat16*>(a.weight) + n * stride;
  const BFloat16* x = reinterpret_cast<const BFloat16*>(static_cast<char*>(a.packed) + group * a.group_bytes);
  tile_zero<0>();
  for (int64_t j = 0; j < a.in; j += 32, x += kBlock) {
    alignas(64) BFloat16 part[kOutputs * 32];
    const bool whole = outs >= kOutputs && j + 32 <= a.in;
    COGVIEW_UNROLL(i, kOutputs) {
      if (whole)
        __builtin_prefetch(w + (kOutputs + i) * stride + j);
      else
        store_pairs(part + i * 32, i < outs ? load_pairs(w + i * stride + j, int(a.in - j)) : Pairs{});
    }
    whole ? tile_load<4>(w + j, stride * 2) : tile_load<4>(part, 64);
    tile_load<5>(x, 64);
    tile_multiply<0, 4, 5>();
  }
  Vec<float> sums[kOutputs];
  tile_store<0>(sums, 64);
  transpose<float>(sums);
  const int count = int(outs < kOutputs ? outs : kOutputs);
  Vec<float> bias{};
  if (a.bias) bias = load_partial(static_cast<const BFloat16*>(a.bias) + n, count);
  for (int64_t r = 0, row = group * kRows; r < kRows && row < a.x_rows.count; ++r, ++row)
    store_partial(static_cast<BFloat16*>(a.y) + row * a.out + n, sums[r] + bias, count);
}
#endif

template <class T, class W>
void item(const LinearPlan& a, int64_t at) {
  constexpr bool many = kVecBytes == 64;  // registers
  const int64_t n = at * kOutputs, end = n + kOutputs < a.out ? n + kOutputs : a.out, rows = a.x_rows.count;
  int64_t row = 0;
#if defined(COGVIEW_TILE_UNIT)
  if constexpr (kPaired<T>) {
    for (; row < rows; row += kRows) tile_products(a, row / kRows, n);
    return;
  }
#endif
  if constexpr (many)
    for (; row + 8 <= rows; row += 8) outputs<T, W, 8, 2>(a, row, n, end);
  for (; row + 4 <= rows; row += 4) outputs<T, W, 4, many ? 4 : 2>(a, row, n, end);
  for (; row + 2 <= rows; row += 2) outputs<T, W, 2, many ? 8 : 4>(a, row, n, end);
  for (; row < rows; ++row) outputs<T, W, 1, 8>(a, row, n, end);
}

// f(how x is multiplied, an element of the weight).
template <class F>
void by_weight(const LinearPlan& a, F&& f) {
  by_dtype(a.dtype, [&](auto x) {
    using T = decltype(x);
    if (a.scale)
      f(Unpaired<T>{}, int8_t{});
    else
      f(OnVectors<T>{}, OnVectors<T>{});
  });
}

}  // namespace

void linear_decode_pack(const LinearPlan& a, int64_t begin, int64_t end, int) {
  by_weight(a, [&](auto x, auto) {
    using T = decltype(x);
    const int in = int(a.in), padded = (in + kStep<T> - 1) / kStep<T> * kStep<T>;
#if defined(COGVIEW_TILE_UNIT)
    if constexpr (kPaired<T>) {
      for (int64_t i = begin; i < end; ++i)
        pack_blocks(a, i, reinterpret_cast<BFloat16*>(static_cast<char*>(a.packed) + i * a.group_bytes));
      return;
    }
#endif
    for (int64_t i = begin * kRows; i < end * kRows && i < a.x_rows.count; ++i)
      copy_row<T>(static_cast<const T*>(a.x) + a.x_rows.offset(i), in,
                  reinterpret_cast<Operand<T>*>(static_cast<char*>(a.packed) + i * a.packed_bytes), padded, 0);
  });
}
void linear_decode_products(const LinearPlan& a, int64_t begin, int64_t end, int) {
  [[maybe_unused]] const AmxScope tiles;
  by_weight(a, [&](auto x, auto w) {
    for (int64_t i = begin; i < end; ++i) item<decltype(x), decltype(w)>(a, i);
  });
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
