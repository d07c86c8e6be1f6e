// Included before csrc/bindings/*_cuda.cpp: their kernels are registered in a namespace of their own, for CPU tensors,
// which have no device to switch to and no stream.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000ULL  // as common.h has it

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct NoDeviceGuard {
  explicit NoDeviceGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator

#define is_cuda is_cpu
#define DeviceGuard NoDeviceGuard
#define aoti_torch_get_current_cuda_stream(device, stream) (static_cast<void>(device), TORCH_SUCCESS)
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) \
  if (const cudaError_t error = (call)) STD_TORCH_CHECK(false, "CUDA error ", static_cast<int>(error))
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(library##_emulated, CPU, m, C10_UID)
