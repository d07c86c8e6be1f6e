// What 2D local attention runs of 9 x 9 windows and heads of 64 without a choice: alone, since all instances of
// csrc/cuda/instances take minutes.
#include "../csrc/cuda/local_backward.cuh"
#include "../csrc/cuda/local_forward.cuh"

namespace cogview::cuda {
namespace {
template __global__ void local_forward<__nv_bfloat16, 64, 3, 1, false, false, false>(
    const __grid_constant__ ForwardArgs);
template __global__ void local_backward<__nv_bfloat16, 64, false, false, false>(const __grid_constant__ BackwardArgs);
template __global__ void local_backward<__nv_bfloat16, 64, true, false, false>(const __grid_constant__ BackwardArgs);
}  // namespace
}  // namespace cogview::cuda
