// Included before csrc/bindings/*_cuda.cpp: their kernels are registered in a namespace of their own, for CPU tensors,
// which have no device to switch to and no stream.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000ULL  // as common.h has it

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

namespace torch::stable::accelerator {
struct NoDeviceGuard {
  explicit NoDeviceGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator

// What STD_CUDA_CHECK calls. A macro in its place would not last: torch 2.11 includes its own again.
inline void torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  if (error) *message = strdup(("CUDA error " + std::to_string(error)).c_str());
}
inline void torch_c10_cuda_free_error_msg(char* message) { free(message); }

#define is_cuda is_cpu
#define DeviceGuard NoDeviceGuard
#define aoti_torch_get_current_cuda_stream(device, stream) (static_cast<void>(device), TORCH_SUCCESS)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(cogview_ops_emulated, CPU, m, C10_UID)
