// What setup.py tells a build, for kernel-builder's: build.toml includes it before each binding.
#pragma once
#include <torch/headeronly/version.h>
#undef TORCH_TARGET_VERSION  // csrc/bindings/common.h defines it, to what build.toml says
#define COGVIEW_OPS_NAMESPACE TORCH_EXTENSION_NAME
#define COGVIEW_TORCH TORCH_VERSION
#if defined(__clang__)
#define COGVIEW_COMPILER "clang " __VERSION__
#else
#define COGVIEW_COMPILER "g++ " __VERSION__
#endif
#if defined(CUDA_KERNEL)
#define COGVIEW_CUDA_ARCHS "ARCHITECTURES"
#define COGVIEW_NO_CUDA ""
#else
#define COGVIEW_CUDA_ARCHS ""
#define COGVIEW_NO_CUDA "kernel-builder's backend is cpu"
#endif
