// What every CUDA binding needs: one device, its current stream, and errors of a launch raised.
#pragma once

#include "common.h"  // first: it fixes the ABI's version

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace cogview {

inline void check_same_cuda(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  ": expected on cuda:", like.get_device_index(), " like the other tensors");
}

// Starts `launcher(stream)` on the device of `like`.
template <class Launcher>
void run_cuda(const Tensor& like, Launcher launcher) {
  const auto device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_CUDA_CHECK(launcher(static_cast<cudaStream_t>(stream)));
}

// `launcher(args, items, stream)`.
template <class Args>
void run_cuda(cudaError_t (*launcher)(const Args&, int64_t, cudaStream_t), const Args& args, int64_t items,
              const Tensor& like) {
  run_cuda(like, [&](cudaStream_t stream) { return launcher(args, items, stream); });
}

}  // namespace cogview
