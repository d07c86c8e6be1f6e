// Instructions of tensor cores and asynchronous copies behind plain functions: PTX here, for sm_80 and later; on a CPU
// the functions of the same names in tests/cuda_emulator/include/tensor_cores.h. A u32 is an address in shared memory.
#pragma once

// On devices before sm_80 kernels of these are empty; launches say that they are not supported.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define COGVIEW_BEFORE_SM_80
#define COGVIEW_SM_80(...)
#else
#define COGVIEW_SM_80(...) __VA_ARGS__
#endif

#ifndef __CUDACC__
#include <tensor_cores.h>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace gpu {

using u32 = uint32_t;

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared[];
  return dynamic_shared;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// --- plain accesses --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float2 load_shared_pair(u32 at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ u32 load_shared4(u32 at) {
  u32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ uint2 load_shared8(u32 at) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ uint4 load_shared16(u32 at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared4(u32 at, u32 x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared16(u32 at, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

__device__ __forceinline__ int load_global_byte(const unsigned char* p) { return __ldg(p); }
__device__ __forceinline__ float load_global_float(const float* p) { return __ldg(p); }
__device__ __forceinline__ float2 load_global_pair(const float* p) { return __ldg(reinterpret_cast<const float2*>(p)); }
__device__ __forceinline__ u32 load_global4(const void* p) { return __ldg(static_cast<const u32*>(p)); }
__device__ __forceinline__ uint4 load_global16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ void store_global_float(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_global_pair(float* p, float2 x) { *reinterpret_cast<float2*>(p) = x; }
__device__ __forceinline__ void store_global4(void* p, u32 x) { *static_cast<u32*>(p) = x; }
__device__ __forceinline__ void store_global16(void* p, uint4 x) { *static_cast<uint4*>(p) = x; }

// --- matrices: lane 8 i + r gives the address of row r of the i-th 8 x 8 matrix --------------------------------------

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void store_matrices(const u32 (&r)[4], u32 at) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
#else
  const u32 lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) store_shared4(__shfl_sync(~0u, at, 8 * i + lane / 4) + 4 * (lane % 4), r[i]);
#endif
}

__device__ __forceinline__ float2 unpack(u32 x, __nv_bfloat16*) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u)};
}
__device__ __forceinline__ float2 unpack(u32 x, __half*) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
__device__ __forceinline__ u32 pack_as(float a, float b, __nv_bfloat16*) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
__device__ __forceinline__ u32 pack_as(float a, float b, __half*) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

// d = a * b + c, 16 x 16 by 16 x 8
#define COGVIEW_MULTIPLY(TYPE, PTX)                                                                                  \
  __device__ __forceinline__ void multiply_add(float (&d)[4], const u32(&a)[4], u32 b0, u32 b1, const float (&c)[4], \
                                               TYPE*) {                                                              \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX                                                         \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                   \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
  }
COGVIEW_MULTIPLY(__nv_bfloat16, "bf16")
COGVIEW_MULTIPLY(__half, "f16")
#undef COGVIEW_MULTIPLY
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_add(d, a, b0, b1, d, static_cast<T*>(nullptr));
}
template <class T>
__device__ __forceinline__ void multiply_first(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const float zero[4] = {};
  multiply_add(d, a, b0, b1, zero, static_cast<T*>(nullptr));
}

// --- asynchronous copies and mbarriers -------------------------------------------------------------------------------

__device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {  // zeros if not there
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra done; bra again; done: }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred p; again: mbarrier.test_wait.parity.shared.b64 p, [%0], %1; @p bra done; bra again; done: }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#endif
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// Keeps the compiler from computing a value again where it is used.
__device__ __forceinline__ void keep(u32& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(float& x) { asm volatile("" : "+f"(x)); }
// What is the same in all lanes of a warp, in one of the registers that a warp has for that.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(~0u, x); }
#else
int uniform(int x);
#endif
__device__ __forceinline__ u32 lanes_where(bool x) { return __ballot_sync(~0u, x); }
__device__ __forceinline__ int count_bits(u32 x) { return __popc(x); }
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace gpu
#endif
