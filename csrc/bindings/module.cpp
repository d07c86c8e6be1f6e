// Module _C: facts about the build. Importing it loads the library, which registers the kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"

namespace {

std::vector<std::string> supported_names() {
  std::vector<std::string> names;
  for (const cogview::Isa isa : cogview::supported_isas()) names.push_back(cogview::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of cogview_ops";
  m.def("compiler", [] { return std::string(COGVIEW_COMPILER); }, "Compiler and version this was built with");
  m.def("torch_version", [] { return std::string(COGVIEW_TORCH); }, "torch this was built against");
  m.def("cuda_archs", [] { return std::string(COGVIEW_CUDA_ARCHS); }, "CUDA architectures, empty without CUDA");
  m.def("no_cuda", [] { return std::string(COGVIEW_NO_CUDA); }, "Why this has no CUDA part, empty where it has");
  m.def("supported_cpu", &supported_names, "Instruction sets of this build that this processor has");
  m.def("active_cpu", [] { return std::string(cogview::isa_name(cogview::active_isa())); }, "The one in use");
  m.def(
      "force_cpu", [](std::optional<std::string> name) { cogview::force_isa(name ? name->c_str() : nullptr); },
      pybind11::arg("name"), "Use another instruction set from now on; None: the default");
}
