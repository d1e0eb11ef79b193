// The CPU's operators in C++, where MindSpore 2.8 takes several operators, or one that is slow or keeps memory.
//
// library.py compiles this file, and ldm/ops/cpu/__init__.py makes operators of its functions. The results do not depend on
// the number of threads, to the last bit, so that a training run repeats itself with another number of processors.
#include "attention.h"
#include "linear_unpacked.h"
#include "norms.h"
#include "pointwise.h"
#include "swap_middle_axes.h"
#include "winograd.h"

#ifdef __AVX512BF16__
#include "attention_bf16.h"
#include "conv_bf16.h"
#include "linear_bf16.h"
#include "winograd_bf16.h"
static const char *unit() { return uses_tiles() ? "amx" : "avx512_bf16"; }
#else
static const char *unit() { return ""; }
#endif

// What multiplies bf16: "amx", "avx512_bf16", or "" where the kernels of bf16 are not there.
extern "C" const char *bf16_unit(void) { return unit(); }
