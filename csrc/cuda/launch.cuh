// Launches in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace cogview::cuda {

// Of the current device: 90 is sm_90.
inline cudaError_t compute_capability(int* value) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *value = 10 * major + minor;
  return error;
}

// kernel<<<grid, threads, shared, stream>>>(arguments...) in plain C++, and the error that it left.
template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
                  const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return cudaGetLastError();
}

}  // namespace cogview::cuda
