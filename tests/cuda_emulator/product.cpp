#include "define_dynamic_shared.h"

CUDA_EMULATOR_DYNAMIC_SHARED(cogview::cuda, memory)
