// Scratch memory, a piece at a time. Included by kernel files only.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch memory handed out in aligned pieces; with a null base it only counts. Under the address sanitizer no piece
// may be left: 64 bytes behind each are poisoned.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class U>
  U* take(int64_t n) {
    U* p = reinterpret_cast<U*>(base + used);
    used += round_up(n * int64_t(sizeof(U)), 64);
#if defined(__SANITIZE_ADDRESS__)
    if (base) ASAN_UNPOISON_MEMORY_REGION(p, n * sizeof(U));
    if (base) ASAN_POISON_MEMORY_REGION(base + used, 64);
    used += 64;
#endif
    return p;
  }
};

}  // namespace
}  // namespace COGVIEW_ISA
}  // namespace cogview
