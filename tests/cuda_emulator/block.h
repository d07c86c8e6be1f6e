// The block of threads that runs, as the parts of the emulator see it.
#pragma once

#include <cstdint>
#include <string>

#include "emulator.h"

namespace cuda_emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024, kDefaultShared = 48 * 1024;

enum class State { ready, meeting, at_barrier, at_mbarrier, at_named, exited };

struct Thread {
  void* stack_pointer;
  State state;
  const char* instruction;  // meeting: what, with whom, and this lane's part of it
  unsigned mask;
  void* mine;
};

struct Block {
  Thread threads[kMaxThreads];
  unsigned ready[kMaxThreads / 32];  // lanes of each warp
  int size, running, arrived;        // threads; not exited; at __syncthreads
  int current = -1;                  // thread, -1: none
  std::string failure;               // a fiber's
  void* code;                        // a kernel's, whose last access to shared memory or last error this is
};
extern Block block;

inline void make_ready(int thread) {
  block.threads[thread].state = State::ready;
  block.ready[thread / 32] |= 1u << thread % 32;
}

// Runs all of it: as many threads as block.size, each a call of body(context).
void run_block(void (*body)(void*), void* context);

// Gives way to others until this thread is ready again.
void suspend(State why);

}  // namespace cuda_emulator
