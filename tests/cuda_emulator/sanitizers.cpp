// The calls that -fsanitize=thread, alignment and bounds compile into kernels, before each access.
#include <algorithm>

#include "block.h"
#include "shadow.h"
#include "wgmma.h"

using namespace cuda_emulator;

namespace {

__attribute__((always_inline)) inline void see(const void* address, size_t bytes, Access access) {
  if (block.current < 0) return;
  if (!shadow::is_shared(address)) {
    if (!wgmma::watched) return;
    block.code = static_cast<char*>(__builtin_return_address(0)) - 1;
    return wgmma::touch_register(address, bytes, access == Access::write);
  }
  block.code = static_cast<char*>(__builtin_return_address(0)) - 1;  // within the call
  shadow::touch(block.current, shadow::offset_of(address), bytes, access);
}

// Layouts of GCC's libubsan.
struct Location {
  const char* file;
  unsigned line, column;
};
struct Type {
  unsigned short kind, info;
  char name[1];
};
struct TypeMismatch {
  Location at;
  const Type* type;
  unsigned char log_alignment, kind;
};
struct OutOfBounds {
  Location at;
  const Type *array, *index;
};

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

#define EACH_SIZE(n)                                                    \
  void __tsan_read##n(void* p) { see(p, n, Access::read); }             \
  void __tsan_write##n(void* p) { see(p, n, Access::write); }           \
  void __tsan_unaligned_read##n(void* p) { see(p, n, Access::read); }   \
  void __tsan_unaligned_write##n(void* p) { see(p, n, Access::write); } \
  void __tsan_volatile_read##n(void* p) { see(p, n, Access::read); }    \
  void __tsan_volatile_write##n(void* p) { see(p, n, Access::write); }
EACH_SIZE(1)
EACH_SIZE(2)
EACH_SIZE(4)
EACH_SIZE(8)
EACH_SIZE(16)

void __tsan_read_range(void* p, size_t n) { see(p, n, Access::read); }
void __tsan_write_range(void* p, size_t n) { see(p, n, Access::write); }

void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* what, void* address) {
  block.code = static_cast<char*>(__builtin_return_address(0)) - 1;
  fail("misaligned access: %s at %p is not at a multiple of %d bytes (%s:%u)", what->type->name, address,
       1 << what->log_alignment, what->at.file, what->at.line);
}
void __ubsan_handle_out_of_bounds_abort(OutOfBounds* what, void* index) {
  block.code = static_cast<char*>(__builtin_return_address(0)) - 1;
  fail("index %lld is beyond %s (%s:%u)", static_cast<long long>(reinterpret_cast<intptr_t>(index)), what->array->name,
       what->at.file, what->at.line);
}
}
