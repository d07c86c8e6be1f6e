// float16 with CUDA's conversions: to nearest, ties to even, every NaN to the same one.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3FF;
  float y;
  if (exponent == 0) {
    y = float(mantissa) * 0x1p-24f;  // exact
    return sign ? -y : y;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  memcpy(&y, &bits, sizeof y);
  return y;
}

inline __half __float2half_rn(float x) {
  if (x != x) return {0x7FFF};
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7FFFFFFF;
  if (bits >= 0x477FF000) return {uint16_t(sign | 0x7C00)};  // 65520 and above
  if (bits < 0x38800000) {                                   // below the normal range: the sum's last bit is 2^-24
    float y;
    memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    uint32_t sum;
    memcpy(&sum, &y, sizeof sum);
    return {uint16_t(sign | (sum - 0x3F000000))};
  }
  return {uint16_t(sign | (bits + 0xFFF + (bits >> 13 & 1) - (112u << 23)) >> 13)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
