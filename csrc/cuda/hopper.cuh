// Instructions that only compute capability 9.0 has, and named barriers, behind plain functions: PTX here, for sm_90a;
// on a CPU the functions of the same names in tests/cuda_emulator/include/hopper.h.
#pragma once

#ifndef __CUDACC__
#include <hopper.h>
#else
#include "tensor_cores.cuh"

namespace gpu {

using u64 = uint64_t;

// The compiler moves what it takes for arithmetic on registers across wgmma's fences and waits, which it does not know;
// not across this.
template <int N>
__device__ __forceinline__ void settle(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void settle(u32 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

template <int M, int N>
__device__ __forceinline__ void settle(u32 (&x)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; ++i) settle(x[i]);
}

// clang-format off
#define COGVIEW_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define COGVIEW_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define COGVIEW_SUMS_32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define COGVIEW_SUMS_64 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
// clang-format on

// Numbers of the operands behind the sums.
#define COGVIEW_WGMMA(TYPE, PTX, N, NAMES, SUMS, O0, O1, O2, O3, O4, O5, O6)                                         \
  template <bool kAcrossB, bool kAcrossA>                                                                            \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, bool add, TYPE*) {                          \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, " O2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX \
                 "." PTX " {" NAMES "}, " O0 ", " O1 ", add, 1, 1, " O3 ", " O4 "; }"                                \
                 : SUMS                                                                                              \
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(kAcrossA)), "n"(int(kAcrossB)));                           \
  }                                                                                                                  \
  template <bool kAcrossB>                                                                                           \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], const u32(&a)[4], u64 b, bool add, TYPE*) {               \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, " O5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX \
                 "." PTX " {" NAMES "}, {" O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", add, 1, 1, " O6 "; }"              \
                 : SUMS                                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kAcrossB)));           \
  }
COGVIEW_WGMMA(__nv_bfloat16, "bf16", 64, COGVIEW_NAMES_32, COGVIEW_SUMS_32, "%32", "%33", "%34", "%35", "%36", "%37",
              "%38")
COGVIEW_WGMMA(__half, "f16", 64, COGVIEW_NAMES_32, COGVIEW_SUMS_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
COGVIEW_WGMMA(__nv_bfloat16, "bf16", 128, COGVIEW_NAMES_64, COGVIEW_SUMS_64, "%64", "%65", "%66", "%67", "%68", "%69",
              "%70")
COGVIEW_WGMMA(__half, "f16", 128, COGVIEW_NAMES_64, COGVIEW_SUMS_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
#undef COGVIEW_WGMMA
#undef COGVIEW_NAMES_32
#undef COGVIEW_NAMES_64
#undef COGVIEW_SUMS_32
#undef COGVIEW_SUMS_64

// d = a * b, or += if add: 64 x 16 by 16 x N, a warp group's. kAcross: rows in shared memory run across k.
template <class T, int N, bool kAcrossB, bool kAcrossA = false>
__device__ __forceinline__ void multiply_async(float (&d)[N / 2], u64 a, u64 b, bool add) {
  wgmma<kAcrossB, kAcrossA>(d, a, b, add, static_cast<T*>(nullptr));
}
template <class T, int N, bool kAcrossB>
__device__ __forceinline__ void multiply_async(float (&d)[N / 2], const u32 (&a)[4], u64 b, bool add) {
  wgmma<kAcrossB>(d, a, b, add, static_cast<T*>(nullptr));
}
__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until no more than kLeft groups are in flight; `d` is what may be read then.
template <int kLeft, int N>
__device__ __forceinline__ void multiply_wait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  settle(d);
}

__device__ __forceinline__ u32 max_packed(u32 x, u32 y, __nv_bfloat16*) {
  u32 z;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
__device__ __forceinline__ u32 max_packed(u32 x, u32 y, __half*) {
  u32 z;
  asm("max.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// ptxas moves a wait up over arithmetic that comes before it, not out of a basic block; this ends one.
__device__ __forceinline__ void divide(bool never) {
  if (never) asm volatile("exit;");
}

// What ordinary stores and cp.async have written, as far as this thread knows of it, is there for wgmma.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Of so many threads, those that only arrive among them; id 1 to 15.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace gpu
#endif
