// exp and erf that loops can compute for whole vectors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// glibc has vector forms of these for x86-64, exact to 4 units in the last place, but declares them under -ffast-math alone.
// g++ calls what is declared like this, clang does not. (The tests define POLYNOMIALS.)
#if defined __x86_64__ && defined __GLIBC__ && !defined __clang__ && !defined POLYNOMIALS
#if __GLIBC_PREREQ(2, 35)
#define GLIBC_VECTORS
#pragma omp declare simd notinbranch
extern "C" float erff(float) noexcept;
#pragma omp declare simd notinbranch
extern "C" float expf(float) noexcept;
#endif
#endif

namespace {

#ifdef GLIBC_VECTORS

float exponential(float x) { return expf(x); }
float error_function(float x) { return erff(x); }

#else

// g++ computes these for whole vectors if it calls them, clang if it does not.
#ifdef __clang__
#define FOR_VECTORS
#else
#define FOR_VECTORS _Pragma("omp declare simd notinbranch") __attribute__((noinline))
#endif

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// condition ? yes : no, of which g++ would make a branch, and no vectors
float choose(bool condition, float yes, float no) {
  uint32_t mask = -uint32_t(condition);
  return from_bits((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

// 2^n, for n from -126 to 127
float power_of_two(int32_t n) { return from_bits(uint32_t(n + 127) << 23); }

// exp(n ln 2 + r) = 2^n exp(r), exact to 1 unit in the last place. The polynomial's largest relative error for |r| <= ln 2 / 2
// is the least possible, 3e-9. Results below 1.2e-38, which processors are slow at, are 0.
FOR_VECTORS float exponential(float x) {
  float y = choose(x > 89, 89, x);  // whose exponential is infinite; NaN stays NaN
  y = choose(y < -87.33f, -87.33f, y);
  const float to_integer = 12582912;  // 1.5 * 2^23: adding it rounds to a whole number, which is in the last bits
  float shifted = y * float(M_LOG2E) + to_integer, whole = shifted - to_integer;
  float r = (y - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts, so that the first product is exact
  float p = 0.00138144672f;
  p = p * r + 0.00836878084f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1;
  int32_t n = int32_t(bits_of(shifted) - bits_of(to_integer));
  float value = p * power_of_two(n >> 1) * power_of_two(n - (n >> 1));  // 2^128 is too large for one factor
  return choose(x < -87.33f, 0, value);
}

// x P(x^2) up to 1, and 1 - exp(-Q(x)) beyond, exact to 3 units in the last place. The polynomials' largest errors are the
// least possible, 1e-9.
FOR_VECTORS float error_function(float x) {
  float a = std::fabs(x), z = a * a;
  a = choose(a > 4, 4, a);  // where erf is 1; NaN stays NaN
  float p = 7.85385782e-5f;
  p = p * z - 0.000801019254f;
  p = p * z + 0.00518832775f;
  p = p * z - 0.026853811f;
  p = p * z + 0.112835854f;
  p = p * z - 0.37612626f;
  p = p * z + 1.12837911f;
  float q = -0.000185573968f;
  q = q * a + 0.00293960702f;
  q = q * a - 0.0218053162f;
  q = q * a + 0.103037365f;
  q = q * a + 0.638225675f;
  q = q * a + 1.12704003f;
  q = q * a + 0.00035371995f;
  return std::copysign(choose(a < 1, a * p, 1 - exponential(-q)), x);
}

#endif

}  // namespace
