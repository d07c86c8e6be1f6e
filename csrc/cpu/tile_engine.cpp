#include "tile_engine.h"

namespace cogview {
namespace COGVIEW_ISA {

// GradKey is the hungriest pass.
int64_t tile_scratch(Dtype dtype, int64_t head_dim) {
  const int d = int(head_dim);
  switch (dtype) {
    case Dtype::f64:
      return GradKey<double>::bytes(d);
    case Dtype::f32:
      return GradKey<float>::bytes(d);
    case Dtype::bf16:
      return GradKey<BFloat16>::bytes(d);
    default:
      return GradKey<Half>::bytes(d);
  }
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
