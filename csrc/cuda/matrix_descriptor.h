// How wgmma is told where a matrix of 16-bit elements lies in shared memory: the 64-bit matrix descriptor of the PTX
// ISA. Its unit is a core matrix of 8 rows of 16 bytes.
#pragma once

#include <cstdint>

#include "../inline.h"

namespace cogview::cuda {

// Rows of 128, 64 or 32 bytes, 8 of which are a pattern within which parts of 16 bytes are swizzled: bits 4 to 6 (5; 4)
// of an address in shared memory are xored with bits 7 to 9 (8; 7). kNone: core matrices of 128 contiguous bytes.
enum class Swizzle : uint64_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// Bytes, multiples of 16. What `stride` and `leading` are, with k the index that is summed over:
//   rows run along k:        stride to the next 8 rows; leading to the next 8 k, only without swizzling
//   rows run across k:       stride to the next 8 k; leading to the next row's width across
//   the same, not swizzled:  stride to the next 8 across; leading to the next 8 k
COGVIEW_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t at, uint32_t leading, uint32_t stride,
                                                         Swizzle swizzle) {
  return uint64_t((at & 0x3FFFF) >> 4) | uint64_t((leading & 0x3FFFF) >> 4) << 16 |
         uint64_t((stride & 0x3FFFF) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

}  // namespace cogview::cuda
