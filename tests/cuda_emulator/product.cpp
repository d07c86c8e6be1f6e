#include "dynamic_shared.h"

CUDA_EMULATOR_DYNAMIC_SHARED("_ZN7cogview4cuda6memoryE")
