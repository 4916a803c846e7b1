// Mixture of K quantizers on CUDA: one sweep forward, one sweep backward for all gradients, whatever K is.
// `asga/ops/reference.py` is the definition.
//
// Arithmetic is as scarce here as bandwidth, so the loops are written for few instructions: for a value and candidate
// seven forward (multiply, two bounds, two additions that round, multiply, add) and ten backward.
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

// 1/scale and, with zero points, the bounds of up to K candidates for the C channels that a thread meets.
template <typename A, int K, int C, bool kOffset>
struct Grids {
  A inverse[K][C];
  A low[kOffset ? K : 1][C], high[kOffset ? K : 1][C];

  __device__ void read(int k, int c, A scale, const A* zero_point, const Ranges<A>& ranges) {
    inverse[k][c] = A(1) / scale;
    if constexpr (kOffset) {
      const A offset = round_half_even(*zero_point);
      low[k][c] = ranges.low[k] - offset;
      high[k][c] = ranges.high[k] - offset;
    }
  }
  __device__ Quantized<A> quantize(A x, int k, int c, const Ranges<A>& ranges) const {
    if constexpr (kOffset) {
      return asga::quantize(x * inverse[k][c], low[k][c], high[k][c]);
    } else {
      return asga::quantize(x * inverse[k][c], ranges.low[k], ranges.high[k]);
    }
  }
};

// Vectors of columns: what the registers have room for, with the sums of each candidate and column.
template <typename T, bool kOffset>
constexpr int kColumns = sizeof(T) == 2 && !kOffset ? 2 : 1;

// Loops over candidates run to the compile-time bound K, for arrays in registers, and break at the count.
template <typename T, int K, bool kOffset, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks<compute_t<T>>)
    forward_kernel(T* __restrict__ output, const T* __restrict__ input, const compute_t<T>* __restrict__ scales,
                   const compute_t<T>* __restrict__ probs, const compute_t<T>* __restrict__ zero_points,
                   const Ranges<compute_t<T>> ranges, const Cut cut) {
  using A = compute_t<T>;
  constexpr int C = Cut::kChannels;
  const auto tile = cut.tile();
  Grids<A, K, C, kOffset> grids;
  A weight[K][C];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= ranges.count) break;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t j = k * cut.channels + cut.channel(tile, c);
      const A scale = scales[j];
      grids.read(k, c, scale, zero_points + j, ranges);
      weight[k][c] = scale * probs[k];
    }
  }
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    A x[N], y[N];
    widen(load<N>(input + offset), x);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= ranges.count) break;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A term = grids.quantize(x[n], k, n % C, ranges).rounded * weight[k][n % C];
        y[n] = k == 0 ? term : y[n] + term;
      }
    }
    store(output + offset, narrow<A, T, N>(y));
  });
}

// Of candidate k, partials[terms k] collects the terms of the scale's gradient, partials[terms k + 1] those of the
// probability's and, with zero points, partials[terms k + 2] the gradients outside the range; all of them without the
// factors that are the same for a whole channel.
template <typename T, int K, bool kOffset, typename Cut>
__global__ void __launch_bounds__(kThreads, kMinBlocks<compute_t<T>>)
    backward_kernel(T* __restrict__ grad_input, compute_t<T>* __restrict__ partials, const T* __restrict__ grad,
                    const T* __restrict__ input, const compute_t<T>* __restrict__ scales,
                    const compute_t<T>* __restrict__ probs, const compute_t<T>* __restrict__ zero_points,
                    const Ranges<compute_t<T>> ranges, const Cut cut) {
  using A = compute_t<T>;
  constexpr int C = Cut::kChannels, kTerms = kOffset ? 3 : 2;
  const auto tile = cut.tile();
  Grids<A, K, C, kOffset> grids;
  A prob[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= ranges.count) break;
    prob[k] = probs[k];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t j = k * cut.channels + cut.channel(tile, c);
      grids.read(k, c, scales[j], zero_points + j, ranges);
    }
  }
  A terms[kTerms * K][C] = {};
  cut.template for_each<kVector<T>>(tile, [&](int64_t offset, auto width) {
    constexpr int N = decltype(width)::value;
    A x[N], g[N], passed[N] = {};
    widen(load<N>(input + offset), x);
    widen(load<N>(grad + offset), g);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= ranges.count) break;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        A* const sums = &terms[kTerms * k][n % C];
        const Quantized<A> q = grids.quantize(x[n], k, n % C, ranges);
        // Additions under a condition are one instruction each (selections would come on top), provided that the
        // rounded value is not needed after its residual. In sums, whose order is free, a fused multiply-add saves
        // another instruction and rounds less.
        sums[C] = fma(g[n], q.rounded, sums[C]);
        A residual = q.rounded;
        if (q.inside()) {
          passed[n] += prob[k];
          residual -= q.scaled;
        } else if constexpr (kOffset) {
          sums[2 * C] += g[n];
        }
        sums[0] = fma(g[n], residual, sums[0]);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) passed[n] *= g[n];
    store(grad_input + offset, narrow<A, T, N>(passed));
  });
  cut.reduce(terms, kTerms * ranges.count, tile, partials);
}

// All gradients of parameters from partials[candidate][term][channel][slot], in one launch. The first blocks have one
// team for each candidate, channel and gradient of a scale or zero point. The last blocks have one candidate each: the
// gradient of its probability sums over the channels, too.
template <typename A>
__global__ void __launch_bounds__(kThreads, kMinBlocks<A>)
    finish_kernel(A* __restrict__ grad_scales, A* __restrict__ grad_probs, A* __restrict__ grad_zero_points,
                  const A* __restrict__ partials, const A* __restrict__ scales, const A* __restrict__ probs,
                  int candidates, int64_t channels, int64_t slots, int team) {
  const int terms = grad_zero_points == nullptr ? 2 : 3;
  const int64_t count = candidates * channels, first_prob = gridDim.x - candidates;
  if (blockIdx.x >= first_prob) {
    const int64_t k = blockIdx.x - first_prob;
    const A* mine = partials + (terms * k + 1) * channels * slots;
    const A* scale = scales + k * channels;
    const double total = team_sum(channels * slots, kThreads, [&](int64_t j) {
      return static_cast<double>(mine[j]) * static_cast<double>(scale[channels == 1 ? 0 : j / slots]);
    });
    if (threadIdx.x == 0) grad_probs[k] = static_cast<A>(total);
    return;
  }
  int64_t sum = blockIdx.x * int64_t{kThreads / team} + threadIdx.x / team;
  if (sum >= (terms - 1) * count) return;  // whole teams
  const bool of_scale = sum < count;
  if (!of_scale) sum -= count;
  const int64_t k = sum / channels, channel = sum - k * channels;
  const A* mine = partials + ((terms * k + (of_scale ? 0 : 2)) * channels + channel) * slots;
  double total = team_sum(slots, team, [&](int64_t slot) { return static_cast<double>(mine[slot]); });
  if (threadIdx.x % team != 0) return;
  total *= static_cast<double>(probs[k]);
  if (of_scale) {
    grad_scales[sum] = static_cast<A>(total);
  } else {
    grad_zero_points[sum] = static_cast<A>(total * -static_cast<double>(scales[sum]));
  }
}

// Calls `launch` with the smallest bound of the compiled loops that holds so many candidates. Five are the default of
// the search; fewer registers than for eight let more threads run at once. Nobody trains in float64.
template <typename A, typename F>
void with_bound(int candidates, const F& launch) {
  if (candidates <= 5 && sizeof(A) < 8) {
    launch(std::integral_constant<int, sizeof(A) < 8 ? 5 : kMaxCandidates>{});
  } else {
    launch(std::integral_constant<int, kMaxCandidates>{});
  }
}

template <bool kOffset, typename T>
void launch_forward(T* output, const T* input, const compute_t<T>* scales, const compute_t<T>* probs,
                    const compute_t<T>* zero_points, const Ranges<compute_t<T>>& ranges, const ChannelLayout& layout,
                    cudaStream_t stream) {
  const auto tiles = cut_tiles<kColumns<T, kOffset>>(layout, kVector<T>, is_aligned(output, input), 0);
  with_bound<compute_t<T>>(ranges.count, [&](auto bound) {
    std::visit(
        [&](const auto& cut) {
          forward_kernel<T, decltype(bound)::value, kOffset>
              <<<cut.grid(), kThreads, 0, stream>>>(output, input, scales, probs, zero_points, ranges, cut);
        },
        tiles);
  });
  ASGA_CUDA_CHECK(cudaGetLastError());
}

template <bool kOffset, typename AnyTiles, typename T>
void launch_backward(T* grad_input, compute_t<T>* partials, const T* grad, const T* input, const compute_t<T>* scales,
                     const compute_t<T>* probs, const compute_t<T>* zero_points, const Ranges<compute_t<T>>& ranges,
                     const AnyTiles& tiles, cudaStream_t stream) {
  with_bound<compute_t<T>>(ranges.count, [&](auto bound) {
    std::visit(
        [&](const auto& cut) {
          backward_kernel<T, decltype(bound)::value, kOffset><<<cut.grid(), kThreads, 0, stream>>>(
              grad_input, partials, grad, input, scales, probs, zero_points, ranges, cut);
        },
        tiles);
  });
  ASGA_CUDA_CHECK(cudaGetLastError());
}

template <typename A>
void launch_finish(A* grad_scales, A* grad_probs, A* grad_zero_points, const A* partials, const A* scales,
                   const A* probs, int candidates, int64_t channels, int64_t slots, cudaStream_t stream) {
  const int team = team_for(slots);
  const int64_t sums = (grad_zero_points == nullptr ? 1 : 2) * candidates * channels;
  const auto blocks = static_cast<unsigned>(ceil_div(sums, kThreads / team) + candidates);
  finish_kernel<<<blocks, kThreads, 0, stream>>>(grad_scales, grad_probs, grad_zero_points, partials, scales, probs,
                                                 candidates, channels, slots, team);
  ASGA_CUDA_CHECK(cudaGetLastError());
}

int check_candidates(const std::vector<int64_t>& quant_mins, const std::vector<int64_t>& quant_maxs) {
  STD_TORCH_CHECK(!quant_mins.empty() && quant_mins.size() <= kMaxCandidates, "quant_mins has ", quant_mins.size(),
                  " candidates; between 1 and ", kMaxCandidates, " are supported");
  STD_TORCH_CHECK(quant_maxs.size() == quant_mins.size(), "quant_maxs has ", quant_maxs.size(),
                  " entries but quant_mins has ", quant_mins.size());
  return static_cast<int>(quant_mins.size());
}

// Calls `run` with whether there are zero points, at compile time.
template <typename F>
void with_offset(bool offset, const F& run) {
  if (offset) {
    run(std::true_type{});
  } else {
    run(std::false_type{});
  }
}

Tensor mixed_fake_quant(const Tensor& input, const Tensor& scales, const Tensor& probs,
                        const std::optional<Tensor>& zero_points, const std::vector<int64_t>& quant_mins,
                        const std::vector<int64_t>& quant_maxs, std::optional<int64_t> axis) {
  const ScalarType type = compute_type(input);
  const int candidates = check_candidates(quant_mins, quant_maxs);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = to_dense(input);
  const ChannelLayout layout = channel_layout(x, axis);
  const Tensor s = to_parameter("scales", scales, input, candidates * layout.channels, type);
  const Tensor p = to_parameter("probs", probs, input, candidates, type);
  std::optional<Tensor> z;
  if (zero_points.has_value()) {
    z = to_parameter("zero_points", *zero_points, input, candidates * layout.channels, type);
  }
  const Tensor output = empty_as(x);
  if (x.numel() == 0) return output;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    with_offset(z.has_value(), [&](auto offset) {
      launch_forward<decltype(offset)::value>(mutable_data<T>(output), const_data<T>(x), const_data<A>(s),
                                              const_data<A>(p), z.has_value() ? const_data<A>(*z) : nullptr,
                                              Ranges<A>(quant_mins, quant_maxs), layout, current_stream(x));
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixed_fake_quant_backward(const Tensor& grad, const Tensor& input,
                                                                     const Tensor& scales, const Tensor& probs,
                                                                     const std::optional<Tensor>& zero_points,
                                                                     const std::vector<int64_t>& quant_mins,
                                                                     const std::vector<int64_t>& quant_maxs,
                                                                     std::optional<int64_t> axis) {
  const ScalarType type = compute_type(input);
  const int candidates = check_candidates(quant_mins, quant_maxs);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = to_dense(input);
  const ChannelLayout layout = channel_layout(x, axis);
  const Tensor s = to_parameter("scales", scales, input, candidates * layout.channels, type);
  const Tensor p = to_parameter("probs", probs, input, candidates, type);
  std::optional<Tensor> z;
  if (zero_points.has_value()) {
    z = to_parameter("zero_points", *zero_points, input, candidates * layout.channels, type);
  }
  check_same_device("grad", grad, input);
  check_same_shape("grad", grad, input);
  if (x.numel() == 0) {
    return {empty_as(x), zeros_like(scales), zeros_like(probs),
            zero_points.has_value() ? zeros_like(*zero_points) : torch::stable::new_empty(scales, {0})};
  }
  const Tensor g = to_layout_of(x, grad);
  const Tensor grad_input = empty_as(x);
  const Tensor grad_scales = empty_as(s);
  const Tensor grad_probs = empty_as(p);
  const Tensor grad_zero_points = z.has_value() ? empty_as(*z) : torch::stable::new_empty(scales, {0});
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    const cudaStream_t stream = current_stream(x);
    const bool aligned = is_aligned(grad_input.const_data_ptr(), g.const_data_ptr(), x.const_data_ptr());
    with_offset(z.has_value(), [&](auto offset) {
      constexpr bool kOffset = decltype(offset)::value;
      const int terms = kOffset ? 3 : 2;
      const auto tiles = cut_tiles<kColumns<T, kOffset>>(layout, kVector<T>, aligned, candidates * terms * sizeof(A));
      const int64_t slots_per_channel = slots(tiles);
      const Tensor partials = torch::stable::new_empty(s, {candidates, terms, layout.channels, slots_per_channel});
      launch_backward<kOffset>(mutable_data<T>(grad_input), mutable_data<A>(partials), const_data<T>(g),
                               const_data<T>(x), const_data<A>(s), const_data<A>(p),
                               kOffset ? const_data<A>(*z) : nullptr, Ranges<A>(quant_mins, quant_maxs), tiles, stream);
      launch_finish(mutable_data<A>(grad_scales), mutable_data<A>(grad_probs),
                    kOffset ? mutable_data<A>(grad_zero_points) : nullptr, const_data<A>(partials), const_data<A>(s),
                    const_data<A>(p), candidates, layout.channels, slots_per_channel, stream);
    });
  });
  return {grad_input, to_layout_of(scales, grad_scales), to_layout_of(probs, grad_probs),
          z.has_value() ? to_layout_of(*zero_points, grad_zero_points) : grad_zero_points};
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CUDA, m) {
  m.impl("mixed_fake_quant", TORCH_BOX(&asga::mixed_fake_quant));
  m.impl("mixed_fake_quant_backward", TORCH_BOX(&asga::mixed_fake_quant_backward));
}
