// Preloaded, it is the only instruction set there is: COGVIEW_ISA, whose kernels are compiled beside this file. The
// extension's functions of the same names give way.
#include <cstring>
#include <stdexcept>

#include "../csrc/cpu/isa.h"

namespace cogview {

std::vector<Isa> supported_isas() { return {Isa::COGVIEW_ISA}; }
Isa active_isa() { return Isa::COGVIEW_ISA; }
void force_isa(const char* name) {
  if (name && std::strcmp(name, isa_name(Isa::COGVIEW_ISA))) throw std::runtime_error("it is emulated alone");
}

}  // namespace cogview
