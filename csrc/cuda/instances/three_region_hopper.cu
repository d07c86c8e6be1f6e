// In a build for 9.0a, of which setup.py tells with COGVIEW_SM_90A.
#ifdef COGVIEW_SM_90A
#include "../three_region_hopper.cuh"
#endif
