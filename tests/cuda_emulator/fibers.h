// Stacks to run on, and the switch between them: x86-64, System V. What the ABI lets a call change is not kept, nor is
// the floating-point environment, which nothing here changes; there must be no shadow stack (-fcf-protection=none).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

// Goes on at `load`, a stack pointer that an earlier call has stored to *save.
extern "C" void cuda_emulator_switch(void** save, void* load);

namespace cuda_emulator {

class Stacks {
 public:
  static constexpr size_t kBytes = 1 << 16, kGuard = 1 << 12;  // below each stack: running over it ends the process

  explicit Stacks(int count) : bytes_(count * (kBytes + kGuard)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulator: no memory for stacks");
    memory_ = static_cast<char*>(memory);
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * (kBytes + kGuard), kGuard, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, bytes_); }
  Stacks(const Stacks&) = delete;

  // The stack pointer of stack i before its first switch, which calls entry().
  void* start(int i, void (*entry)()) const {
    void** top = reinterpret_cast<void**>(memory_ + (i + 1) * (kBytes + kGuard));
    *--top = nullptr;  // entry does not return
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    return top;
  }

 private:
  size_t bytes_;
  char* memory_;
};

}  // namespace cuda_emulator
