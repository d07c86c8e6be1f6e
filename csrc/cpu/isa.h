// Run-time choice between the same kernel files compiled for several instruction sets.
#pragma once

#include <cstdint>

namespace cogview {

enum class Isa : int { baseline, avx2, avx512, avx512bf16, amx };
constexpr int kNumIsas = 5;

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this build and this processor
// The best supported one, or what COGVIEW_OPS_CPU names; throws std::runtime_error on an unknown or unsupported name.
Isa active_isa();
void force_isa(const char* name);  // nullptr: back to the default

}  // namespace cogview

#if defined(__x86_64__)
#define COGVIEW_X86(...) __VA_ARGS__
#else
#define COGVIEW_X86(...)
#endif

// Declares a function in every instruction set's namespace.
#define COGVIEW_DECLARE(...)                                                                   \
  namespace baseline {                                                                         \
  __VA_ARGS__;                                                                                 \
  }                                                                                            \
  COGVIEW_X86(                                                                                 \
      namespace avx2 { __VA_ARGS__; } namespace avx512 { __VA_ARGS__; } namespace avx512bf16 { \
        __VA_ARGS__;                                                                           \
      } namespace amx { __VA_ARGS__; })

// `void name(const Args&, begin, end, slot)` does the work items [begin, end) as thread `slot`.
#define COGVIEW_DECLARE_KERNEL(name, Args) COGVIEW_DECLARE(void name(const Args&, int64_t, int64_t, int))

// Picks the active instruction set's kernel. For bindings only: an inline function that the kernel files saw too
// would be compiled for every instruction set, and the linker would keep any one of them.
#define COGVIEW_PICK(name)                                                                                     \
  ([] {                                                                                                        \
    using Kernel = decltype(&::cogview::baseline::name);                                                       \
    static constexpr Kernel table[] = {::cogview::baseline::name COGVIEW_X86(                                  \
        , ::cogview::avx2::name, ::cogview::avx512::name, ::cogview::avx512bf16::name, ::cogview::amx::name)}; \
    return table[static_cast<int>(::cogview::active_isa())];                                                   \
  }())
