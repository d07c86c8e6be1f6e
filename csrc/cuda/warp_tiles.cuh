// What a warp does with 16 rows of its own and units of 16 other rows in shared memory: products by tensor cores, an
// online softmax over them, the gradients of scores. Attention kernels differ in where units come from and in masks.
//
// Registers, as mma.m16n8k16 has them: lane l holds rows l / 4 and l / 4 + 8 of its warp; of a unit's scores z[h][e]
// it holds row l / 4 + 8 (e / 2), column 8 h + 2 (l % 4) + e % 2.
#pragma once

#include <cmath>

#include "tensor_cores.cuh"

namespace cogview::cuda {

using gpu::u32;

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Numbers of a call as kernels take them. Base-2 logits are z * factor, plus `bias` where there is one. The scale's
// sign goes into the bits of one side's rows, which are xored with `flip`, so that larger z are larger logits; a scale
// of 0 is one so small that it changes none, but times which an infinite z, of what is hidden, stays infinite.
struct Logits {
  float factor, bias, scale;
  u32 flip;
  Logits(double scale, double bias)
      : factor(fmaxf(fabsf(static_cast<float>(scale)) * kLog2e, 1e-30f)),
        bias(static_cast<float>(bias) * kLog2e),
        scale(static_cast<float>(scale)),
        flip(scale < 0 ? 0x80008000u : 0) {}
};

// 16 rows of D 16-bit elements. Parts of 16 bytes are swizzled: the rows of an 8 x 8 matrix lie in different banks.
template <int D>
struct Unit {
  static_assert(D % 32 == 0);
  static constexpr int kParts = D / 8, kSteps = D / 16, kBytes = 32 * D;
  static constexpr bool kWide = D % 64 == 0;
  __device__ static u32 part(u32 row, u32 part) {
    return 2 * D * row + ((part ^ (kWide ? row & 7 : row >> 1 & 3)) << 4);
  }
  // Where a lane's matrices are: of 16 elements of rows, for the first operand, or transposed for the second one of a
  // sum of rows; and of columns, for the second operand of scores.
  __device__ static u32 rows(u32 lane) { return part(lane % 16, lane / 16); }
  __device__ static u32 columns(u32 lane) { return part(8 * (lane / 16) + lane % 8, lane / 8 % 2); }
};

// Addresses of the matrices of units at 128-byte offsets. kKept: an exclusive or in registers for each of the first.
template <int D, bool kKept = true>
struct Matrices {
  static constexpr int kSpan = Unit<D>::kWide ? 4 : 2;
  u32 at[kKept ? kSpan : 1];
  Matrices() = default;
  __device__ explicit Matrices(u32 first) {
#pragma unroll
    for (int k = 0; k < (kKept ? kSpan : 1); ++k) {
      at[k] = first ^ 32 * k;
      gpu::keep(at[k]);
    }
  }
  // The next 16 elements, k times.
  __device__ u32 operator()(int k, u32 offset) const {
    const u32 first = kKept ? at[k % kSpan] + offset : (at[0] + offset) ^ 32 * (k % kSpan);
    return first + k / kSpan * kSpan * 32;
  }
};

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <int D>
struct Operand {  // the first operand
  u32 x[D / 16][4];
  template <bool kKept>
  __device__ void load(const Matrices<D, kKept>& rows, u32 unit) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) gpu::load_matrices(x[k], rows(k, unit));
  }
  // Of rows in global memory, without shared memory: the lane's two rows, each aligned to 16 bytes; null: zeros.
  __device__ void load_global(const void* row0, const void* row1) {
    const u32 part = 4 * (threadIdx.x % 4);
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const void* row = i % 2 ? row1 : row0;
        x[k][i] = row ? gpu::load_global4(static_cast<const char*>(row) + 32 * k + i / 2 * 16 + part) : 0;
      }
  }
  template <bool kKept>
  __device__ void store(const Matrices<D, kKept>& rows, u32 unit) const {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) gpu::store_matrices(x[k], rows(k, unit));
  }
  __device__ void flip(u32 signs) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[k][i] ^= signs;
  }
};

// The sums over columns of x * y, of the lane's two rows.
template <class T, int D>
__device__ void row_products(float (&sum)[2], const Operand<D>& x, const Operand<D>& y) {
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 a = gpu::unpack(x.x[k][i], static_cast<T*>(nullptr));
      const float2 b = gpu::unpack(y.x[k][i], static_cast<T*>(nullptr));
      sum[i % 2] = fmaf(a.x, b.x, fmaf(a.y, b.y, sum[i % 2]));
    }
  sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
}

// R units of rows of a warp, kept in registers or, where these do not suffice, in shared memory.
template <int D, int R, bool kKept>
struct OwnRows {
  Operand<D> kept[kKept ? R : 1];
  Matrices<D, false> at;  // the first unit's
  // The r-th unit, and where the warp has room for all of them.
  __device__ void set(int r, const Operand<D>& x, u32 room) {
    if constexpr (kKept) {
      kept[r] = x;
    } else {
      at = Matrices<D, false>(room + Unit<D>::rows(threadIdx.x % 32));
      x.store(at, r * Unit<D>::kBytes);
    }
  }
  __device__ void get(u32 (&x)[4], int r, int k) const {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = kept[r].x[k][i];
    } else {
      gpu::load_matrices(x, at(k, r * Unit<D>::kBytes));
    }
  }
};

// z = R units of rows by N units, of which each is loaded once for all rows, plus start(r, n, h, e)
template <class T, int R, int N, int D, bool kKept, bool kKeptAt, class Start>
__device__ void all_scores(float (&z)[R][N][2][4], const OwnRows<D, R, kKept>& rows,
                           const Matrices<D, kKeptAt>& columns, u32 unit, Start start) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    u32 x[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r) rows.get(x[r], r, k);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      u32 y[4];
      gpu::load_matrices(y, columns(k, unit + n * Unit<D>::kBytes));
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (k == 0) {
            const float c[4] = {start(r, n, h, 0), start(r, n, h, 1), start(r, n, h, 2), start(r, n, h, 3)};
            gpu::multiply_add(z[r][n][h], x[r], y[2 * h], y[2 * h + 1], c, static_cast<T*>(nullptr));
          } else {
            gpu::multiply<T>(z[r][n][h], x[r], y[2 * h], y[2 * h + 1]);
          }
        }
    }
  }
}
template <class T, int R, int N, int D, bool kKept, bool kKeptAt>
__device__ void all_scores(float (&z)[R][N][2][4], const OwnRows<D, R, kKept>& rows,
                           const Matrices<D, kKeptAt>& columns, u32 unit) {
  all_scores<T>(z, rows, columns, unit, [](int, int, int, int) { return 0.0f; });
}

// z += x by the unit's rows; kFirst: z =
template <class T, bool kFirst = false, int D, bool kKept>
__device__ void add_scores(float (&z)[2][4], const Operand<D>& x, const Matrices<D, kKept>& columns, u32 unit) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    u32 y[4];
    gpu::load_matrices(y, columns(k, unit));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (kFirst && k == 0)
        gpu::multiply_first<T>(z[h], x.x[k], y[2 * h], y[2 * h + 1]);
      else
        gpu::multiply<T>(z[h], x.x[k], y[2 * h], y[2 * h + 1]);
    }
  }
}

// acc += w by the unit's rows, where w is as pack_scores makes it
template <class T, int N, int D, bool kKept>
__device__ void add_rows(float (&acc)[N][4], const u32 (&w)[4], const Matrices<D, kKept>& rows, u32 unit) {
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    u32 y[4];
    gpu::load_matrices_transposed(y, rows(j, unit));
    gpu::multiply<T>(acc[2 * j], w, y[0], y[1]);
    gpu::multiply<T>(acc[2 * j + 1], w, y[2], y[3]);
  }
}

// The same for R units of rows, whose sums are acc(r): the unit is loaded once for all of them.
template <class T, int D, int R, bool kKept, class Acc>
__device__ void add_rows_of_all(Acc acc, const u32 (&w)[R][4], const Matrices<D, kKept>& rows, u32 unit) {
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    u32 y[4];
    gpu::load_matrices_transposed(y, rows(j, unit));
#pragma unroll
    for (int r = 0; r < R; ++r) {
      gpu::multiply<T>(acc(r)[2 * j], w[r], y[0], y[1]);
      gpu::multiply<T>(acc(r)[2 * j + 1], w[r], y[2], y[3]);
    }
  }
}

template <class T>
__device__ void pack_scores(u32 (&w)[4], const float (&z)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w[i] = gpu::pack_as(z[i / 2][i % 2 * 2], z[i / 2][i % 2 * 2 + 1], static_cast<T*>(nullptr));
}

// acc, times a factor for each of the two rows, to a unit in shared memory
template <class T, int N, int D, bool kKept>
__device__ void store_rows(const float (&acc)[N][4], float factor0, float factor1, const Matrices<D, kKept>& rows,
                           u32 unit) {
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = i % 2 ? factor1 : factor0;
      const float* x = &acc[2 * j + i / 2][i % 2 * 2];
      w[i] = gpu::pack_as(x[0] * factor, x[1] * factor, static_cast<T*>(nullptr));
    }
    gpu::store_matrices(w, rows(j, unit));
  }
}

template <int N>
__device__ void clear(float (&acc)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0;
}

// sum of weights and weighted rows for each of 16 rows; weights are 2^(logit - most). `most` follows the largest logit
// only where that outgrows it by a factor of 2^kLag: most units then cost no rescaling, and sums stay far from
// overflow.
template <int D>
struct Softmax {
  static constexpr float kLag = 8;
  float most[2], sum[2], acc[D / 8][4];

  __device__ void start() {
    most[0] = most[1] = -1e30f, sum[0] = sum[1] = 0;
    clear(acc);
  }
  // N units at once: scores z, whose logits in base 2 are z * scale + bias, become weights as pack_scores makes them,
  // which the caller adds up. `first`: after start(), when there is nothing to scale yet.
  template <class T, int N>
  __device__ void weigh(u32 (&w)[N][4], float (&z)[N][2][4], float scale, float bias, bool first = false) {
    follow(z, scale, bias, first);
#pragma unroll
    for (int u = 0; u < N; ++u) weigh<T>(w[u], z[u], scale, bias);
  }
  // And their rows of values are at these offsets.
  template <class T, int N, bool kKept>
  __device__ void add(float (&z)[N][2][4], float scale, float bias, const Matrices<D, kKept>& rows,
                      const u32 (&values)[N], bool first = false) {
    follow(z, scale, bias, first);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      u32 w[4];
      weigh<T>(w, z[u], scale, bias);
      add_rows<T>(acc, w, rows, values[u]);
    }
  }
  // sums become those of whole rows
  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = quad_sum(sum[r]);
  }
  __device__ float lse(int r) const { return (most[r] + gpu::log2_fast(sum[r])) * kLn2; }

 private:
  template <int N>
  __device__ void follow(const float (&z)[N][2][4], float scale, float bias, bool first) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int u = 0; u < N; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], z[u][h][e]);
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = fmaf(top[r], scale, bias);
    if (!__any_sync(~0u, top[0] > most[0] + kLag || top[1] > most[1] + kLag)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(quad_max(top[r]), most[r]);
      const float factor = gpu::exp2_fast(most[r] - top[r]);
      most[r] = top[r];
      if (first) continue;
      sum[r] *= factor;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) acc[j][2 * r] *= factor, acc[j][2 * r + 1] *= factor;
    }
  }
  template <class T>
  __device__ void weigh(u32 (&w)[4], float (&z)[2][4], float scale, float bias) {
    const float shift[2] = {bias - most[0], bias - most[1]};
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        z[h][e] = gpu::exp2_fast(fmaf(z[h][e], scale, shift[e / 2]));
        sum[e / 2] += z[h][e];
      }
    pack_scores<T>(w, z);
  }
};

// Of a unit's scores z and dp = dout * v - delta: weights p = 2^(z * scale - lse), and the gradients p * dp of logits.
// lse (base 2) is of (half, element): of rows or of columns.
template <class T, class Lse>
__device__ void grad_scores(u32 (&p)[4], u32 (&ds)[4], float (&z)[2][4], float (&dp)[2][4], float scale, Lse lse) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      z[h][e] = gpu::exp2_fast(fmaf(z[h][e], scale, -lse(h, e)));
      dp[h][e] *= z[h][e];
    }
  pack_scores<T>(p, z);
  pack_scores<T>(ds, dp);
}

}  // namespace cogview::cuda
