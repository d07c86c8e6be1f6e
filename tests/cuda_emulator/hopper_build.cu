// For nvcc, not for the emulator: the forward for compute capability 9.0 by itself.
#include "../../csrc/cuda/three_region_hopper.cuh"

cudaError_t forward(const cogview::ThreeRegionAttention& args, cudaStream_t stream) {
  return cogview::cuda::three_region_hopper_fwd(args, stream);
}
