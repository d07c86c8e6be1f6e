// The instruction sets that the kernels of csrc/cpu are compiled for, each one more than the one before it:
// X(name, flags of the compiler, what the processor has, ...). setup.py reads names and flags here.
#pragma once

#if defined(__x86_64__)
#define COGVIEW_ISAS(X, ...)                                                                                \
  X(baseline, "", true, __VA_ARGS__)                                                                        \
  X(avx2, "-march=x86-64-v3", __builtin_cpu_supports("x86-64-v3"), __VA_ARGS__)                             \
  X(avx512, "-march=x86-64-v4 -mprefer-vector-width=512", __builtin_cpu_supports("x86-64-v4"), __VA_ARGS__) \
  X(avx512bf16, "-mavx512bf16", __builtin_cpu_supports("avx512bf16"), __VA_ARGS__)                          \
  X(amx, "-mamx-tile -mamx-bf16", has_amx(), __VA_ARGS__)
#else
#define COGVIEW_ISAS(X, ...) X(baseline, "", true, __VA_ARGS__)
#endif
