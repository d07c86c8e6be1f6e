// A GPU on the CPU, for tests: threads are fibers, warps run in random order, and what a GPU would leave undefined is
// an error: races on shared memory, lanes that part at a warp's instruction, barriers that not all threads reach.
//
// This is what the headers in include/ ask of it. Kernels are compiled with GCC's -fsanitize=thread,alignment,bounds
// but not linked with its run-time libraries: the calls that the compiler puts before each access come to
// sanitizers.cpp. Needs x86-64 with the System V calling convention, ELF and g++ (see fibers.h, launch.cpp).
#pragma once

#include <cuda_runtime_api.h>

// Of the fiber that runs, set by the scheduler.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

// Ends the launch with std::runtime_error. From a fiber too: the launch throws it, and fibers are dropped as they are.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned random_bits();
unsigned random_below(unsigned n);
void set_seed(unsigned seed);  // of all that is random; at first CUDA_EMULATOR_SEED or 1

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context);

int current();  // thread of the block, of the fiber that runs
int lane();
int warp();

// Waits until all lanes of `mask` are at the same instruction. The last one calls act(mask, lanes), where lanes[l] is
// lane l's `mine`; lanes that do not exist are not waited for.
using Act = void (*)(unsigned mask, void* const* lanes);
void meet(const char* instruction, unsigned mask, void* mine, Act act);

void synchronize_warp(unsigned mask);
void synchronize_block();
void synchronize_named(int barrier, int threads, bool waits);  // bar.sync or bar.arrive
void before_atomic(const void* address, size_t bytes);

// Dynamic shared memory of the calling thread with a guard before and one behind; dynamic_shared.h defines it.
struct Span {
  char* begin;
  size_t bytes;
};
constexpr size_t kDynamicGuard = 1024;
Span dynamic_shared();

template <class T>
T shuffle(const char* instruction, unsigned mask, T value, int from) {
  struct Lane {
    T in, out;
    int from;
    const char* instruction;
  } mine{value, value, from, instruction};
  meet(instruction, mask, &mine, [](unsigned mask, void* const* lanes) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Lane& to = *static_cast<Lane*>(lanes[l]);
      if (!(mask >> to.from & 1))
        fail("%s: lane %d reads lane %d, which is not in mask %08x", to.instruction, l, to.from, mask);
      to.out = static_cast<const Lane*>(lanes[to.from])->in;
    }
  });
  return mine.out;
}

template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* to, F change) {
  before_atomic(to, sizeof *to);
  const T old = *to;
  *to = change(old);
  return old;
}

}  // namespace cuda_emulator
