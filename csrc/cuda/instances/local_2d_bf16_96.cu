#include "../local_instances.cuh"

COGVIEW_LOCAL_INSTANCES(__nv_bfloat16, 96)
