#include "mixed_fake_quant.h"

#include "lanes.h"

namespace asga {
namespace {

// Sixteen values with the parameters of their grids.
template <typename V>
struct LaneGrids {
  V inverse[kMaxCandidates], weight[kMaxCandidates], low[kMaxCandidates], high[kMaxCandidates], probs[kMaxCandidates];
};

template <typename V>
struct LaneSums {
  V residual[kMaxCandidates], rounded[kMaxCandidates];
};

// The inner loops, the only code that is repeated for each number of candidates K: `vectors` times sixteen values,
// `stride` apart, on the same grids. What the loop reads is copied to locals, which no store can alias.
template <typename scalar_t, int K>
void forward_strip(const scalar_t* input, scalar_t* output, int64_t vectors, int64_t stride,
                   const LaneGrids<vector_t<scalar_t>>& grids) {
  using V = vector_t<scalar_t>;
  V inverse[K], weight[K], low[K], high[K];
  for (int k = 0; k < K; ++k) {
    inverse[k] = grids.inverse[k];
    weight[k] = grids.weight[k];
    low[k] = grids.low[k];
    high[k] = grids.high[k];
  }
  for (int64_t i = 0; i < vectors; ++i, input += stride, output += stride) {
    const V x = load(input);
    V sum = quantize(x * inverse[0], low[0], high[0]).rounded * weight[0];
    ASGA_UNROLL
    for (int k = 1; k < K; ++k) sum += quantize(x * inverse[k], low[k], high[k]).rounded * weight[k];
    store(output, sum);
  }
}

template <typename scalar_t, int K>
void backward_strip(const scalar_t* grad, const scalar_t* input, scalar_t* grad_input, int64_t vectors, int64_t stride,
                    const LaneGrids<vector_t<scalar_t>>& grids, LaneSums<vector_t<scalar_t>>& sums) {
  using V = vector_t<scalar_t>;
  V inverse[K], low[K], high[K], probs[K], residual[K], rounded[K];
  for (int k = 0; k < K; ++k) {
    inverse[k] = grids.inverse[k];
    low[k] = grids.low[k];
    high[k] = grids.high[k];
    probs[k] = grids.probs[k];
    residual[k] = sums.residual[k];
    rounded[k] = sums.rounded[k];
  }
  for (int64_t i = 0; i < vectors; ++i, grad += stride, input += stride, grad_input += stride) {
    const V g = load(grad), x = load(input);
    V passed = {};
    ASGA_UNROLL
    for (int k = 0; k < K; ++k) {
      const Quantized<V> value = quantize(x * inverse[k], low[k], high[k]);
      passed += value.inside() ? probs[k] : V{};
      residual[k] += g * value.scale_term();
      rounded[k] += g * value.rounded;
    }
    store(grad_input, g * passed);
  }
  for (int k = 0; k < K; ++k) {
    sums.residual[k] = residual[k];
    sums.rounded[k] = rounded[k];
  }
}

template <typename scalar_t>
using ForwardStrip = decltype(&forward_strip<scalar_t, 1>);
template <typename scalar_t>
using BackwardStrip = decltype(&backward_strip<scalar_t, 1>);

template <typename scalar_t>
ForwardStrip<scalar_t> forward_strip_for(int candidates) {
  static constexpr ForwardStrip<scalar_t> strips[kMaxCandidates] = {
      forward_strip<scalar_t, 1>, forward_strip<scalar_t, 2>, forward_strip<scalar_t, 3>, forward_strip<scalar_t, 4>,
      forward_strip<scalar_t, 5>, forward_strip<scalar_t, 6>, forward_strip<scalar_t, 7>, forward_strip<scalar_t, 8>};
  return strips[candidates - 1];
}

template <typename scalar_t>
BackwardStrip<scalar_t> backward_strip_for(int candidates) {
  static constexpr BackwardStrip<scalar_t> strips[kMaxCandidates] = {
      backward_strip<scalar_t, 1>, backward_strip<scalar_t, 2>, backward_strip<scalar_t, 3>,
      backward_strip<scalar_t, 4>, backward_strip<scalar_t, 5>, backward_strip<scalar_t, 6>,
      backward_strip<scalar_t, 7>, backward_strip<scalar_t, 8>};
  return strips[candidates - 1];
}

// The grids of `count` <= 16 neighboring columns, or of one channel in all lanes (count = 0).
template <typename V, typename compute>
LaneGrids<V> lane_grids(const MixedGrids<compute>& grids, int64_t first, int64_t count) {
  LaneGrids<V> lanes;
  for (int k = 0; k < grids.candidates; ++k) {
    const compute *inverse = grids.inverse + k * grids.stride + first,
                  *weight = grids.weight + k * grids.stride + first;
    lanes.inverse[k] = count == 0 ? V{} + *inverse : load_tail(inverse, count);
    lanes.weight[k] = count == 0 ? V{} + *weight : load_tail(weight, count);
    lanes.low[k] = V{} + grids.low[k];
    lanes.high[k] = V{} + grids.high[k];
    lanes.probs[k] = V{} + grids.probs[k];
  }
  return lanes;
}

// `count` < 16 values through a strip, by way of full vectors on the stack.
template <typename scalar_t>
void forward_tail(const scalar_t* input, scalar_t* output, int64_t count, const LaneGrids<vector_t<scalar_t>>& grids,
                  ForwardStrip<scalar_t> strip) {
  scalar_t x[kLanes], y[kLanes];
  copy_tail(x, input, count);
  strip(x, y, 1, kLanes, grids);
  memcpy(output, y, count * sizeof(scalar_t));
}

template <typename scalar_t>
void backward_tail(const scalar_t* grad, const scalar_t* input, scalar_t* grad_input, int64_t count,
                   const LaneGrids<vector_t<scalar_t>>& grids, LaneSums<vector_t<scalar_t>>& sums,
                   BackwardStrip<scalar_t> strip) {
  scalar_t g[kLanes] = {}, x[kLanes], dx[kLanes];
  memcpy(g, grad, count * sizeof(scalar_t));
  copy_tail(x, input, count);
  strip(g, x, dx, 1, kLanes, grids, sums);
  memcpy(grad_input, dx, count * sizeof(scalar_t));
}

template <typename scalar_t>
void forward(const Work& work, const MixedGrids<compute_t<scalar_t>>& grids, const scalar_t* input, scalar_t* output,
             int64_t begin, int64_t end) {
  using V = vector_t<scalar_t>;
  const auto strip = forward_strip_for<scalar_t>(grids.candidates);
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece = piece_of(work, index);
    const scalar_t* x = input + piece.offset;
    scalar_t* y = output + piece.offset;
    if (!work.columns) {
      const LaneGrids<V> lanes = lane_grids<V>(grids, piece.channel, 0);
      const int64_t whole = piece.count / kLanes * kLanes;
      strip(x, y, whole / kLanes, kLanes, lanes);
      if (whole < piece.count) forward_tail(x + whole, y + whole, piece.count - whole, lanes, strip);
      continue;
    }
    for (int64_t j = 0; j < work.width; j += kLanes) {
      const int64_t count = work.width - j < kLanes ? work.width - j : kLanes;
      const LaneGrids<V> lanes = lane_grids<V>(grids, j, count);
      if (count == kLanes)
        strip(x + j, y + j, piece.count, work.width, lanes);
      else
        for (int64_t row = 0; row < piece.count; ++row)
          forward_tail(x + j + row * work.width, y + j + row * work.width, count, lanes, strip);
    }
  }
}

template <typename scalar_t>
void backward(const Work& work, const MixedGrids<compute_t<scalar_t>>& grids, const scalar_t* grad,
              const scalar_t* input, scalar_t* grad_input, double* piece_sums, int64_t begin, int64_t end) {
  using V = vector_t<scalar_t>;
  const auto strip = backward_strip_for<scalar_t>(grids.candidates);
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece = piece_of(work, index);
    const scalar_t *g = grad + piece.offset, *x = input + piece.offset;
    scalar_t* dx = grad_input + piece.offset;
    double* out = piece_sums + index * grids.candidates * 2 * (work.columns ? work.width : 1);
    if (!work.columns) {
      const LaneGrids<V> lanes = lane_grids<V>(grids, piece.channel, 0);
      LaneSums<V> sums = {};
      const int64_t whole = piece.count / kLanes * kLanes;
      strip(g, x, dx, whole / kLanes, kLanes, lanes, sums);
      if (whole < piece.count) backward_tail(g + whole, x + whole, dx + whole, piece.count - whole, lanes, sums, strip);
      for (int k = 0; k < grids.candidates; ++k) {
        out[2 * k] = sum_lanes(sums.residual[k]);
        out[2 * k + 1] = sum_lanes(sums.rounded[k]);
      }
      continue;
    }
    for (int64_t j = 0; j < work.width; j += kLanes) {
      const int64_t count = work.width - j < kLanes ? work.width - j : kLanes;
      const LaneGrids<V> lanes = lane_grids<V>(grids, j, count);
      for (int64_t first = 0; first < piece.count; first += kLongestSum) {
        const int64_t rows = piece.count - first < kLongestSum ? piece.count - first : kLongestSum;
        LaneSums<V> sums = {};
        int64_t at = j + first * work.width;
        if (count == kLanes)
          strip(g + at, x + at, dx + at, rows, work.width, lanes, sums);
        else
          for (int64_t row = 0; row < rows; ++row, at += work.width)
            backward_tail(g + at, x + at, dx + at, count, lanes, sums, strip);
        for (int k = 0; k < grids.candidates; ++k) {
          add_sums(out + 2 * k * work.width + j, sums.residual[k], count);
          add_sums(out + (2 * k + 1) * work.width + j, sums.rounded[k], count);
        }
      }
    }
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
