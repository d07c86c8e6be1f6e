// Defines what `extern __shared__ double memory[];` in a function of namespace NAMESPACE declares.
#pragma once

#include "emulator.h"

#define CUDA_EMULATOR_DYNAMIC_SHARED(NAMESPACE, memory)                            \
  namespace NAMESPACE {                                                            \
  alignas(1024) thread_local double memory[227 * 1024 / 8 + 512];                  \
  }                                                                                \
  cuda_emulator::Span cuda_emulator::dynamic_shared() {                            \
    return {reinterpret_cast<char*>(NAMESPACE::memory), sizeof NAMESPACE::memory}; \
  }
