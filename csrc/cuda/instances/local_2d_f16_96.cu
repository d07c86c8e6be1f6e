#include "../local_instances.cuh"

COGVIEW_LOCAL_INSTANCES(__half, 96)
