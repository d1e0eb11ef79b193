// The CPU's operators in C++, where MindSpore 2.8 takes several operators, or one that is slow or keeps memory.
//
// library.py compiles this file, and ldm/ops/cpu/__init__.py makes operators of its functions. The results do not depend on
// the number of threads, to the last bit, so that a training run repeats itself with another number of processors.
#include "attention.h"
#include "norms.h"
#include "pointwise.h"
#include "swap_middle_axes.h"
#include "winograd.h"
