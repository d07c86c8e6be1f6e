// Three-region attention of packed sequences.
#include "../three_region_launch.cuh"

namespace cogview::cuda {

cudaError_t three_region_varlen_fwd(const ThreeRegionAttention& a, cudaStream_t stream) {
  return run_fwd<true>(a, stream);
}

cudaError_t three_region_varlen_bwd(const ThreeRegionAttention& a, const ThreeRegionScratch& scratch,
                                    cudaStream_t stream) {
  return run_bwd<true>(a, scratch, stream);
}

}  // namespace cogview::cuda
