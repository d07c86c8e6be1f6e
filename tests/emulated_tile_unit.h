// The tile registers of AMX in plain C++, for csrc/cpu/tile_unit.h (which includes pairs.h) on processors that have
// none; and kernels for the dtypes alone that they multiply, which take half as long to compile.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace cogview {
namespace COGVIEW_ISA {
namespace {

thread_local bool tiles_are_configured = false;
alignas(64) thread_local uint8_t tile_rows[8][16][64];

inline void need_tiles() {
  if (tiles_are_configured) return;
  std::fputs("emulated tile unit: tiles are not configured\n", stderr);
  std::abort();
}

template <int t>
inline void tile_load(const void* p, int64_t stride) {
  need_tiles();
  for (int i = 0; i < 16; ++i) std::memcpy(tile_rows[t][i], static_cast<const char*>(p) + i * stride, 64);
}
template <int t>
inline void tile_store(void* p, int64_t stride) {
  need_tiles();
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(p) + i * stride, tile_rows[t][i], 64);
}
template <int t>
inline void tile_zero() {
  need_tiles();
  std::memset(tile_rows[t], 0, sizeof tile_rows[t]);
}
// As Intel's manual has it: sums of the even and of the odd numbers, added up in the end; denormals are 0.
template <int t, int a, int b>
inline void tile_multiply() {
  static_assert(t != a && t != b && a != b, "the processor refuses one tile twice");
  need_tiles();
  [[maybe_unused]] const FlushToZero flush;
  Floats even_rows[16], odd_rows[16];
  for (int k = 0; k < 16; ++k) {
    const Pairs row = bits_as<Pairs>(tile_rows[b][k]);
    even_rows[k] = even_numbers(row), odd_rows[k] = odd_numbers(row);
  }
  for (int i = 0; i < 16; ++i) {
    const Pairs row = bits_as<Pairs>(tile_rows[a][i]);
    const Floats even_row = even_numbers(row), odd_row = odd_numbers(row);
    Floats even{}, odd{}, sum;
    for (int k = 0; k < 16; ++k) even += even_row[k] * even_rows[k], odd += odd_row[k] * odd_rows[k];
    std::memcpy(&sum, tile_rows[t][i], sizeof sum);
    sum = flushed(sum) + (even + odd);
    std::memcpy(tile_rows[t][i], &sum, sizeof sum);
  }
}

template <class F>
inline auto by_dtype_on_tiles(Dtype dtype, F&& f) {
  if (dtype == Dtype::bf16) return f(BFloat16{});
  if (dtype == Dtype::f16) return f(Half{});
  std::fputs("emulated tile unit: only kernels for bfloat16 and float16 are there\n", stderr);
  std::abort();
}
#define by_dtype by_dtype_on_tiles

struct AmxScope {
  AmxScope() { tiles_are_configured = true, std::memset(tile_rows, 0, sizeof tile_rows); }
  ~AmxScope() { tiles_are_configured = false; }
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
