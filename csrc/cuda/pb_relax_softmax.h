// PB-relax softmax on CUDA, over all rows.
#pragma once

#include <cuda_runtime_api.h>

#include "../pb_relax_softmax.h"

namespace cogview::cuda {

cudaError_t pb_relax_softmax_fwd(const SoftmaxArgs& args, int64_t rows, cudaStream_t stream);
cudaError_t pb_relax_softmax_bwd(const SoftmaxArgs& args, int64_t rows, cudaStream_t stream);

}  // namespace cogview::cuda
