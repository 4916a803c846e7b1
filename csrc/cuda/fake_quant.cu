// Fixed-bit quantizer on CUDA: one sweep forward, one sweep backward. `asga/ops/reference.py` is the
// definition.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../quant_math.h"
#include "launch.h"
#include "reduce.h"
#include "tiles.h"

namespace asga {
namespace {

// The grid of one channel: its bounds are the range minus the rounded zero point.
template <typename A>
struct Grid {
  A scale, low, high;

  __device__ Grid(const A* scales, const A* zero_points, int64_t channel, A quant_min, A quant_max)
      : scale(scales[channel]) {
    const A offset = zero_points == nullptr ? A(0) : round_half_even(zero_points[channel]);
    low = quant_min - offset;
    high = quant_max - offset;
  }
  __device__ Quantized<A> operator()(A x) const { return quantize(x / scale, low, high); }
};

template <typename T, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_kernel(T* __restrict__ output, const T* __restrict__ input, const compute_t<T>* __restrict__ scale,
                   const compute_t<T>* __restrict__ zero_point, compute_t<T> quant_min, compute_t<T> quant_max,
                   const Cut cut) {
  using A = compute_t<T>;
  const Tile tile = cut.tile();
  const Grid<A> grid(scale, zero_point, tile.channel, quant_min, quant_max);
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    const auto x = load<N>(input + offset);
    Vector<T, N> y;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      y.values[n] = static_cast<T>(grid(static_cast<A>(x.values[n])).rounded * grid.scale);
    }
    store(output + offset, y);
  });
}

// partials[0] collects the terms of the scale's gradient, partials[1] those of the zero point's if there is
// one.
template <typename T, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_kernel(T* __restrict__ grad_input, compute_t<T>* __restrict__ partials, const T* __restrict__ grad,
                    const T* __restrict__ input, const compute_t<T>* __restrict__ scale,
                    const compute_t<T>* __restrict__ zero_point, compute_t<T> quant_min, compute_t<T> quant_max,
                    const Cut cut) {
  using A = compute_t<T>;
  const Tile tile = cut.tile();
  const Grid<A> grid(scale, zero_point, tile.channel, quant_min, quant_max);
  A terms[2] = {};
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    const auto x = load<N>(input + offset);
    const auto g = load<N>(grad + offset);
    Vector<T, N> dx;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Quantized<A> q = grid(static_cast<A>(x.values[n]));
      const A g_n = static_cast<A>(g.values[n]);
      dx.values[n] = q.inside() ? g.values[n] : static_cast<T>(0.0f);
      terms[0] += g_n * q.scale_term();
      terms[1] -= q.inside() ? A(0) : g_n * grid.scale;
    }
    store(grad_input + offset, dx);
  });
  cut.reduce(terms, zero_point == nullptr ? 1 : 2, tile, partials);
}

template <typename T>
void launch_forward(T* output, const T* input, const compute_t<T>* scale, const compute_t<T>* zero_point,
                    int64_t quant_min, int64_t quant_max, const ChannelLayout& layout, cudaStream_t stream) {
  const auto low = static_cast<compute_t<T>>(quant_min), high = static_cast<compute_t<T>>(quant_max);
  std::visit(
      [&](const auto& cut) {
        forward_kernel<<<cut.grid(), kThreads, 0, stream>>>(output, input, scale, zero_point, low, high, cut);
      },
      cut_tiles(layout, kVector<T>, is_aligned(output, input)));
  ASGA_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch_backward(T* grad_input, compute_t<T>* partials, const T* grad, const T* input, const compute_t<T>* scale,
                     const compute_t<T>* zero_point, int64_t quant_min, int64_t quant_max, const Tiles& tiles,
                     cudaStream_t stream) {
  const auto low = static_cast<compute_t<T>>(quant_min), high = static_cast<compute_t<T>>(quant_max);
  std::visit(
      [&](const auto& cut) {
        backward_kernel<<<cut.grid(), kThreads, 0, stream>>>(grad_input, partials, grad, input, scale, zero_point, low,
                                                             high, cut);
      },
      tiles);
  ASGA_CUDA_CHECK(cudaGetLastError());
}

Tensor fake_quant(const Tensor& input, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t quant_min,
                  int64_t quant_max, std::optional<int64_t> axis) {
  const ScalarType type = compute_type(input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = to_dense(input);
  const ChannelLayout layout = channel_layout(x, axis);
  const Tensor s = to_parameter("scale", scale, input, layout.channels, type);
  std::optional<Tensor> z;
  if (zero_point.has_value()) z = to_parameter("zero_point", *zero_point, input, layout.channels, type);
  const Tensor output = empty_as(x);
  if (x.numel() == 0) return output;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    launch_forward(mutable_data<T>(output), const_data<T>(x), const_data<A>(s),
                   z.has_value() ? const_data<A>(*z) : nullptr, quant_min, quant_max, layout, current_stream(x));
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward(const Tensor& grad, const Tensor& input, const Tensor& scale,
                                                       const std::optional<Tensor>& zero_point, int64_t quant_min,
                                                       int64_t quant_max, std::optional<int64_t> axis) {
  const ScalarType type = compute_type(input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = to_dense(input);
  const ChannelLayout layout = channel_layout(x, axis);
  const Tensor s = to_parameter("scale", scale, input, layout.channels, type);
  std::optional<Tensor> z;
  if (zero_point.has_value()) z = to_parameter("zero_point", *zero_point, input, layout.channels, type);
  check_same_device("grad", grad, input);
  check_same_shape("grad", grad, input);
  if (x.numel() == 0) {
    return {empty_as(x), zeros_like(scale),
            zero_point.has_value() ? zeros_like(*zero_point) : torch::stable::new_empty(scale, {0})};
  }
  const Tensor g = to_layout_of(x, grad);
  const Tensor grad_input = empty_as(x);
  const Tensor grad_scale = empty_as(s);
  const Tensor grad_zero_point = z.has_value() ? empty_as(*z) : torch::stable::new_empty(scale, {0});
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    const cudaStream_t stream = current_stream(x);
    const Tiles tiles =
        cut_tiles(layout, kVector<T>, is_aligned(grad_input.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr()));
    const int terms = z.has_value() ? 2 : 1;
    // A single slot per channel holds the sum already.
    const bool summed = terms == 1 && slots(tiles) == 1;
    const Tensor partials = summed ? grad_scale : torch::stable::new_empty(s, {terms, layout.channels, slots(tiles)});
    launch_backward(mutable_data<T>(grad_input), mutable_data<A>(partials), const_data<T>(g), const_data<T>(x),
                    const_data<A>(s), z.has_value() ? const_data<A>(*z) : nullptr, quant_min, quant_max, tiles, stream);
    if (summed) return;
    const A* none = nullptr;
    launch_sum_slots(mutable_data<A>(grad_scale), const_data<A>(partials), none, 1, layout.channels, terms,
                     slots(tiles), stream);
    if (!z.has_value()) return;
    launch_sum_slots(mutable_data<A>(grad_zero_point), const_data<A>(partials) + layout.channels * slots(tiles), none,
                     1, layout.channels, terms, slots(tiles), stream);
  });
  return {grad_input, to_layout_of(scale, grad_scale),
          z.has_value() ? to_layout_of(*zero_point, grad_zero_point) : grad_zero_point};
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CUDA, m) {
  m.impl("fake_quant", TORCH_BOX(&asga::fake_quant));
  m.impl("fake_quant_backward", TORCH_BOX(&asga::fake_quant_backward));
}
