// erff and expf for whole vectors.
#pragma once
#include <cmath>

// glibc has vector forms of these, exact to 4 units in the last place, but declares them under -ffast-math alone.
#if defined __x86_64__ && defined __GLIBC__
#if __GLIBC_PREREQ(2, 35)
#pragma omp declare simd notinbranch
extern "C" float erff(float) noexcept;
#pragma omp declare simd notinbranch
extern "C" float expf(float) noexcept;
#endif
#endif
