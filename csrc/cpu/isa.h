// Run-time choice between the same kernel files compiled for several instruction sets.
#pragma once

#include <cstdint>
#include <vector>

#include "isa_list.h"

namespace cogview {

#define COGVIEW_NAME(name, flags, needs, ...) name,
enum class Isa : int { COGVIEW_ISAS(COGVIEW_NAME) };
#undef COGVIEW_NAME

const char* isa_name(Isa isa);
std::vector<Isa> supported_isas();  // by this build and this processor, the best one last
// The best supported one, or what COGVIEW_OPS_CPU names; throws std::runtime_error on an unknown or unsupported name.
Isa active_isa();
void force_isa(const char* name);  // nullptr: back to the default

}  // namespace cogview

// Declares a function in every instruction set's namespace.
#define COGVIEW_IN_NAMESPACE(name, flags, needs, ...) \
  namespace name {                                    \
  __VA_ARGS__;                                        \
  }
#define COGVIEW_DECLARE(...) COGVIEW_ISAS(COGVIEW_IN_NAMESPACE, __VA_ARGS__)

// `void name(const Plan&, begin, end, slot)` does the work items [begin, end) as thread `slot`.
#define COGVIEW_DECLARE_KERNEL(name, Plan) COGVIEW_DECLARE(void name(const Plan&, int64_t, int64_t, int))

// Picks the active instruction set's function. Not for kernel files: an inline function that they saw too would be
// compiled for every instruction set, and the linker would keep any one of them.
#define COGVIEW_ADDRESS(name, flags, needs, function) ::cogview::name::function,
#define COGVIEW_PICK(function)                                                     \
  ([] {                                                                            \
    using Function = decltype(&::cogview::baseline::function);                     \
    static constexpr Function table[] = {COGVIEW_ISAS(COGVIEW_ADDRESS, function)}; \
    return table[static_cast<int>(::cogview::active_isa())];                       \
  }())
