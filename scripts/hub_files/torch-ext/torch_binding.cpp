// kernel-builder loads a library as a module of Python.
#include "registration.h"  // it writes this

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
