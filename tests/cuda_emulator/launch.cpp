// Launches: limits, blocks one after another, failures; and the rest of CUDA's host interface.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>

#include "block.h"
#include "shadow.h"

namespace cuda_emulator {
namespace {

std::mutex one_launch;
std::map<const void*, int> dynamic_limits;  // what cudaFuncSetAttribute has set
std::set<const void*> launched;
uint64_t random_state;
unsigned first_seed;

void check_limits(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const size_t count = size_t(threads.x) * threads.y * threads.z;
  if (count < 1 || count > kMaxThreads || threads.z > 64)
    fail("a block of %u x %u x %u threads", threads.x, threads.y, threads.z);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  const auto set = dynamic_limits.find(kernel);
  const size_t limit = set == dynamic_limits.end() ? kDefaultShared : set->second;
  if (config.dynamicSmemBytes > limit)
    fail("%zu bytes of dynamic shared memory, and the kernel's attribute allows %zu", config.dynamicSmemBytes, limit);
  if (config.numAttrs) fail("launch attributes are not emulated");
}

}  // namespace

void fail(const char* format, ...) {
  char what[512], text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  if (block.current < 0) {
    snprintf(text, sizeof text, "CUDA emulator: %s (seed %u)", what, first_seed);
    throw std::runtime_error(text);
  }
  int used = snprintf(text, sizeof text, "CUDA emulator: %s (block %u %u %u, thread %d, seed %u", what, blockIdx.x,
                      blockIdx.y, blockIdx.z, block.current, first_seed);
  Dl_info library;
  if (block.code && dladdr(block.code, &library))
    used += snprintf(text + used, sizeof text - used, "; code: addr2line -Cfie %s %#tx", library.dli_fname,
                     static_cast<char*>(block.code) - static_cast<char*>(library.dli_fbase));
  snprintf(text + used, sizeof text - used, ")");
  block.failure = text;
  suspend(State::exited);
  abort();
}

void set_seed(unsigned seed) {
  first_seed = seed;
  random_state = seed * 0x9E3779B97F4A7C15u + 1;
}

unsigned random_bits() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state >> 32;
}
unsigned random_below(unsigned n) { return uint64_t(random_bits()) * n >> 32; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (!random_state) {
    const char* seed = getenv("CUDA_EMULATOR_SEED");
    set_seed(seed ? atoi(seed) : 1);
  }
  check_limits(config, kernel);
  launched.insert(kernel);
  gridDim = config.gridDim, blockDim = config.blockDim;
  block.size = blockDim.x * blockDim.y * blockDim.z;
  block.failure.clear();
  struct End {
    ~End() { block.current = -1, shadow::end_launch(); }
  } end;
  shadow::start_launch(config.dynamicSmemBytes);
  const bool backwards = random_below(2);
  const uint64_t x = gridDim.x, y = gridDim.y, blocks = x * y * gridDim.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t n = backwards ? blocks - 1 - i : i;
    blockIdx = {unsigned(n % x), unsigned(n / x % y), unsigned(n / x / y)};
    run_block(body, context);
  }
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > kMaxShared)
    return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(one_launch);
  dynamic_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t blocks_at_once(int* blocks, int threads, size_t dynamic_bytes) {
  *blocks = 1;
  return threads > kMaxThreads || dynamic_bytes > kMaxShared ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace cuda_emulator

// Kernels launched so far, for tests that want to have run them all: up to `room`, and how many there are.
extern "C" __attribute__((visibility("default"))) int cuda_emulator_launched(const void** kernels, int room) {
  const std::lock_guard<std::mutex> lock(cuda_emulator::one_launch);
  int n = 0;
  for (const void* kernel : cuda_emulator::launched)
    if (n++ < room) *kernels++ = kernel;
  return n;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(cuda_emulator::kMaxShared);
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
