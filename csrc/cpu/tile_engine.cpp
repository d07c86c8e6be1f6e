#include "narrow.h"
#include "tile_forward.h"
#include "tile_grad_key.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <class T>
int64_t bytes(int d) {
  const int64_t needs[] = {Group<T, Forward>::bytes(d), Group<T, GradKey>::bytes(d), Narrow<T>::bytes(d)};
  int64_t most = 0;
  for (const int64_t need : needs) most = need > most ? need : most;
  return most;
}

}  // namespace

int64_t tile_scratch(Dtype dtype, int64_t head_dim) {
  return by_dtype(dtype, [&](auto x) { return bytes<decltype(x)>(int(head_dim)); });
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
