// How functions in headers are marked that kernels of several instruction sets or devices share.
#pragma once

// For what planners and the kernels of every instruction set use: it must not become a function of its own, of which
// the linker would keep any one.
#define COGVIEW_INLINE [[gnu::always_inline]] inline

// For what CUDA kernels use too.
#ifdef __CUDACC__
#define COGVIEW_HOST_DEVICE __host__ __device__
#else
#define COGVIEW_HOST_DEVICE COGVIEW_INLINE
#endif
