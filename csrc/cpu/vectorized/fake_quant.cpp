#include "fake_quant.h"

#include "lanes.h"

namespace asga {
namespace {

// Sixteen values with the parameters of their grids.
template <typename V>
struct LaneGrids {
  V scale, low, high;
};

template <typename V>
struct LaneSums {
  V scale, outside;
};

// The inner loops: `vectors` times sixteen values, `stride` apart, on the same grids.
template <typename scalar_t>
void forward_strip(const scalar_t* input, scalar_t* output, int64_t vectors, int64_t stride,
                   const LaneGrids<vector_t<scalar_t>>& grids) {
  using V = vector_t<scalar_t>;
  const LaneGrids<V> local = grids;  // no store can alias it
  for (int64_t i = 0; i < vectors; ++i, input += stride, output += stride)
    store(output, quantize(load(input) / local.scale, local.low, local.high).rounded * local.scale);
}

template <typename scalar_t>
void backward_strip(const scalar_t* grad, const scalar_t* input, scalar_t* grad_input, int64_t vectors, int64_t stride,
                    const LaneGrids<vector_t<scalar_t>>& grids, LaneSums<vector_t<scalar_t>>& sums) {
  using V = vector_t<scalar_t>;
  const LaneGrids<V> local = grids;
  LaneSums<V> total = sums;
  for (int64_t i = 0; i < vectors; ++i, grad += stride, input += stride, grad_input += stride) {
    const V g = load(grad);
    const Quantized<V> value = quantize(load(input) / local.scale, local.low, local.high);
    const auto inside = value.inside();
    store(grad_input, inside ? g : V{});
    total.scale += g * value.scale_term();
    total.outside += inside ? V{} : g;
  }
  sums = total;
}

// The grids of `count` <= 16 neighboring columns, or of one channel in all lanes (count = 0).
template <typename V, typename compute>
LaneGrids<V> lane_grids(const Grids<compute>& grids, int64_t first, int64_t count) {
  if (count == 0) return {V{} + grids.scale[first], V{} + grids.low[first], V{} + grids.high[first]};
  return {load_tail(grids.scale + first, count), load_tail(grids.low + first, count),
          load_tail(grids.high + first, count)};
}

// `count` < 16 values through a strip, by way of full vectors on the stack.
template <typename scalar_t>
void forward_tail(const scalar_t* input, scalar_t* output, int64_t count, const LaneGrids<vector_t<scalar_t>>& grids) {
  scalar_t x[kLanes], y[kLanes];
  copy_tail(x, input, count);
  forward_strip(x, y, 1, kLanes, grids);
  memcpy(output, y, count * sizeof(scalar_t));
}

template <typename scalar_t>
void backward_tail(const scalar_t* grad, const scalar_t* input, scalar_t* grad_input, int64_t count,
                   const LaneGrids<vector_t<scalar_t>>& grids, LaneSums<vector_t<scalar_t>>& sums) {
  scalar_t g[kLanes] = {}, x[kLanes], dx[kLanes];
  memcpy(g, grad, count * sizeof(scalar_t));
  copy_tail(x, input, count);
  backward_strip(g, x, dx, 1, kLanes, grids, sums);
  memcpy(grad_input, dx, count * sizeof(scalar_t));
}

template <typename scalar_t>
void forward(const Work& work, const Grids<compute_t<scalar_t>>& grids, const scalar_t* input, scalar_t* output,
             int64_t begin, int64_t end) {
  using V = vector_t<scalar_t>;
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece = piece_of(work, index);
    const scalar_t* x = input + piece.offset;
    scalar_t* y = output + piece.offset;
    if (!work.columns) {
      const LaneGrids<V> lanes = lane_grids<V>(grids, piece.channel, 0);
      const int64_t whole = piece.count / kLanes * kLanes;
      forward_strip(x, y, whole / kLanes, kLanes, lanes);
      if (whole < piece.count) forward_tail(x + whole, y + whole, piece.count - whole, lanes);
      continue;
    }
    for (int64_t j = 0; j < work.width; j += kLanes) {
      const int64_t count = work.width - j < kLanes ? work.width - j : kLanes;
      const LaneGrids<V> lanes = lane_grids<V>(grids, j, count);
      if (count == kLanes)
        forward_strip(x + j, y + j, piece.count, work.width, lanes);
      else
        for (int64_t row = 0; row < piece.count; ++row)
          forward_tail(x + j + row * work.width, y + j + row * work.width, count, lanes);
    }
  }
}

template <typename scalar_t>
void backward(const Work& work, const Grids<compute_t<scalar_t>>& grids, const scalar_t* grad, const scalar_t* input,
              scalar_t* grad_input, double* piece_sums, int64_t begin, int64_t end) {
  using V = vector_t<scalar_t>;
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece = piece_of(work, index);
    const scalar_t *g = grad + piece.offset, *x = input + piece.offset;
    scalar_t* dx = grad_input + piece.offset;
    double* out = piece_sums + index * 2 * (work.columns ? work.width : 1);
    if (!work.columns) {
      const LaneGrids<V> lanes = lane_grids<V>(grids, piece.channel, 0);
      LaneSums<V> sums = {};
      const int64_t whole = piece.count / kLanes * kLanes;
      backward_strip(g, x, dx, whole / kLanes, kLanes, lanes, sums);
      if (whole < piece.count) backward_tail(g + whole, x + whole, dx + whole, piece.count - whole, lanes, sums);
      out[0] = sum_lanes(sums.scale);
      out[1] = sum_lanes(sums.outside);
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
          backward_strip(g + at, x + at, dx + at, rows, work.width, lanes, sums);
        else
          for (int64_t row = 0; row < rows; ++row, at += work.width)
            backward_tail(g + at, x + at, dx + at, count, lanes, sums);
        add_sums(out + j, sums.scale, count);
        add_sums(out + work.width + j, sums.outside, count);
      }
    }
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
