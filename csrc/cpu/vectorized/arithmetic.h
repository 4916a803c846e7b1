// Arithmetic for which some processors have better instructions than the compiler finds. The results have the same bits
// with every instruction set.
#pragma once

#include "lanes.h"

namespace asga {
namespace {

// a + b on the units that multiply, rounded once as any sum: where additions, comparisons, minima and maxima share the
// other units (AMD), these have room. Without a fused multiply-add, or where one unit does it all, it is an addition.
template <typename V>
ASGA_INLINE V add_by_fma(V a, V b) {
  return a + b;
}

template <typename V>
ASGA_INLINE V subtract_by_fma(V a, V b) {
  return a - b;
}

#if defined(__AVX512F__)
ASGA_INLINE Floats add_by_fma(Floats a, Floats b) {
  return reinterpret_cast<Floats>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), _mm512_set1_ps(1.0f), reinterpret_cast<__m512>(b)));
}

ASGA_INLINE Floats subtract_by_fma(Floats a, Floats b) {
  return reinterpret_cast<Floats>(
      _mm512_fmsub_ps(reinterpret_cast<__m512>(a), _mm512_set1_ps(1.0f), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__) && defined(__FMA__)
ASGA_INLINE Floats add_by_fma(Floats a, Floats b) {
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), _mm256_set1_ps(1.0f), reinterpret_cast<__m256>(b)));
}

ASGA_INLINE Floats subtract_by_fma(Floats a, Floats b) {
  return reinterpret_cast<Floats>(
      _mm256_fmsub_ps(reinterpret_cast<__m256>(a), _mm256_set1_ps(1.0f), reinterpret_cast<__m256>(b)));
}
#endif

// `to` plus or minus `value` in the lanes where a equals b.
template <typename V>
ASGA_INLINE V add_if_equal(V a, V b, V value, V to) {
  return to + if_equal(a, b, value);
}

template <typename V>
ASGA_INLINE V subtract_if_equal(V a, V b, V value, V to) {
  return to - if_equal(a, b, value);
}

// `to` plus `value` in the other lanes.
template <typename V>
ASGA_INLINE V add_if_not_equal(V a, V b, V value, V to) {
  return to + if_not_equal(a, b, value);
}

#if defined(__AVX512F__)
// A masked operation does it in one, which GCC does not find.
ASGA_INLINE __mmask16 equal(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_EQ_OQ);
}

ASGA_INLINE Floats add_if_equal(Floats a, Floats b, Floats value, Floats to) {
  return reinterpret_cast<Floats>(_mm512_mask3_fmadd_ps(reinterpret_cast<__m512>(value), _mm512_set1_ps(1.0f),
                                                        reinterpret_cast<__m512>(to), equal(a, b)));
}

ASGA_INLINE Floats subtract_if_equal(Floats a, Floats b, Floats value, Floats to) {
  return reinterpret_cast<Floats>(_mm512_mask3_fnmadd_ps(reinterpret_cast<__m512>(value), _mm512_set1_ps(1.0f),
                                                         reinterpret_cast<__m512>(to), equal(a, b)));
}

ASGA_INLINE Floats add_if_not_equal(Floats a, Floats b, Floats value, Floats to) {
  return reinterpret_cast<Floats>(
      _mm512_mask_mov_ps(reinterpret_cast<__m512>(to + value), equal(a, b), reinterpret_cast<__m512>(to)));
}
#endif

// Rounds half to even, but may give -0.0: one instruction where there is one. Only for terms of sums.
template <typename V>
ASGA_INLINE V round_to_term(V x) {
  return round_half_even(x);
}

#if defined(__AVX512F__)
ASGA_INLINE Floats round_to_term(Floats x) {
  return reinterpret_cast<Floats>(
      _mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
ASGA_INLINE Floats round_to_term(Floats x) {
  return reinterpret_cast<Floats>(
      _mm256_round_ps(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

}  // namespace
}  // namespace asga
