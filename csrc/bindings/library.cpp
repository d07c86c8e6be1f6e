// The library as others load it: schemas of all operators, so that `torch.ops.load_library` or dlopen are enough, and
// facts about the build, as texts of C. A text that begins with '!' is an error.
#include <exception>
#include <new>
#include <sstream>
#include <string>

#include "../cpu/isa.h"
#include "common.h"

STABLE_TORCH_LIBRARY_FRAGMENT(COGVIEW_OPS_NAMESPACE, m) {
#define COGVIEW_SCHEMA(schema) m.def(schema);
#include "schemas.inc"  // setup.py writes it, from the Python package
#undef COGVIEW_SCHEMA
}

namespace {

template <class Text>
const char* told(Text text) {
  thread_local std::string kept;
  try {
    kept = text();
  } catch (const std::exception& error) {
    kept = std::string("!") + error.what();
  }
  return kept.c_str();
}

std::string supported() {
  std::string names;
  for (const cogview::Isa isa : cogview::supported_isas())
    names += (names.empty() ? "" : " ") + std::string(isa_name(isa));
  return names;
}

}  // namespace

// What compilers of today ask of the system's libraries and older ones lack: the library is for all of manylinux_2_28.
#if defined(__GLIBC__)
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;  // there may be other threads
}
#endif
#if defined(__GLIBCXX__)
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }
#endif

#define COGVIEW_FACT extern "C" __attribute__((visibility("default"))) const char*

COGVIEW_FACT cogview_ops_namespace() { return C10_STRINGIZE(COGVIEW_OPS_NAMESPACE); }
COGVIEW_FACT cogview_ops_compiler() { return COGVIEW_COMPILER; }
COGVIEW_FACT cogview_ops_torch_version() { return COGVIEW_TORCH; }
COGVIEW_FACT cogview_ops_cuda_archs() { return COGVIEW_CUDA_ARCHS; }
COGVIEW_FACT cogview_ops_no_cuda() { return COGVIEW_NO_CUDA; }
COGVIEW_FACT cogview_ops_supported_cpu() { return told(supported); }
COGVIEW_FACT cogview_ops_active_cpu() {
  return told([] { return cogview::isa_name(cogview::active_isa()); });
}
COGVIEW_FACT cogview_ops_force_cpu(const char* name) {
  return told([name] { return cogview::force_isa(name), ""; });
}
