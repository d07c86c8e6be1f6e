// Preloaded, it is the only instruction set there is: COGVIEW_ISA, whose kernels are compiled beside this file, and the
// planners with it, which pick no other. The extension's functions of the same names give way.
#include <cstring>
#include <stdexcept>

#include <cpu/isa.h>

#define COGVIEW_QUOTED(x) #x
#define COGVIEW_QUOTE(x) COGVIEW_QUOTED(x)
#define COGVIEW_ISA_NAME COGVIEW_QUOTE(COGVIEW_ISA)

namespace cogview {

std::vector<Isa> supported_isas() { return {Isa::COGVIEW_ISA}; }
Isa active_isa() { return Isa::COGVIEW_ISA; }
void force_isa(const char* name) {
  if (name && std::strcmp(name, COGVIEW_ISA_NAME))
    throw std::runtime_error(COGVIEW_ISA_NAME " is emulated, no other is there");
}

}  // namespace cogview

#undef COGVIEW_PICK
#define COGVIEW_PICK(function) (&::cogview::COGVIEW_ISA::function)
#include <cpu/linear_decode_plan.cpp>
#include <cpu/local_attention_2d_plan.cpp>
#include <cpu/three_region_attention_plan.cpp>
