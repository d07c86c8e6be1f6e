// Defines what an `extern __shared__` in a kernel declares, between guards; `symbol` is its mangled name as a string.
// An unnamed namespace's could not be defined elsewhere.
#pragma once

#include "emulator.h"

#define CUDA_EMULATOR_DYNAMIC_SHARED(symbol)                                                        \
  extern "C" {                                                                                      \
  alignas(1024) thread_local char cuda_emulator_dynamic[cuda_emulator::kDynamicGuard + 232 * 1024]; \
  }                                                                                                 \
  asm(".globl " symbol "\n.hidden " symbol "\n.type " symbol ", @tls_object\n.set " symbol          \
      ", cuda_emulator_dynamic + 1024");                                                            \
  cuda_emulator::Span cuda_emulator::dynamic_shared() { return {cuda_emulator_dynamic, sizeof cuda_emulator_dynamic}; }
