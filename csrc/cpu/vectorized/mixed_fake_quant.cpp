#include "mixed_fake_quant.h"

#include "arithmetic.h"
#include "sweep.h"

namespace asga {
namespace {

// Values are taken in blocks of a few registers, and all of a block through one candidate before the next: so the
// parameters and sums of a single candidate are in registers, and sixteen of those are enough for any K. Within a
// candidate each operation is done to the whole block before the next one: each waits for the one before it, and the
// fewer wait at a time, the more of the others a processor sees.
template <typename V>
constexpr int kBlockPacks = kRegisters<V> < 4 ? 4 / kRegisters<V> : 1;

template <typename V, bool kColumns, typename compute>
ASGA_INLINE void load_parameters(V (&parts)[kRegisters<V>], const compute* table) {
  for (int r = 0; r < kRegisters<V>; ++r) parts[r] = parameter<kColumns, V>(table, r);
}

// Calls block(std::integral_constant<int, packs>, first pack) for `count` packs, most of them in full blocks.
template <typename V, typename F>
ASGA_INLINE void for_each_block(int64_t count, const F& block) {
  int64_t i = 0;
  for (; i + kBlockPacks<V> <= count; i += kBlockPacks<V>) block(std::integral_constant<int, kBlockPacks<V>>{}, i);
  for (; i < count; ++i) block(std::integral_constant<int, 1>{}, i);
}

template <typename scalar_t, bool kColumns, bool kPastCaches>
struct Forward {
  using V = vector_t<scalar_t>;
  static constexpr int R = kRegisters<V>;
  const MixedGrids<compute_t<scalar_t>>& grids;
  const scalar_t* input;
  scalar_t* output;

  ASGA_INLINE void packs(int64_t line, int64_t offset, int64_t count, int64_t stride) const {
    for_each_block<V>(count, [&](auto packs, int64_t first) {
      const scalar_t* x = input + offset + first * stride;
      scalar_t* y = output + offset + first * stride;
      V values[packs.value * R], sums[packs.value * R];
      for (int i = 0; i < packs.value; ++i)
        for (int r = 0; r < R; ++r) values[i * R + r] = load(x + i * stride + r * kWidth<V>);
      mix(line, values, sums);
      for (int i = 0; i < packs.value; ++i)
        for (int r = 0; r < R; ++r) store<kPastCaches>(y + i * stride + r * kWidth<V>, sums[i * R + r]);
    });
  }

  ASGA_INLINE void tail(int64_t line, int64_t offset, int count) const {
    V values[R] = {}, sums[R];
    for_each_part<V>(count, [&](int r, int some) { values[r] = load_some(input + offset + r * kWidth<V>, some); });
    mix(line, values, sums);
    for_each_part<V>(count, [&](int r, int some) { store_some(output + offset + r * kWidth<V>, sums[r], some); });
  }

  ASGA_INLINE void add_sums(int64_t, int64_t, int64_t) const {}

 private:
  template <int N>
  ASGA_INLINE void mix(int64_t line, const V (&values)[N], V (&sums)[N]) const {
    candidate<true>(line, values, sums);
    for (int k = 1; k < grids.candidates; ++k) candidate<false>(k * grids.stride + line, values, sums);
  }

  template <bool kFirst, int N>
  ASGA_INLINE void candidate(int64_t at, const V (&values)[N], V (&sums)[N]) const {
    V inverse[R], weight[R], low[R], high[R];
    load_parameters<V, kColumns>(inverse, grids.inverse + at);
    load_parameters<V, kColumns>(weight, grids.weight + at);
    load_parameters<V, kColumns>(low, grids.low + at);
    load_parameters<V, kColumns>(high, grids.high + at);
    V terms[N];
    for (int j = 0; j < N; ++j) terms[j] = values[j] * inverse[j % R];
    for (int j = 0; j < N; ++j) terms[j] = clamp_propagate_nan(terms[j], low[j % R], high[j % R]);
    // round_half_even, its second half by other units than its first, and so with the sums.
    const V constant = RoundingConstant<V>::value - V{};
    for (int j = 0; j < N; ++j) terms[j] = subtract_by_fma(terms[j] + constant, constant);
    for (int j = 0; j < N; ++j) terms[j] *= weight[j % R];
    for (int j = 0; j < N; ++j)
      sums[j] = kFirst ? terms[j] : j % 2 == 0 ? add_by_fma(terms[j], sums[j]) : sums[j] + terms[j];
  }
};

template <typename scalar_t, bool kColumns, bool kPastCaches, int kTerms>
struct Backward {
  using V = vector_t<scalar_t>;
  static constexpr int R = kRegisters<V>;
  const MixedGrids<compute_t<scalar_t>>& grids;
  const scalar_t *grad, *input;
  scalar_t* grad_input;
  double* sums;
  int64_t lines;
  V terms[kMaxCandidates][kTerms][R] = {};

  ASGA_INLINE void packs(int64_t line, int64_t offset, int64_t count, int64_t stride) {
    for_each_block<V>(count, [&](auto packs, int64_t first) {
      const scalar_t *g = grad + offset + first * stride, *x = input + offset + first * stride;
      scalar_t* dx = grad_input + offset + first * stride;
      V grads[packs.value * R], values[packs.value * R], passed[packs.value * R];
      for (int i = 0; i < packs.value; ++i)
        for (int r = 0; r < R; ++r) {
          grads[i * R + r] = load(g + i * stride + r * kWidth<V>);
          values[i * R + r] = load(x + i * stride + r * kWidth<V>);
        }
      differentiate(line, grads, values, passed);
      for (int i = 0; i < packs.value; ++i)
        for (int r = 0; r < R; ++r)
          store<kPastCaches>(dx + i * stride + r * kWidth<V>, grads[i * R + r] * passed[i * R + r]);
    });
  }

  ASGA_INLINE void tail(int64_t line, int64_t offset, int count) {
    V grads[R] = {}, values[R] = {}, passed[R];
    for_each_part<V>(count, [&](int r, int some) {
      const int64_t at = offset + r * kWidth<V>;
      grads[r] = keep_some(load_some(grad + at, some), some);
      values[r] = load_some(input + at, some);
    });
    // A part without any value repeats the first one.
    for (int r = 1; r < R; ++r)
      if (count <= r * kWidth<V>) values[r] = values[0];
    differentiate(line, grads, values, passed);
    for_each_part<V>(
        count, [&](int r, int some) { store_some(grad_input + offset + r * kWidth<V>, grads[r] * passed[r], some); });
  }

  ASGA_INLINE void add_sums(int64_t slot, int64_t line, int64_t count) {
    double* to = sums + slot * grids.candidates * kTerms * lines + line;
    for (int k = 0; k < grids.candidates; ++k)
      for (int t = 0; t < kTerms; ++t, to += lines) {
        add_terms<kColumns>(to, terms[k][t], count);
        for (V& part : terms[k][t]) part = V{};
      }
  }

 private:
  // passed = sum of the probabilities of the candidates that x is in range of.
  template <int N>
  ASGA_INLINE void differentiate(int64_t line, const V (&grads)[N], const V (&values)[N], V (&passed)[N]) {
    for (int j = 0; j < N; ++j) passed[j] = V{};
    int k = 0;  // there is at least one: `passed` need not be in memory for the case of none
    do {
      const int64_t at = k * grids.stride + line;
      const V prob = parameter<false, V>(grids.probs + k, 0);
      V inverse[R], low[R], high[R], local[kTerms][R];
      load_parameters<V, kColumns>(inverse, grids.inverse + at);
      load_parameters<V, kColumns>(low, grids.low + at);
      load_parameters<V, kColumns>(high, grids.high + at);
      copy_registers(local, terms[k]);
      V scaled[N], clamped[N], rounded[N];
      for (int j = 0; j < N; ++j) scaled[j] = values[j] * inverse[j % R];
      for (int j = 0; j < N; ++j) clamped[j] = clamp_propagate_nan(scaled[j], low[j % R], high[j % R]);
      for (int j = 0; j < N; ++j) rounded[j] = round_to_term(clamped[j]);
      for (int j = 0; j < N; ++j) passed[j] = add_if_equal(scaled[j], clamped[j], prob, passed[j]);
      for (int j = 0; j < N; ++j) local[1][j % R] += grads[j] * rounded[j];
      for (int j = 0; j < N; ++j) rounded[j] = subtract_if_equal(scaled[j], clamped[j], scaled[j], rounded[j]);
      for (int j = 0; j < N; ++j) local[0][j % R] += grads[j] * rounded[j];
      if constexpr (kTerms == 3)
        for (int j = 0; j < N; ++j)
          local[2][j % R] = add_if_not_equal(scaled[j], clamped[j], grads[j], local[2][j % R]);
      copy_registers(terms[k], local);
    } while (++k < grids.candidates);
  }
};

template <typename scalar_t>
void forward(const Work& work, const MixedGrids<compute_t<scalar_t>>& grids, const scalar_t* input, scalar_t* output,
             bool past_caches, int64_t begin, int64_t end) {
  sweep(work, past_caches, output, begin, end,
        [&](auto columns, auto past) { return Forward<scalar_t, columns.value, past.value>{grids, input, output}; });
}

template <typename scalar_t>
void backward(const Work& work, const MixedGrids<compute_t<scalar_t>>& grids, const scalar_t* grad,
              const scalar_t* input, scalar_t* grad_input, int terms, double* sums, bool past_caches, int64_t begin,
              int64_t end) {
  if (terms == 2) {
    sweep(work, past_caches, grad_input, begin, end, [&](auto columns, auto past) {
      return Backward<scalar_t, columns.value, past.value, 2>{grids, grad, input, grad_input, sums, work.lines};
    });
  } else {
    sweep(work, past_caches, grad_input, begin, end, [&](auto columns, auto past) {
      return Backward<scalar_t, columns.value, past.value, 3>{grids, grad, input, grad_input, sums, work.lines};
    });
  }
}

}  // namespace

namespace ASGA_ISA {

template <typename scalar_t>
MixedFakeQuantLoops<scalar_t> mixed_fake_quant_loops() {
  return {&forward<scalar_t>, &backward<scalar_t>};
}

template MixedFakeQuantLoops<float> mixed_fake_quant_loops();
template MixedFakeQuantLoops<double> mixed_fake_quant_loops();
template MixedFakeQuantLoops<Half> mixed_fake_quant_loops();
template MixedFakeQuantLoops<BFloat16> mixed_fake_quant_loops();

}  // namespace ASGA_ISA
}  // namespace asga
