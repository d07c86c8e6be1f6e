#include "tile_forward.h"
#include "tile_grad_key.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <class T>
int64_t bytes(int d) {
  const int64_t forward = Group<T, Forward>::bytes(d), backward = Group<T, GradKey>::bytes(d);
  return forward > backward ? forward : backward;
}

}  // namespace

int64_t tile_scratch(Dtype dtype, int64_t head_dim) {
  const int d = int(head_dim);
  switch (dtype) {
    case Dtype::f64:
      return bytes<double>(d);
    case Dtype::f32:
      return bytes<float>(d);
    case Dtype::bf16:
      return bytes<BFloat16>(d);
    default:
      return bytes<Half>(d);
  }
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
