// Instructions of tensor cores and asynchronous copies behind plain functions, on the emulator: ldmatrix, stmatrix,
// mma.m16n8k16, cp.async, mbarriers and boxes of the tensor memory accelerator. A u32 is an address in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../async.h"
#include "../shadow.h"

namespace gpu {

using u32 = uint32_t;

inline char* shared_memory() { return cuda_emulator::dynamic_shared().begin + cuda_emulator::kDynamicGuard; }
inline u32 shared_address(const void* p) { return cuda_emulator::shadow::offset_of(p); }

// --- plain accesses: `thread`'s, this one's if none is given -------------------------------------------------------

template <class T>
T load_shared(u32 at, int thread = cuda_emulator::current()) {
  T x;
  cuda_emulator::shadow::load(thread, at, &x, sizeof x);
  return x;
}
template <class T>
void store_shared(u32 at, T x, int thread = cuda_emulator::current()) {
  cuda_emulator::shadow::store(thread, at, &x, sizeof x);
}
inline float2 load_shared_pair(u32 at) { return load_shared<float2>(at); }
inline u32 load_shared4(u32 at) { return load_shared<u32>(at); }
inline uint2 load_shared8(u32 at) { return load_shared<uint2>(at); }
inline uint4 load_shared16(u32 at) { return load_shared<uint4>(at); }
inline void store_shared4(u32 at, u32 x) { store_shared(at, x); }
inline void store_shared16(u32 at, uint4 x) { store_shared(at, x); }

inline int load_global_byte(const unsigned char* p) { return *p; }
inline float load_global_float(const float* p) { return *p; }
inline float2 load_global_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
inline u32 load_global4(const void* p) { return *static_cast<const u32*>(p); }
inline uint4 load_global16(const void* p) { return *static_cast<const uint4*>(p); }
inline void store_global_float(float* p, float x) { *p = x; }
inline void store_global_pair(float* p, float2 x) { *reinterpret_cast<float2*>(p) = x; }
inline void store_global4(void* p, u32 x) { *static_cast<u32*>(p) = x; }
inline void store_global16(void* p, uint4 x) { *static_cast<uint4*>(p) = x; }

// --- matrices: lane 8 i + r gives the address of row r of the i-th 8 x 8 matrix --------------------------------------

struct Counts {
  long multiplications, matrix_loads, bank_conflicts;  // conflicts: instructions whose rows share banks
};
inline Counts counts;

struct MatrixLane {
  u32* r;
  u32 at;
};

inline void count_banks(void* const* lanes, int matrix) {
  unsigned banks = 0;
  for (int i = 0; i < 8; ++i) banks |= 1u << (static_cast<const MatrixLane*>(lanes[8 * matrix + i])->at / 16 % 8);
  counts.bank_conflicts += banks != 255;
}

template <bool kTransposed>
void load_four(const char* name, u32 (&r)[4], u32 at) {
  MatrixLane mine{r, at};
  cuda_emulator::meet(name, ~0u, &mine, [](unsigned, void* const* lanes) {
    ++counts.matrix_loads;
    for (int m = 0; m < 4; ++m) {
      struct alignas(16) Row {
        uint16_t x[8];
      } rows[8];
      count_banks(lanes, m);
      for (int i = 0; i < 8; ++i)
        rows[i] = load_shared<Row>(static_cast<const MatrixLane*>(lanes[8 * m + i])->at,
                                   32 * cuda_emulator::warp() + 8 * m + i);
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, c = l % 4 * 2;
        static_cast<const MatrixLane*>(lanes[l])->r[m] =
            kTransposed ? rows[c].x[g] | u32(rows[c + 1].x[g]) << 16 : rows[g].x[c] | u32(rows[g].x[c + 1]) << 16;
      }
    }
  });
}
inline void load_matrices(u32 (&r)[4], u32 at) { load_four<false>("ldmatrix", r, at); }
inline void load_matrices_transposed(u32 (&r)[4], u32 at) { load_four<true>("ldmatrix.trans", r, at); }

inline void store_matrices(const u32 (&r)[4], u32 at) {
  MatrixLane mine{const_cast<u32*>(r), at};
  cuda_emulator::meet("stmatrix", ~0u, &mine, [](unsigned, void* const* lanes) {
    for (int m = 0; m < 4; ++m) {
      count_banks(lanes, m);
      for (int i = 0; i < 8; ++i) {
        uint4 row;
        u32* to = &row.x;
        for (int c = 0; c < 4; ++c) to[c] = static_cast<const MatrixLane*>(lanes[4 * i + c])->r[m];
        store_shared(static_cast<const MatrixLane*>(lanes[8 * m + i])->at, row, 32 * cuda_emulator::warp() + 8 * m + i);
      }
    }
  });
}

inline float2 unpack(u32 x, __nv_bfloat16*) {
  return {__bfloat162float({uint16_t(x)}), __bfloat162float({uint16_t(x >> 16)})};
}
inline float2 unpack(u32 x, __half*) { return {__half2float({uint16_t(x)}), __half2float({uint16_t(x >> 16)})}; }
inline u32 pack_as(float a, float b, __nv_bfloat16*) {
  return __float2bfloat16_rn(a).bits | u32(__float2bfloat16_rn(b).bits) << 16;
}
inline u32 pack_as(float a, float b, __half*) { return __float2half_rn(a).bits | u32(__float2half_rn(b).bits) << 16; }

// d += a * b, 16 x 16 by 16 x 8
template <class T>
void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct Lane {
    float* d;
    const u32* a;
    u32 b[2];
  } mine{d, a, {b0, b1}};
  cuda_emulator::meet("mma", ~0u, &mine, [](unsigned, void* const* lanes) {
    ++counts.multiplications;
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, c = l % 4 * 2;
      const Lane& lane = *static_cast<const Lane*>(lanes[l]);
      for (int q = 0; q < 4; ++q) {
        const float2 x = unpack(lane.a[q], static_cast<T*>(nullptr));
        a[g + q % 2 * 8][c + q / 2 * 8] = x.x, a[g + q % 2 * 8][c + q / 2 * 8 + 1] = x.y;
      }
      for (int q = 0; q < 2; ++q) {
        const float2 x = unpack(lane.b[q], static_cast<T*>(nullptr));
        b[c + q * 8][g] = x.x, b[c + q * 8 + 1][g] = x.y;
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 4; ++e) {
        const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        static_cast<const Lane*>(lanes[l])->d[e] += sum;
      }
  });
}
template <class T>
void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4], T*) {
  for (int e = 0; e < 4; ++e) d[e] = c[e];
  multiply<T>(d, a, b0, b1);
}
template <class T>
void multiply_first(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  for (float& x : d) x = 0;
  multiply<T>(d, a, b0, b1);
}

// --- asynchronous copies and mbarriers -------------------------------------------------------------------------------

inline void copy16(u32 to, const void* from, bool there) {
  cuda_emulator::async::copy({to, there ? from : nullptr, 16});
}
inline void copy4(u32 to, const void* from, bool there) { cuda_emulator::async::copy({to, there ? from : nullptr, 4}); }
inline void arrive_after_copies(u32 barrier) { cuda_emulator::async::arrive_after_copies(barrier); }

inline void barrier_init(u32 barrier, int count) { cuda_emulator::async::init_barrier(barrier, count); }
inline void barrier_arrive(u32 barrier) { cuda_emulator::async::arrive(barrier); }
inline void arrive_and_expect(u32 barrier, int bytes) { cuda_emulator::async::arrive(barrier, bytes); }
inline void barrier_wait(u32 barrier, u32 parity) { cuda_emulator::async::wait(barrier, parity); }

// A tensor [batch, heads, rows, columns, dim] of 16-bit elements; strides in bytes.
struct TensorMap {
  const char* base;
  int64_t cell, row, head, batch;
  int width, height, dim;
};

// 4 x 4 cells, zeros outside; 16-byte parts are swizzled within 128 bytes, or within 64 where dim is 32.
inline void copy_box(u32 to, const TensorMap& map, int x, int y, int head, int batch, u32 barrier) {
  if (to % 1024) cuda_emulator::fail("a box at offset %u, not a multiple of 1024", to);
  std::vector<cuda_emulator::Copy> copies;
  for (int r = 0; r < 16; ++r)
    for (int part = 0; part < map.dim / 8; ++part) {
      const int yy = y + r / 4, xx = x + r % 4;
      const bool there = yy >= 0 && yy < map.height && xx >= 0 && xx < map.width;
      const char* from = map.base + batch * map.batch + head * map.head + yy * map.row + xx * map.cell + part * 16;
      const u32 at = r * map.dim * 2 + part * 16;
      copies.push_back({to + (at ^ (at >> 7 & (map.dim == 32 ? 3 : 7)) << 4), there ? from : nullptr, 16});
    }
  cuda_emulator::async::copy_and_complete(std::move(copies), barrier);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

template <class T>
void keep(T&) {}
inline int uniform(int x) {
  const int first = __shfl_sync(~0u, x, 0);
  if (x != first) cuda_emulator::fail("uniform: lanes of a warp have %d and %d", first, x);
  return first;
}
inline u32 lanes_where(bool x) { return __ballot_sync(~0u, x); }
inline int count_bits(u32 x) { return __builtin_popcount(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float log2_fast(float x) { return log2f(x); }
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;  // flushed
}

}  // namespace gpu
