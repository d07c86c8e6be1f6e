// Dropout masks from Philox4x32-10, the CPU's (csrc/cpu/philox.h): element i of what a seed drops, in raster order,
// uses word i % 4 of counter i / 4.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cogview::cuda {

__device__ inline void philox(uint64_t seed, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll 1  // of two or more a pack: code that fits
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Bit l: whether element at + l is kept, of up to W.
template <int W>
__device__ uint32_t kept_bits(uint64_t seed, uint32_t threshold, int64_t at) {
  uint64_t bits = 0;  // of whole counters
  const int skip = int(at % 4);
#pragma unroll 1
  for (int q = 0; 4 * q < skip + W; ++q) {
    uint32_t words[4];
    philox(seed, uint64_t(at) / 4 + q, words);
    for (int l = 0; l < 4; ++l) bits |= uint64_t(words[l] >= threshold) << (4 * q + l);
  }
  return uint32_t(bits >> skip) & ((1u << W) - 1);
}

}  // namespace cogview::cuda
