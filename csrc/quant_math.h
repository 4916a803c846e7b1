// The arithmetic of the quantizers, shared by the CPU and the CUDA kernels so that both give the same bits. T is float,
// double, or a vector of them (csrc/cpu/vectorized/lanes.h).
// `asga/ops/reference.py` is the definition. Compile with floating-point contraction off (-ffp-contract=off,
// nvcc -fmad=false): a fused multiply-add rounds once where the definition rounds twice.
#pragma once

#if defined(__CUDACC__)
#define ASGA_HD __host__ __device__ __forceinline__
#else
#define ASGA_HD inline __attribute__((always_inline))
#endif

namespace asga {

// Largest number of candidates of a mixture that the kernels are compiled for: bits 2 to 8 and one spare.
constexpr int kMaxCandidates = 8;

// Adding and subtracting 1.5 * 2^(mantissa bits) rounds half to even wherever |x| < 2^(mantissa bits - 1), needs no
// library call, and never yields -0.0. Quantization ranges are far below that bound.
template <typename T>
struct RoundingConstant;
template <>
struct RoundingConstant<float> {
  static constexpr float value = 12582912.0f;  // 1.5 * 2^23
};
template <>
struct RoundingConstant<double> {
  static constexpr double value = 6755399441055744.0;  // 1.5 * 2^52
};

template <typename T>
ASGA_HD T round_half_even(T x) {
  return (x + RoundingConstant<T>::value) - RoundingConstant<T>::value;
}

// NaN passes through: both comparisons are false. In this order the two lines are one x86 instruction each.
template <typename T>
ASGA_HD T clamp_propagate_nan(T x, T low, T high) {
  x = low > x ? low : x;
  return high < x ? high : x;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// One instruction each, where a comparison and a selection would be two.
ASGA_HD float clamp_propagate_nan(float x, float low, float high) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
}
#endif

// `value` where a equals b, else zero, and the other way around; NaN equals nothing.
template <typename T>
ASGA_HD T if_equal(T a, T b, T value) {
  return a == b ? value : T{};
}

template <typename T>
ASGA_HD T if_not_equal(T a, T b, T value) {
  return a == b ? T{} : value;
}

// One value on one grid: `scaled` = x / scale, `clamped` to [low, high] (range minus zero point), `rounded`.
template <typename T>
struct Quantized {
  T scaled, clamped, rounded;
  // In range before rounding, bounds included (LSQ's mask). NaN is outside.
  ASGA_HD auto inside() const { return scaled == clamped; }
  ASGA_HD T if_inside(T value) const { return if_equal(scaled, clamped, value); }
  ASGA_HD T if_outside(T value) const { return if_not_equal(scaled, clamped, value); }
  // d(output)/d(scale): round(v) - v inside, the bound outside.
  ASGA_HD T scale_term() const { return rounded - if_inside(scaled); }
};

template <typename T>
ASGA_HD Quantized<T> quantize(T scaled, T low, T high) {
  const T clamped = clamp_propagate_nan(scaled, low, high);
  return {scaled, clamped, round_half_even(clamped)};
}

}  // namespace asga
