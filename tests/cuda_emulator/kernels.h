// What the self-tests' kernels share.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <string>

namespace kernels {

__device__ inline float* dynamic() {
  extern __shared__ double memory[];
  return reinterpret_cast<float*>(memory);
}

template <class... P, class... A>
void start(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared, A... arguments) {
  const cudaLaunchConfig_t config{grid, threads, shared, nullptr, nullptr, 0};
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

using Kernel = void (*)(const float*, float*);
template <Kernel kKernel, int kShared = 0, int kThreads = 128>
void one_block(const float* in, float* out) {
  start(kKernel, 1, kThreads, kShared, in, out);
}
extern const std::map<std::string, Kernel> pipelines;

constexpr int kKilobyte = 1024;

}  // namespace kernels
