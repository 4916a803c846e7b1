// Mixture of K quantizers on CUDA: one sweep forward, one sweep backward for all gradients, whatever K is.
// `asga/ops/reference.py` is the definition.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../quant_math.h"
#include "launch.h"
#include "reduce.h"
#include "tiles.h"

namespace asga {
namespace {

// The ranges of the candidates: kernel arguments, so that they cost no register.
template <typename A>
struct Ranges {
  int count;
  A low[kMaxCandidates], high[kMaxCandidates];

  Ranges(const std::vector<int64_t>& quant_mins, const std::vector<int64_t>& quant_maxs)
      : count(static_cast<int>(quant_mins.size())), low{}, high{} {
    std::copy(quant_mins.begin(), quant_mins.end(), low);
    std::copy(quant_maxs.begin(), quant_maxs.end(), high);
  }
};

// Loops over candidates run to the compile-time bound, for arrays in registers, and break at the count.
template <typename T, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_kernel(T* __restrict__ output, const T* __restrict__ input, const compute_t<T>* __restrict__ scales,
                   const compute_t<T>* __restrict__ probs, const Ranges<compute_t<T>> ranges, const Cut cut) {
  using A = compute_t<T>;
  const Tile tile = cut.tile();
  A inverse[kMaxCandidates] = {}, weight[kMaxCandidates] = {};
#pragma unroll
  for (int k = 0; k < kMaxCandidates; ++k) {
    if (k >= ranges.count) break;
    const A scale = scales[k * cut.channels + tile.channel];
    inverse[k] = A(1) / scale;
    weight[k] = scale * probs[k];
  }
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    const auto x = load<N>(input + offset);
    A sum[N];
#pragma unroll
    for (int k = 0; k < kMaxCandidates; ++k) {
      if (k >= ranges.count) break;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A scaled = static_cast<A>(x.values[n]) * inverse[k];
        const A term = quantize(scaled, ranges.low[k], ranges.high[k]).rounded * weight[k];
        sum[n] = k == 0 ? term : sum[n] + term;
      }
    }
    Vector<T, N> y;
#pragma unroll
    for (int n = 0; n < N; ++n) y.values[n] = static_cast<T>(sum[n]);
    store(output + offset, y);
  });
}

// partials[2 k] collects the terms of candidate k's scale gradient, partials[2 k + 1] those of its
// probability, both still without the factors that are the same for a whole channel.
template <typename T, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_kernel(T* __restrict__ grad_input, compute_t<T>* __restrict__ partials, const T* __restrict__ grad,
                    const T* __restrict__ input, const compute_t<T>* __restrict__ scales,
                    const compute_t<T>* __restrict__ probs, const Ranges<compute_t<T>> ranges, const Cut cut) {
  using A = compute_t<T>;
  const Tile tile = cut.tile();
  A inverse[kMaxCandidates] = {}, prob[kMaxCandidates] = {};
#pragma unroll
  for (int k = 0; k < kMaxCandidates; ++k) {
    if (k >= ranges.count) break;
    inverse[k] = A(1) / scales[k * cut.channels + tile.channel];
    prob[k] = probs[k];
  }
  A terms[2 * kMaxCandidates] = {};
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    const auto x = load<N>(input + offset);
    const auto g = load<N>(grad + offset);
    A passed[N] = {};
#pragma unroll
    for (int k = 0; k < kMaxCandidates; ++k) {
      if (k >= ranges.count) break;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A scaled = static_cast<A>(x.values[n]) * inverse[k], g_n = static_cast<A>(g.values[n]);
        const Quantized<A> q = quantize(scaled, ranges.low[k], ranges.high[k]);
        passed[n] += q.inside() ? prob[k] : A(0);
        terms[2 * k] += g_n * q.scale_term();
        terms[2 * k + 1] += g_n * q.rounded;
      }
    }
    Vector<T, N> dx;
#pragma unroll
    for (int n = 0; n < N; ++n) dx.values[n] = static_cast<T>(static_cast<A>(g.values[n]) * passed[n]);
    store(grad_input + offset, dx);
  });
  cut.reduce(terms, 2 * ranges.count, tile, partials);
}

// grad_probs[k] = sum over the channels of scales[k] times the sum of partials[2 k + 1]. One block per
// candidate.
template <typename A>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sum_probs_kernel(A* __restrict__ grad_probs, const A* __restrict__ partials, const A* __restrict__ scales,
                     int64_t channels, int64_t slots) {
  const int64_t k = blockIdx.x;
  const A* mine = partials + (2 * k + 1) * channels * slots;
  double total = 0.0;
  for (int64_t j = threadIdx.x; j < channels * slots; j += kThreads) {
    total += static_cast<double>(mine[j]) * static_cast<double>(scales[k * channels + j / slots]);
  }
  total = team_sum(total, kThreads);
  if (threadIdx.x == 0) grad_probs[k] = static_cast<A>(total);
}

template <typename T>
void launch_forward(T* output, const T* input, const compute_t<T>* scales, const compute_t<T>* probs,
                    const Ranges<compute_t<T>>& ranges, const ChannelLayout& layout, cudaStream_t stream) {
  std::visit(
      [&](const auto& cut) {
        forward_kernel<<<cut.grid(), kThreads, 0, stream>>>(output, input, scales, probs, ranges, cut);
      },
      cut_tiles(layout, kVector<T>, is_aligned(output, input)));
  ASGA_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch_backward(T* grad_input, compute_t<T>* partials, const T* grad, const T* input, const compute_t<T>* scales,
                     const compute_t<T>* probs, const Ranges<compute_t<T>>& ranges, const Tiles& tiles,
                     cudaStream_t stream) {
  std::visit(
      [&](const auto& cut) {
        backward_kernel<<<cut.grid(), kThreads, 0, stream>>>(grad_input, partials, grad, input, scales, probs, ranges,
                                                             cut);
      },
      tiles);
  ASGA_CUDA_CHECK(cudaGetLastError());
}

template <typename A>
void launch_sum_probs(A* grad_probs, const A* partials, const A* scales, int candidates, int64_t channels,
                      int64_t slots, cudaStream_t stream) {
  sum_probs_kernel<<<candidates, kThreads, 0, stream>>>(grad_probs, partials, scales, channels, slots);
  ASGA_CUDA_CHECK(cudaGetLastError());
}

int check_candidates(const std::vector<int64_t>& quant_mins, const std::vector<int64_t>& quant_maxs) {
  STD_TORCH_CHECK(!quant_mins.empty() && quant_mins.size() <= kMaxCandidates, "quant_mins has ", quant_mins.size(),
                  " candidates; between 1 and ", kMaxCandidates, " are supported");
  STD_TORCH_CHECK(quant_maxs.size() == quant_mins.size(), "quant_maxs has ", quant_maxs.size(),
                  " entries but quant_mins has ", quant_mins.size());
  return static_cast<int>(quant_mins.size());
}

void check_symmetric(const std::optional<Tensor>& zero_points) {
  STD_TORCH_CHECK(!zero_points.has_value(), "zero_points is given, but mixtures on CUDA are symmetric");
}

Tensor mixed_fake_quant(const Tensor& input, const Tensor& scales, const Tensor& probs,
                        const std::optional<Tensor>& zero_points, const std::vector<int64_t>& quant_mins,
                        const std::vector<int64_t>& quant_maxs, std::optional<int64_t> axis) {
  check_symmetric(zero_points);
  const ScalarType type = compute_type(input);
  const int candidates = check_candidates(quant_mins, quant_maxs);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = to_dense(input);
  const ChannelLayout layout = channel_layout(x, axis);
  const Tensor s = to_parameter("scales", scales, input, candidates * layout.channels, type);
  const Tensor p = to_parameter("probs", probs, input, candidates, type);
  const Tensor output = empty_as(x);
  if (x.numel() == 0) return output;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    launch_forward(mutable_data<T>(output), const_data<T>(x), const_data<A>(s), const_data<A>(p),
                   Ranges<A>(quant_mins, quant_maxs), layout, current_stream(x));
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixed_fake_quant_backward(const Tensor& grad, const Tensor& input,
                                                                     const Tensor& scales, const Tensor& probs,
                                                                     const std::optional<Tensor>& zero_points,
                                                                     const std::vector<int64_t>& quant_mins,
                                                                     const std::vector<int64_t>& quant_maxs,
                                                                     std::optional<int64_t> axis) {
  check_symmetric(zero_points);
  const ScalarType type = compute_type(input);
  const int candidates = check_candidates(quant_mins, quant_maxs);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = to_dense(input);
  const ChannelLayout layout = channel_layout(x, axis);
  const Tensor s = to_parameter("scales", scales, input, candidates * layout.channels, type);
  const Tensor p = to_parameter("probs", probs, input, candidates, type);
  check_same_device("grad", grad, input);
  check_same_shape("grad", grad, input);
  const Tensor none = torch::stable::new_empty(scales, {0});
  if (x.numel() == 0) return {empty_as(x), zeros_like(scales), zeros_like(probs), none};
  const Tensor g = to_layout_of(x, grad);
  const Tensor grad_input = empty_as(x);
  const Tensor grad_scales = empty_as(s);
  const Tensor grad_probs = empty_as(p);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    const cudaStream_t stream = current_stream(x);
    const Tiles tiles =
        cut_tiles(layout, kVector<T>, is_aligned(grad_input.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr()));
    const Tensor partials = torch::stable::new_empty(s, {candidates, 2, layout.channels, slots(tiles)});
    launch_backward(mutable_data<T>(grad_input), mutable_data<A>(partials), const_data<T>(g), const_data<T>(x),
                    const_data<A>(s), const_data<A>(p), Ranges<A>(quant_mins, quant_maxs), tiles, stream);
    launch_sum_slots(mutable_data<A>(grad_scales), const_data<A>(partials), const_data<A>(p), candidates,
                     layout.channels, 2, slots(tiles), stream);
    launch_sum_probs(mutable_data<A>(grad_probs), const_data<A>(partials), const_data<A>(s), candidates,
                     layout.channels, slots(tiles), stream);
  });
  return {grad_input, to_layout_of(scales, grad_scales), to_layout_of(probs, grad_probs), none};
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CUDA, m) {
  m.impl("mixed_fake_quant", TORCH_BOX(&asga::mixed_fake_quant));
  m.impl("mixed_fake_quant_backward", TORCH_BOX(&asga::mixed_fake_quant_backward));
}
