// Three-region attention on compute capability 9.0: forward by wgmma. instances/three_region_hopper.cu defines these,
// in a build for 9.0a.
#pragma once

#include <cuda_runtime_api.h>

#include "../three_region_attention.h"

namespace cogview::cuda {

// bfloat16 and float16, 64 or 128 columns, rows at multiples of 16 bytes.
bool three_region_hopper_takes(const ThreeRegionAttention& args);
cudaError_t three_region_hopper_fwd(const ThreeRegionAttention& args, cudaStream_t stream);

}  // namespace cogview::cuda
