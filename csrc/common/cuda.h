// The CUDA language and its types: of the toolkit, or of the emulator (tests/simt) when a CUDA source
// is compiled as host C++ with STATESCAN_SIMT defined.
#pragma once

#if defined(STATESCAN_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif
