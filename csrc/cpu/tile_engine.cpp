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
  return by_dtype(dtype, [&](auto x) { return bytes<decltype(x)>(int(head_dim)); });
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
