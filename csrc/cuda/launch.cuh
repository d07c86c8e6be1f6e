// Launches in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace cogview::cuda {

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
