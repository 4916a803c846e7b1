#include "fake_quant.h"

#include "sweep.h"

namespace asga {
namespace {

// The parameters of a pack, in registers.
template <typename V>
struct PackGrids {
  V scale[kRegisters<V>], low[kRegisters<V>], high[kRegisters<V>];

  template <bool kColumns, typename compute>
  static ASGA_INLINE PackGrids load(const Grids<compute>& grids, int64_t line) {
    PackGrids pack;
    for (int r = 0; r < kRegisters<V>; ++r) {
      pack.scale[r] = parameter<kColumns, V>(grids.scale + line, r);
      pack.low[r] = parameter<kColumns, V>(grids.low + line, r);
      pack.high[r] = parameter<kColumns, V>(grids.high + line, r);
    }
    return pack;
  }
};

template <typename scalar_t, bool kColumns, bool kPastCaches>
struct Forward {
  using V = vector_t<scalar_t>;
  const Grids<compute_t<scalar_t>>& grids;
  const scalar_t* input;
  scalar_t* output;

  ASGA_INLINE void packs(int64_t line, int64_t offset, int64_t count, int64_t stride) const {
    const auto pack = PackGrids<V>::template load<kColumns>(grids, line);
    const scalar_t* x = input + offset;
    scalar_t* y = output + offset;
    for (int64_t i = 0; i < count; ++i, x += stride, y += stride)
      for (int r = 0; r < kRegisters<V>; ++r)
        store<kPastCaches>(y + r * kWidth<V>, value(load(x + r * kWidth<V>), pack, r));
  }

  ASGA_INLINE void tail(int64_t line, int64_t offset, int count) const {
    const auto pack = PackGrids<V>::template load<kColumns>(grids, line);
    for_each_part<V>(count, [&](int r, int some) {
      const int64_t at = offset + r * kWidth<V>;
      store_some(output + at, value(load_some(input + at, some), pack, r), some);
    });
  }

  ASGA_INLINE void add_sums(int64_t, int64_t, int64_t) const {}

 private:
  static ASGA_INLINE V value(V x, const PackGrids<V>& pack, int r) {
    return quantize(x / pack.scale[r], pack.low[r], pack.high[r]).rounded * pack.scale[r];
  }
};

template <typename scalar_t, bool kColumns, bool kPastCaches, int kTerms>
struct Backward {
  using V = vector_t<scalar_t>;
  const Grids<compute_t<scalar_t>>& grids;
  const scalar_t *grad, *input;
  scalar_t* grad_input;
  double* sums;
  int64_t lines;
  V terms[kTerms][kRegisters<V>] = {};

  ASGA_INLINE void packs(int64_t line, int64_t offset, int64_t count, int64_t stride) {
    const auto pack = PackGrids<V>::template load<kColumns>(grids, line);
    const scalar_t *g = grad + offset, *x = input + offset;
    scalar_t* dx = grad_input + offset;
    V local[kTerms][kRegisters<V>];  // no store can alias it
    copy_registers(local, terms);
    for (int64_t i = 0; i < count; ++i, g += stride, x += stride, dx += stride)
      for (int r = 0; r < kRegisters<V>; ++r)
        store<kPastCaches>(dx + r * kWidth<V>, value(load(g + r * kWidth<V>), load(x + r * kWidth<V>), pack, r, local));
    copy_registers(terms, local);
  }

  ASGA_INLINE void tail(int64_t line, int64_t offset, int count) {
    const auto pack = PackGrids<V>::template load<kColumns>(grids, line);
    for_each_part<V>(count, [&](int r, int some) {
      const int64_t at = offset + r * kWidth<V>;
      const V g = keep_some(load_some(grad + at, some), some);
      store_some(grad_input + at, value(g, load_some(input + at, some), pack, r, terms), some);
    });
  }

  ASGA_INLINE void add_sums(int64_t slot, int64_t line, int64_t count) {
    double* to = sums + slot * kTerms * lines + line;
    for (int t = 0; t < kTerms; ++t) add_terms<kColumns>(to + t * lines, terms[t], count);
    memset(terms, 0, sizeof terms);
  }

 private:
  static ASGA_INLINE V value(V g, V x, const PackGrids<V>& pack, int r, V (&terms)[kTerms][kRegisters<V>]) {
    const Quantized<V> q = quantize(x / pack.scale[r], pack.low[r], pack.high[r]);
    terms[0][r] += g * q.scale_term();
    if constexpr (kTerms == 2) terms[1][r] += q.if_outside(g);
    return q.if_inside(g);
  }
};

template <typename scalar_t>
void forward(const Work& work, const Grids<compute_t<scalar_t>>& grids, const scalar_t* input, scalar_t* output,
             bool past_caches, int64_t begin, int64_t end) {
  sweep(work, past_caches, output, begin, end,
        [&](auto columns, auto past) { return Forward<scalar_t, columns.value, past.value>{grids, input, output}; });
}

template <typename scalar_t>
void backward(const Work& work, const Grids<compute_t<scalar_t>>& grids, const scalar_t* grad, const scalar_t* input,
              scalar_t* grad_input, int terms, double* sums, bool past_caches, int64_t begin, int64_t end) {
  if (terms == 1) {
    sweep(work, past_caches, grad_input, begin, end, [&](auto columns, auto past) {
      return Backward<scalar_t, columns.value, past.value, 1>{grids, grad, input, grad_input, sums, work.lines};
    });
  } else {
    sweep(work, past_caches, grad_input, begin, end, [&](auto columns, auto past) {
      return Backward<scalar_t, columns.value, past.value, 2>{grids, grad, input, grad_input, sums, work.lines};
    });
  }
}

}  // namespace

namespace ASGA_ISA {

template <typename scalar_t>
FakeQuantLoops<scalar_t> fake_quant_loops() {
  return {&forward<scalar_t>, &backward<scalar_t>};
}

template FakeQuantLoops<float> fake_quant_loops();
template FakeQuantLoops<double> fake_quant_loops();
template FakeQuantLoops<Half> fake_quant_loops();
template FakeQuantLoops<BFloat16> fake_quant_loops();

}  // namespace ASGA_ISA
}  // namespace asga
