// The tile unit: eight registers of 16 rows of 64 bytes, and products of two into a third. Where there is none, tests
// define COGVIEW_TILE_UNIT as the file that emulates it. Included by kernel files only.
#pragma once

#include <cstdint>

#if defined(__AMX_BF16__)
#include <immintrin.h>

#define COGVIEW_TILE_UNIT
namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Tile instructions with the register as a template argument; GCC's intrinsics want literals, and tell the compiler
// nothing about the memory they read and write.
template <int t>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t, int a, int b>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(t), "i"(a), "i"(b));
}

// Tile registers set to 16 rows of 64 bytes, for the life of this object.
struct AmxScope {
  AmxScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));  // the intrinsic tells of its first bytes only
  }
  ~AmxScope() { _tile_release(); }
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview

#elif defined(COGVIEW_TILE_UNIT)
#include "pairs.h"
#include COGVIEW_TILE_UNIT
#else

namespace cogview {
namespace COGVIEW_ISA {
namespace {

struct AmxScope {
  ~AmxScope() {}
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
#endif
