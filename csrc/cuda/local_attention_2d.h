// 2D local attention on CUDA: bfloat16 and float16, head_dim 32, 64, 96 or 128, all rows aligned to 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "local_plan.h"

namespace cogview::cuda {

// Whether kernels can be run as it was chosen.
bool local_takes(const LocalAttention& a, Pass pass, const StripChoice& choice);

cudaError_t local_fwd(const LocalAttention& a, const StripChoice& choice, cudaStream_t stream);

// Bytes of scratch, aligned to 16, that the backward takes.
cudaError_t local_bwd_scratch(const LocalAttention& a, int64_t* bytes);
cudaError_t local_bwd(const LocalAttention& a, void* scratch, const StripChoices& choices, cudaStream_t stream);

}  // namespace cogview::cuda
