#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cogview {
namespace {

#define COGVIEW_STRING(name, ...) #name,
const char* const kNames[] = {COGVIEW_ISAS(COGVIEW_STRING)};

#if defined(__x86_64__)
// Linux hands out the tile registers on request, once per process.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted =
      __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

std::string names() {
  std::string all;
  const int count = std::size(kNames);
  for (int i = 0; i < count; ++i) all += std::string(i == 0 ? "" : i + 1 < count ? ", " : " or ") + kNames[i];
  return all;
}

Isa parse(const char* name) {
  for (const Isa isa : supported_isas())
    if (!std::strcmp(name, isa_name(isa))) return isa;
  for (const char* known : kNames)
    if (!std::strcmp(name, known))
      throw std::runtime_error(std::string("COGVIEW_OPS_CPU: this processor does not support '") + name + "'");
  throw std::runtime_error("COGVIEW_OPS_CPU: expected " + names() + ", got '" + name + "'");
}

std::atomic<int> g_active{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> supported_isas() {
  std::vector<Isa> all;
  bool supported = true;  // each needs what the ones before it need
#define COGVIEW_TEST(name, flags, needs, ...) \
  supported = supported && (needs);           \
  if (supported) all.push_back(Isa::name);
  COGVIEW_ISAS(COGVIEW_TEST)
  return all;
}

void force_isa(const char* name) { g_active = name ? static_cast<int>(parse(name)) : -1; }

Isa active_isa() {
  int isa = g_active;
  if (isa < 0) {
    const char* name = std::getenv("COGVIEW_OPS_CPU");
    isa = static_cast<int>(name && *name ? parse(name) : supported_isas().back());
    g_active = isa;
  }
  return static_cast<Isa>(isa);
}

}  // namespace cogview
