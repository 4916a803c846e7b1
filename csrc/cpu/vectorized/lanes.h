// Vector registers, whatever the instruction set: GCC and Clang lower these vector types to AVX-512, AVX2, or SSE2 /
// NEON. They have the width of a register: of wider ones the compiler takes selects and comparisons apart, value by
// value. Sixteen values make a pack, in one register or several. A pack's lanes are part of the result (they fix the
// order of additions), so their number does not depend on the processor: every machine computes the same bits.
//
// This folder is compiled once per instruction set with ASGA_ISA set to its name. Everything in it has internal
// linkage or lives in that namespace: a function that two objects shared could be linked in its AVX-512 version and
// crash an older processor.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../../quant_math.h"
#include "../storage.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ASGA_INLINE inline __attribute__((always_inline))

namespace asga {
namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kRegisterBytes)));
typedef double Doubles __attribute__((vector_size(kRegisterBytes)));

template <typename V>
constexpr int kWidth = sizeof(V) / sizeof(V{}[0]);
// Registers of a pack.
template <typename V>
constexpr int kRegisters = kLanes / kWidth<V>;

// As many 32-bit and 16-bit integers as `Floats` has floats.
typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t Halves __attribute__((vector_size(kRegisterBytes / 2)));

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

// The floats of 16-bit values as they lie in memory, of the format that the first argument points to.
ASGA_INLINE Floats widen(const BFloat16*, Halves bits) {
  // GCC 12 would take the conversion apart.
#if defined(__AVX512F__)
  const auto words = reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  const auto words = reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
  const Words words = __builtin_convertvector(bits, Words);
#endif
  return reinterpret_cast<Floats>(words << 16);
}

ASGA_INLINE Floats widen(const Half*, Halves bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  Floats value;
  for (int lane = 0; lane < kWidth<Floats>; ++lane) value[lane] = half_to_float(bits[lane]);
  return value;
#endif
}

template <typename scalar_t>
ASGA_INLINE Floats load(const scalar_t* from) {
  static_assert(sizeof(scalar_t) == sizeof(uint16_t));
  Halves bits;
  memcpy(&bits, from, sizeof bits);
  return widen(from, bits);
}

// Values as they lie in memory: what `store` writes.
ASGA_INLINE Floats narrow(const float*, Floats value) { return value; }
ASGA_INLINE Doubles narrow(const double*, Doubles value) { return value; }

ASGA_INLINE Halves narrow(const BFloat16*, Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  const Words kept = value == value ? rounded : Words{} + 0x7fc00000u;  // one NaN for all of them
#if defined(__AVX512F__)
  // The upper half of every word.
  typedef uint16_t Parts __attribute__((vector_size(kRegisterBytes)));
  constexpr Parts kUpper = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i parts = _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(kUpper), reinterpret_cast<__m512i>(kept));
  return reinterpret_cast<Halves>(_mm512_castsi512_si256(parts));
#elif defined(__AVX2__)
  // GCC 12 would take this conversion apart.
  const __m256i words = reinterpret_cast<__m256i>(kept >> 16);
  return reinterpret_cast<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
  return __builtin_convertvector(kept >> 16, Halves);
#endif
}

ASGA_INLINE Halves narrow(const Half*, Floats value) {
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  Halves bits;
  for (int lane = 0; lane < kWidth<Floats>; ++lane) bits[lane] = float_to_half(value[lane]);
  return bits;
#endif
}

// Past the caches, for results that are too large to be found in them again. `to` lies on a multiple of the size of the
// value. A fence has to follow before another thread reads.
template <typename Value>
ASGA_INLINE void write_past_caches(void* to, Value value) {
#if defined(__x86_64__)
  if constexpr (sizeof(Value) == 8) {
    _mm_stream_si64(static_cast<long long*>(to), reinterpret_cast<long long>(value));
    return;
  } else if constexpr (sizeof(Value) == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(value));
  }
#if defined(__AVX2__)
  else if constexpr (sizeof(Value) == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
  }
#endif
#if defined(__AVX512F__)
  else {
    return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
  }
#endif
#endif
  memcpy(to, &value, sizeof value);
}

ASGA_INLINE void fence_writes() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <bool kPastCaches = false, typename scalar_t, typename V>
ASGA_INLINE void store(scalar_t* to, V value) {
  const auto bits = narrow(to, value);
  if constexpr (kPastCaches)
    write_past_caches(to, bits);
  else
    memcpy(to, &bits, sizeof bits);
}

// The first `count` < width values; the other lanes repeat the first of them, so that they never produce a NaN or an
// infinity that the row does not have.
template <typename scalar_t>
ASGA_INLINE vector_t<scalar_t> load_some(const scalar_t* from, int count) {
  constexpr int kCount = kWidth<vector_t<scalar_t>>;
  scalar_t lanes[kCount];
  for (int lane = 0; lane < kCount; ++lane) lanes[lane] = from[lane < count ? lane : 0];
  return load(lanes);
}

template <typename scalar_t, typename V>
ASGA_INLINE void store_some(scalar_t* to, V value, int count) {
  const auto bits = narrow(to, value);
  scalar_t lanes[kWidth<V>];
  memcpy(lanes, &bits, sizeof bits);
  for (int lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
}

#if defined(__AVX512F__)
ASGA_INLINE __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

ASGA_INLINE Floats load_some(const float* from, int count) {
  return reinterpret_cast<Floats>(_mm512_mask_loadu_ps(_mm512_set1_ps(*from), first_lanes(count), from));
}

ASGA_INLINE Halves load_some_bits(const void* from, int count) {
  int16_t first;
  memcpy(&first, from, sizeof first);
  return reinterpret_cast<Halves>(_mm256_mask_loadu_epi16(_mm256_set1_epi16(first), first_lanes(count), from));
}

ASGA_INLINE void store_some_bits(void* to, Halves bits, int count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), reinterpret_cast<__m256i>(bits));
}

ASGA_INLINE void store_some(float* to, Floats value, int count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), reinterpret_cast<__m512>(value));
}
#elif defined(__AVX2__)
ASGA_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

ASGA_INLINE Floats load_some(const float* from, int count) {
  const __m256i mask = first_lanes(count);
  const __m256 loaded = _mm256_maskload_ps(from, mask);
  return reinterpret_cast<Floats>(_mm256_blendv_ps(_mm256_set1_ps(*from), loaded, _mm256_castsi256_ps(mask)));
}

ASGA_INLINE void store_some(float* to, Floats value, int count) {
  _mm256_maskstore_ps(to, first_lanes(count), reinterpret_cast<__m256>(value));
}

// AVX2 has no masks for 16 bits. Up to four values go in one 64-bit word: a register loaded from a copy made value by
// value would wait for those stores.
ASGA_INLINE uint64_t load_word(const char* from, int count) {
  uint64_t word = 0;
  if (count >= 4) {
    memcpy(&word, from, 8);
    return word;
  }
  uint16_t last = 0;
  if (count & 1) memcpy(&last, from + (count & 2) * 2, 2);
  if ((count & 2) == 0) return last;
  uint32_t two;
  memcpy(&two, from, 4);
  return static_cast<uint64_t>(last) << 32 | two;
}

ASGA_INLINE void store_word(char* to, uint64_t word, int count) {
  if (count >= 4) {
    memcpy(to, &word, 8);
    return;
  }
  if (count & 2) {
    memcpy(to, &word, 4);
    to += 4;
    word >>= 32;
  }
  if (count & 1) memcpy(to, &word, 2);
}

ASGA_INLINE Halves load_some_bits(const void* from, int count) {
  uint16_t first;
  memcpy(&first, from, sizeof first);
  const char* at = static_cast<const char*>(from);
  uint64_t low = first * 0x0001000100010001u, high = low;
  if (count >= 4)
    low = load_word(at, 4);
  else
    low = low << 16 * count | load_word(at, count);
  if (count >= 8)
    high = load_word(at + 8, 4);
  else if (count > 4)
    high = high << 16 * (count - 4) | load_word(at + 8, count - 4);
  return reinterpret_cast<Halves>(_mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low)));
}

ASGA_INLINE void store_some_bits(void* to, Halves bits, int count) {
  const __m128i both = reinterpret_cast<__m128i>(bits);
  char* at = static_cast<char*>(to);
  store_word(at, static_cast<uint64_t>(_mm_cvtsi128_si64(both)), count);
  if (count > 4) store_word(at + 8, static_cast<uint64_t>(_mm_extract_epi64(both, 1)), count - 4);
}
#endif

#if defined(__AVX2__)
ASGA_INLINE Floats load_some(const BFloat16* from, int count) { return widen(from, load_some_bits(from, count)); }
ASGA_INLINE Floats load_some(const Half* from, int count) { return widen(from, load_some_bits(from, count)); }

ASGA_INLINE void store_some(BFloat16* to, Floats value, int count) { store_some_bits(to, narrow(to, value), count); }
ASGA_INLINE void store_some(Half* to, Floats value, int count) { store_some_bits(to, narrow(to, value), count); }
#endif

// `value` in the first `count` lanes, zero in the others.
template <typename V>
ASGA_INLINE V keep_some(V value, int count) {
  for (int lane = count; lane < kWidth<V>; ++lane) value[lane] = 0;
  return value;
}

#if defined(__AVX512F__)
ASGA_INLINE Floats keep_some(Floats value, int count) {
  return reinterpret_cast<Floats>(_mm512_maskz_mov_ps(first_lanes(count), reinterpret_cast<__m512>(value)));
}
#elif defined(__AVX2__)
ASGA_INLINE Floats keep_some(Floats value, int count) {
  return reinterpret_cast<Floats>(
      _mm256_and_ps(_mm256_castsi256_ps(first_lanes(count)), reinterpret_cast<__m256>(value)));
}
#endif

// The parameter of a pack: one for all of its lanes, or a column of a table for each.
template <bool kColumns, typename V, typename compute>
ASGA_INLINE V parameter(const compute* table, int part) {
  if constexpr (kColumns)
    return load(table + part * kWidth<V>);
  else
    return *table - V{};  // not 0 + x, which the compiler must compute: it would turn -0 into 0
}

// Register by register: what the compiler makes of memcpy stalls on its own stores.
template <typename V, int kRows, int kColumns>
ASGA_INLINE void copy_registers(V (&to)[kRows][kColumns], const V (&from)[kRows][kColumns]) {
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column) to[row][column] = from[row][column];
}

// A register of floats as two of doubles.
ASGA_INLINE void widen(Floats value, Doubles* to) {
#if defined(__AVX512F__)
  // Not by way of memory, where a part of what has just been stored takes long to load.
  const __m512 floats = reinterpret_cast<__m512>(value);
  to[0] = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_castps512_ps256(floats)));
  to[1] = reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(floats, 1)));
#else
  typedef float HalfFloats __attribute__((vector_size(kRegisterBytes / 2)));
  HalfFloats halves[2];
  memcpy(halves, &value, sizeof value);
  to[0] = __builtin_convertvector(halves[0], Doubles);
  to[1] = __builtin_convertvector(halves[1], Doubles);
#endif
}
ASGA_INLINE void widen(Doubles value, Doubles* to) { *to = value; }

// Sum of the lanes of a pack in double, always in the same order: the halves, their halves ...
template <typename V>
ASGA_INLINE double sum_lanes(const V* parts) {
  constexpr int kParts = kRegisters<Doubles>;
  Doubles sums[kParts];
  for (int r = 0; r < kRegisters<V>; ++r) widen(parts[r], sums + r * (kParts / kRegisters<V>));
  for (int half = kParts / 2; half > 0; half /= 2)
    for (int r = 0; r < half; ++r) sums[r] += sums[r + half];
  double lanes[kWidth<Doubles>];
  memcpy(lanes, sums, sizeof lanes);
  for (int half = kWidth<Doubles> / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <typename V>
ASGA_INLINE void add_lanes(double* to, const V* parts, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane)
    to[lane] += static_cast<double>(parts[lane / kWidth<V>][lane % kWidth<V>]);
}

}  // namespace

template <>
struct RoundingConstant<Floats> : RoundingConstant<float> {};
template <>
struct RoundingConstant<Doubles> : RoundingConstant<double> {};

}  // namespace asga
