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

  __device__ void read(const A* scales, const A* zero_points, int64_t channel, A quant_min, A quant_max) {
    const A offset = zero_points == nullptr ? A(0) : round_half_even(zero_points[channel]);
    scale = scales[channel];
    low = quant_min - offset;
    high = quant_max - offset;
  }
  __device__ Quantized<A> quantize(A x) const { return asga::quantize(x / scale, low, high); }
};

template <typename T, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks<compute_t<T>>)
    forward_kernel(T* __restrict__ output, const T* __restrict__ input, const compute_t<T>* __restrict__ scale,
                   const compute_t<T>* __restrict__ zero_point, compute_t<T> quant_min, compute_t<T> quant_max,
                   const Cut cut) {
  using A = compute_t<T>;
  const auto tile = cut.tile();
  Grid<A> grids[Cut::kChannels];
#pragma unroll
  for (int c = 0; c < Cut::kChannels; ++c) grids[c].read(scale, zero_point, cut.channel(tile, c), quant_min, quant_max);
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    A x[N], y[N];
    widen(load<N>(input + offset), x);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Grid<A>& grid = grids[n % Cut::kChannels];
      y[n] = grid.quantize(x[n]).rounded * grid.scale;
    }
    store(output + offset, narrow<A, T, N>(y));
  });
}

// partials[0] collects the terms of the scale's gradient, partials[1], with a zero point, the gradients outside the
// range: those of the zero point without the factor -scale.
template <typename T, bool kOffset, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks<compute_t<T>>)
    backward_kernel(T* __restrict__ grad_input, compute_t<T>* __restrict__ partials, const T* __restrict__ grad,
                    const T* __restrict__ input, const compute_t<T>* __restrict__ scale,
                    const compute_t<T>* __restrict__ zero_point, compute_t<T> quant_min, compute_t<T> quant_max,
                    const Cut cut) {
  using A = compute_t<T>;
  constexpr int kTerms = kOffset ? 2 : 1;
  const auto tile = cut.tile();
  Grid<A> grids[Cut::kChannels];
#pragma unroll
  for (int c = 0; c < Cut::kChannels; ++c) grids[c].read(scale, zero_point, cut.channel(tile, c), quant_min, quant_max);
  A terms[kTerms][Cut::kChannels] = {};
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    A x[N], g[N], dx[N];
    widen(load<N>(input + offset), x);
    widen(load<N>(grad + offset), g);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int c = n % Cut::kChannels;
      const Quantized<A> q = grids[c].quantize(x[n]);
      dx[n] = q.if_inside(g[n]);
      terms[0][c] += g[n] * q.scale_term();
      if constexpr (kOffset) terms[1][c] += q.if_outside(g[n]);
    }
    store(grad_input + offset, narrow<A, T, N>(dx));
  });
  cut.reduce(terms, kTerms, tile, partials);
}

// The gradients of the scales and of the zero points, if there are any: one team per sum over the slots of
// partials[term][channel][slot].
template <typename A>
__global__ void __launch_bounds__(kThreads, kMinBlocks<A>)
    finish_kernel(A* __restrict__ grad_scale, A* __restrict__ grad_zero_point, const A* __restrict__ partials,
                  const A* __restrict__ scale, int64_t channels, int64_t slots, int team) {
  const int64_t sum = blockIdx.x * int64_t{kThreads / team} + threadIdx.x / team;
  const bool of_scale = sum < channels;
  if (!of_scale && (grad_zero_point == nullptr || sum >= 2 * channels)) return;  // whole teams
  const A* mine = partials + sum * slots;
  const double total = team_sum(slots, team, [&](int64_t slot) { return static_cast<double>(mine[slot]); });
  if (threadIdx.x % team != 0) return;
  if (of_scale) {
    grad_scale[sum] = static_cast<A>(total);
  } else {
    const int64_t channel = sum - channels;
    grad_zero_point[channel] = static_cast<A>(total * -static_cast<double>(scale[channel]));
  }
}

template <typename T>
void launch_forward(T* output, const T* input, const compute_t<T>* scale, const compute_t<T>* zero_point,
                    int64_t quant_min, int64_t quant_max, const ChannelLayout& layout, cudaStream_t stream) {
  const auto low = static_cast<compute_t<T>>(quant_min), high = static_cast<compute_t<T>>(quant_max);
  std::visit(
      [&](const auto& cut) {
        forward_kernel<<<cut.grid(), kThreads, 0, stream>>>(output, input, scale, zero_point, low, high, cut);
      },
      cut_tiles<kVector<T>>(layout, kVector<T>, is_aligned(output, input), 0));
  ASGA_CUDA_CHECK(cudaGetLastError());
}

template <bool kOffset, typename T>
void launch_backward(T* grad_input, compute_t<T>* partials, const T* grad, const T* input, const compute_t<T>* scale,
                     const compute_t<T>* zero_point, int64_t quant_min, int64_t quant_max,
                     const Tiles<kVector<T>>& tiles, cudaStream_t stream) {
  const auto low = static_cast<compute_t<T>>(quant_min), high = static_cast<compute_t<T>>(quant_max);
  std::visit(
      [&](const auto& cut) {
        backward_kernel<T, kOffset>
            <<<cut.grid(), kThreads, 0, stream>>>(grad_input, partials, grad, input, scale, zero_point, low, high, cut);
      },
      tiles);
  ASGA_CUDA_CHECK(cudaGetLastError());
}

template <typename A>
void launch_finish(A* grad_scale, A* grad_zero_point, const A* partials, const A* scale, int64_t channels,
                   int64_t slots, cudaStream_t stream) {
  const int team = team_for(slots);
  const int64_t sums = grad_zero_point == nullptr ? channels : 2 * channels;
  const auto blocks = static_cast<unsigned>(ceil_div(sums, kThreads / team));
  finish_kernel<<<blocks, kThreads, 0, stream>>>(grad_scale, grad_zero_point, partials, scale, channels, slots, team);
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
    const int terms = z.has_value() ? 2 : 1;
    const bool aligned = is_aligned(grad_input.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr());
    const Tiles<kVector<T>> tiles = cut_tiles<kVector<T>>(layout, kVector<T>, aligned, terms * sizeof(A));
    const int64_t slots_per_channel = slots(tiles);
    // A single slot per channel holds the sum already.
    const bool summed = terms == 1 && slots_per_channel == 1;
    const Tensor partials =
        summed ? grad_scale : torch::stable::new_empty(s, {terms, layout.channels, slots_per_channel});
    const auto launch = z.has_value() ? launch_backward<true, T> : launch_backward<false, T>;
    launch(mutable_data<T>(grad_input), mutable_data<A>(partials), const_data<T>(g), const_data<T>(x), const_data<A>(s),
           z.has_value() ? const_data<A>(*z) : nullptr, quant_min, quant_max, tiles, stream);
    if (summed) return;
    launch_finish(mutable_data<A>(grad_scale), z.has_value() ? mutable_data<A>(grad_zero_point) : nullptr,
                  const_data<A>(partials), const_data<A>(s), layout.channels, slots_per_channel, stream);
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
