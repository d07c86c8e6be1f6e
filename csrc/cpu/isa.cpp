#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// There only where tests/amx_emulator.cpp is preloaded.
extern "C" __attribute__((weak)) void cogview_emulates_amx();

namespace cogview {
namespace {

const char* const kNames[kNumIsas] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

// Linux hands out the tile registers on request, once per process.
bool request_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool detect(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("x86-64-v3");
    case Isa::avx512:
      return __builtin_cpu_supports("x86-64-v4");
    case Isa::avx512bf16:
      return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
    case Isa::amx: {
      static const bool granted =
          detect(Isa::avx512bf16) &&
          (__builtin_cpu_supports("amx-bf16") ? request_amx() : cogview_emulates_amx != nullptr);
      return granted;
    }
  }
#endif
  return isa == Isa::baseline;
}

Isa best() {
  for (int i = kNumIsas - 1; i > 0; --i)
    if (detect(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return Isa::baseline;
}

Isa parse(const char* name) {
  for (int i = 0; i < kNumIsas; ++i)
    if (!std::strcmp(name, kNames[i])) {
      if (detect(static_cast<Isa>(i))) return static_cast<Isa>(i);
      throw std::runtime_error(std::string("COGVIEW_OPS_CPU: this processor does not support '") + name + "'");
    }
  throw std::runtime_error(std::string("COGVIEW_OPS_CPU: expected baseline, avx2, avx512, avx512bf16 or amx, got '") +
                           name + "'");
}

std::atomic<int> g_active{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }
bool isa_supported(Isa isa) { return detect(isa); }

void force_isa(const char* name) { g_active = name ? static_cast<int>(parse(name)) : -1; }

Isa active_isa() {
  int isa = g_active;
  if (isa < 0) {
    const char* name = std::getenv("COGVIEW_OPS_CPU");
    isa = static_cast<int>(name && *name ? parse(name) : best());
    g_active = isa;
  }
  return static_cast<Isa>(isa);
}

}  // namespace cogview
