// Sixteen values at a time, whatever the instruction set: GCC and Clang lower these vector types to AVX-512, to two
// AVX2 registers, or to SSE2 / NEON. The number of lanes is part of the result (it fixes the order of additions), so
// it does not depend on the processor: every machine computes the same bits.
//
// This folder is compiled once per instruction set with ASGA_ISA set to its name. Everything in it has internal
// linkage or lives in that namespace: a function that two objects shared could be linked in its AVX-512 version and
// crash an older processor.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../../quant_math.h"
#include "../storage.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace asga {
namespace {

constexpr int kLanes = 16;

// Float32 sums go on in double after this many additions: their error stays near that of one addition.
constexpr int64_t kLongestSum = 512;

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

#define ASGA_INLINE inline __attribute__((always_inline))

// A loop over candidates: with 32 registers all of its constants stay in them; with 16 they come from memory anyway,
// and unrolling would only make the compilation three times longer.
#if defined(__AVX512F__)
#define ASGA_UNROLL _Pragma("GCC unroll 8")
#else
#define ASGA_UNROLL _Pragma("GCC unroll 1")
#endif

// The vector of the type that the arithmetic on a storage type runs in.
template <typename compute>
struct Vector;
template <>
struct Vector<float> {
  using type = Floats;
};
template <>
struct Vector<double> {
  using type = Doubles;
};
template <typename scalar_t>
using vector_t = typename Vector<compute_t<scalar_t>>::type;

ASGA_INLINE float half_to_float(uint16_t half) {
  // Multiplying by 2^112 moves the exponent from half's bias (15) to float's (127), subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000u;  // infinity or NaN
  bits |= static_cast<uint32_t>(half & 0x8000) << 16;
  memcpy(&value, &bits, sizeof value);
  return value;
}

ASGA_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds to 2^16 or more: infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: a multiple of 2^-24
    float absolute;
    memcpy(&absolute, &magnitude, sizeof absolute);
    const float shifted = absolute + 0.5f;  // the sum's last mantissa bit is worth 2^-24: it rounds half to even
    uint32_t shifted_bits;
    memcpy(&shifted_bits, &shifted, sizeof shifted_bits);
    return sign | static_cast<uint16_t>(shifted_bits - 0x3f000000u);
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

ASGA_INLINE Floats load(const float* from) {
  Floats value;
  memcpy(&value, from, sizeof value);
  return value;
}

ASGA_INLINE Doubles load(const double* from) {
  Doubles value;
  memcpy(&value, from, sizeof value);
  return value;
}

ASGA_INLINE Floats load(const BFloat16* from) {
  Halves bits;
  memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

ASGA_INLINE Floats load(const Half* from) {
  Floats value;
#if defined(__AVX512F__)
  value = reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  const __m256 parts[2] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                           _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
  memcpy(&value, parts, sizeof value);
#else
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = half_to_float(from[lane].bits);
#endif
  return value;
}

ASGA_INLINE void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }
ASGA_INLINE void store(double* to, Doubles value) { memcpy(to, &value, sizeof value); }

ASGA_INLINE void store(BFloat16* to, Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  const Words quiet_nan = Words{} + 0x7fc0u;
  const Halves narrow = __builtin_convertvector(value == value ? rounded : quiet_nan, Halves);
  memcpy(to, &narrow, sizeof narrow);
}

ASGA_INLINE void store(Half* to, Floats value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 parts[2];
  memcpy(parts, &value, sizeof value);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane].bits = float_to_half(value[lane]);
#endif
}

// The last `count` < 16 values of a row as a full vector: the missing lanes repeat the first value, so that they never
// produce a NaN or an infinity that the row does not have.
template <typename scalar_t>
ASGA_INLINE void copy_tail(scalar_t* to, const scalar_t* from, int64_t count) {
  for (int64_t lane = 0; lane < kLanes; ++lane) to[lane] = from[lane < count ? lane : 0];
}

template <typename scalar_t>
ASGA_INLINE vector_t<scalar_t> load_tail(const scalar_t* from, int64_t count) {
  scalar_t lanes[kLanes];
  copy_tail(lanes, from, count);
  return load(lanes);
}

// Sum of the lanes in double, always in the same order.
template <typename V>
ASGA_INLINE double sum_lanes(V value) {
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(value[lane]);
  return total;
}

template <typename V>
ASGA_INLINE void add_sums(double* to, V sums, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] += static_cast<double>(sums[lane]);
}

}  // namespace

template <>
struct RoundingConstant<Floats> : RoundingConstant<float> {};
template <>
struct RoundingConstant<Doubles> : RoundingConstant<double> {};

}  // namespace asga
