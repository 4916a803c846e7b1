// The operators of the fused ASGA step on CUDA: every sweep over the tensors of its lists is one launch, and so are the
// operators of a few scalars. The host reads nothing from the device. `asga/ops/sam_reference.py` is the definition.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "launch.h"
#include "reduce.h"
#include "tensor_lists.h"

namespace asga {
namespace {

using Tensors = std::vector<Tensor>;

// Operands by their numbers in the tables; an operator has the first few of them.
enum Operand { kGrad, kTheta, kFirst, kBackup, kMoment, kSquare, kSizes, kAdamOperands };
constexpr int kNormOperands = kTheta + 1, kDotsOperands = kFirst + 1, kPerturbOperands = kBackup + 1,
              kCombineOperands = kBackup + 1, kSgdOperands = kMoment + 1;
static_assert(sizeof(FlatTable<kAdamOperands>) + 256 <= 32764, "kernel arguments take no more");

// <g0, g0>, <g0, g1>, <g1, g1>, and that of T g0 and T g1.
constexpr int kDots = 4;

// Adds up the terms of all threads and writes those of the block to partials[term][slots], in float64.
template <typename A, int N>
__device__ __forceinline__ void reduce_block(const A (&terms)[N], const double (&factors)[N], double* partials,
                                             int64_t slot, int64_t slots) {
  __shared__ A warps[kThreads / kWarp][N];
#pragma unroll
  for (int t = 0; t < N; ++t) {
    const A total = warp_sum(terms[t]);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp][t] = total;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int t = 0; t < N; ++t) {
    A total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w][t];
    partials[t * slots + slot] = factors[t] == 0.0 ? 0.0 : factors[t] * static_cast<double>(total);  // 0 * Inf is NaN
  }
}

template <typename A, typename T, typename G, template <int> typename List>
__global__ void __launch_bounds__(kThreads, kMinBlocks<A>)
    norm_kernel(const __grid_constant__ List<kNormOperands> list, double* __restrict__ partials, int64_t slots) {
  const Sweep<A, T, G, kNormOperands, List> sweep(list);
  const bool adaptive = sweep.has(kTheta);
  A terms[1] = {};
  sweep.for_each([&](const auto& place, auto width) {
    constexpr int N = decltype(width)::value;
    A g[N];
    sweep.read_grad(kGrad, place, g);
    if (adaptive) {
      A theta[N];
      sweep.read(kTheta, place, theta);
#pragma unroll
      for (int n = 0; n < N; ++n) g[n] = theta[n] * g[n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) terms[0] += g[n] * g[n];
  });
  const double scale = sweep.rho_scale();
  reduce_block(terms, {scale * scale}, partials, sweep.slot(), slots);
}

// theta <- theta + s T^2 g, and what was there before to the backups and the copies of the gradients. Without a theta,
// or where s T^2 is 0, only copies.
template <typename A, typename T, typename G, template <int> typename List>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ List<kPerturbOperands> list,
                                                           const double* __restrict__ step, bool adaptive) {
  const Sweep<A, T, G, kPerturbOperands, List> sweep(list);
  const double scale = sweep.rho_scale();
  const A size = static_cast<A>(*step * (scale * scale));
  const bool keeps = sweep.has(kFirst), perturbed = scale != 0, moves = perturbed && size != 0;
  sweep.for_each([&](const auto& place, auto width) {
    constexpr int N = decltype(width)::value;
    A theta[N], g[N];
    if (moves) {
      sweep.read(kTheta, place, theta);
      sweep.read_grad(kGrad, place, g);
    }
    if (keeps) sweep.template copy_grad<N>(kGrad, kFirst, place);
    if (perturbed) sweep.template copy<N>(kTheta, kBackup, place);
    if (!moves) return;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A direction = adaptive ? (theta[n] * theta[n]) * g[n] : g[n];
      theta[n] = theta[n] + size * direction;
    }
    sweep.write(kTheta, place, theta);
  });
}

// Theta is there only where the last term differs from the second.
template <typename A, typename T, typename G, template <int> typename List>
__global__ void __launch_bounds__(kThreads, kMinBlocks<A>)
    dots_kernel(const __grid_constant__ List<kDotsOperands> list, double* __restrict__ partials, int64_t slots) {
  const Sweep<A, T, G, kDotsOperands, List> sweep(list);
  const bool both = sweep.has(kFirst), in_metric = both && sweep.has(kTheta);
  A terms[kDots] = {};
  sweep.for_each([&](const auto& place, auto width) {
    constexpr int N = decltype(width)::value;
    A g1[N], g0[N];
    sweep.read_grad(kGrad, place, g1);
    if (both) sweep.read_grad(kFirst, place, g0);
#pragma unroll
    for (int n = 0; n < N; ++n) terms[2] += g1[n] * g1[n];
    if (!both) return;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      terms[0] += g0[n] * g0[n];
      terms[1] += g0[n] * g1[n];
    }
    if (!in_metric) return;
    A theta[N];
    sweep.read(kTheta, place, theta);
#pragma unroll
    for (int n = 0; n < N; ++n) terms[3] += (theta[n] * g0[n]) * (theta[n] * g1[n]);
  });
  if (!in_metric) terms[3] = terms[1];
  const double scale = sweep.rho_scale();
  reduce_block(terms, {1.0, 1.0, 1.0, scale * scale}, partials, sweep.slot(), slots);
}

// One block for each sum over partials[term][slots].
__global__ void __launch_bounds__(kThreads)
    finish_kernel(double* __restrict__ totals, const double* __restrict__ partials, int64_t slots) {
  const double* mine = partials + blockIdx.x * slots;
  const double total = team_sum(slots, kThreads, [&](int64_t slot) { return mine[slot]; });
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// d = c0 g0 + c1 g1, and whether anything but the restored weights may be written.
template <typename A>
struct Combination {
  A c0, c1;
  bool valid;

  __device__ __forceinline__ explicit Combination(const double* coefficients)
      : c0(static_cast<A>(coefficients[0])), c1(static_cast<A>(coefficients[1])), valid(coefficients[2] != 0.0) {}

  template <typename Sweep, typename Place, int N>
  __device__ __forceinline__ void read(const Sweep& sweep, const Place& place, A (&d)[N]) const {
    sweep.read_grad(kGrad, place, d);
#pragma unroll
    for (int n = 0; n < N; ++n) d[n] = c1 * d[n];
    if (!sweep.has(kFirst)) return;
    A first[N];
    sweep.read_grad(kFirst, place, first);
#pragma unroll
    for (int n = 0; n < N; ++n) d[n] = c0 * first[n] + d[n];
  }
};

template <typename Sweep>
__device__ __forceinline__ void restore(const Sweep& sweep) {
  if (sweep.data(kTheta) == sweep.data(kBackup)) return;
  sweep.for_each(
      [&](const auto& place, auto width) { sweep.template copy<decltype(width)::value>(kBackup, kTheta, place); });
}

// theta - move, and theta to the bit where the move is zero: -0.0 - (-0.0) would be 0.0.
template <typename A>
__device__ __forceinline__ A subtract(A theta, A move) {
  return move == A(0) ? theta : theta - move;
}

template <typename A, typename T, typename G, template <int> typename List>
__global__ void __launch_bounds__(kThreads, kMinBlocks<A>)
    combine_kernel(const __grid_constant__ List<kCombineOperands> list, const double* __restrict__ coefficients) {
  const Sweep<A, T, G, kCombineOperands, List> sweep(list);
  const Combination<A> of(coefficients);
  if (!of.valid) return restore(sweep);
  const bool moved = sweep.data(kTheta) != sweep.data(kBackup);
  sweep.for_each([&](const auto& place, auto width) {
    constexpr int N = decltype(width)::value;
    A d[N];
    of.read(sweep, place, d);
    if (moved) sweep.template copy<N>(kBackup, kTheta, place);
    sweep.write_grad(kGrad, place, d);
  });
}

struct SgdOptions {
  const double* lr_tensor;  // null: lr
  double lr, momentum, weight_decay;
  bool nesterov;
};

template <typename A, typename T, typename G, template <int> typename List>
__global__ void __launch_bounds__(kThreads, kMinBlocks<A>)
    sgd_kernel(const __grid_constant__ List<kSgdOperands> list, const double* __restrict__ coefficients,
               const SgdOptions options) {
  const Sweep<A, T, G, kSgdOperands, List> sweep(list);
  const Combination<A> of(coefficients);
  if (!of.valid) return restore(sweep);
  const A lr = static_cast<A>(options.lr_tensor == nullptr ? options.lr : *options.lr_tensor);
  const A momentum = static_cast<A>(options.momentum), weight_decay = static_cast<A>(options.weight_decay);
  const bool has_momentum = sweep.has(kMoment), nesterov = options.nesterov;
  sweep.for_each([&](const auto& place, auto width) {
    constexpr int N = decltype(width)::value;
    A theta[N], d[N];
    sweep.read(kBackup, place, theta);
    of.read(sweep, place, d);
    if (weight_decay != 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) d[n] = d[n] + weight_decay * theta[n];
    }
    if (has_momentum) {
      A buffer[N];
      sweep.read(kMoment, place, buffer);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        buffer[n] = momentum * buffer[n] + d[n];
        d[n] = nesterov ? d[n] + momentum * buffer[n] : buffer[n];
      }
      sweep.write(kMoment, place, buffer);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) theta[n] = subtract(theta[n], lr * d[n]);
    sweep.write(kTheta, place, theta);
  });
}

struct AdamOptions {
  const double* lr_tensor;  // null: lr
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;

  __device__ __forceinline__ double rate() const { return lr_tensor == nullptr ? lr : *lr_tensor; }
};

// What the bias corrections of one tensor come to: lr / (1 - beta1^t) and sqrt(1 - beta2^t).
struct alignas(16) AdamSizes {
  double size, root;
};

constexpr int kStepTableSize = 2048;
struct StepTable {
  float* steps[kStepTableSize];
  int count;
};
static_assert(sizeof(StepTable) + 256 <= 32764, "kernel arguments take no more");

// One thread per tensor counts its step. Before the sweep: there, one block would count while others still read.
__global__ void __launch_bounds__(kThreads)
    adam_sizes_kernel(AdamSizes* __restrict__ sizes, const __grid_constant__ StepTable table,
                      const double* __restrict__ coefficients, const AdamOptions options) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= table.count) return;
  float& step = *table.steps[i];
  const double count = static_cast<double>(step) + 1.0;
  sizes[i] = {options.rate() / (1.0 - pow(options.beta1, count)), sqrt(1.0 - pow(options.beta2, count))};
  if (coefficients[2] != 0.0) step += 1.0f;
}

template <typename A, typename T, typename G, template <int> typename List>
__global__ void __launch_bounds__(kThreads, kMinBlocks<A>)
    adam_kernel(const __grid_constant__ List<kAdamOperands> list, const double* __restrict__ coefficients,
                const AdamOptions options) {
  const Sweep<A, T, G, kAdamOperands, List> sweep(list);
  const Combination<A> of(coefficients);
  if (!of.valid) return restore(sweep);
  const auto& sizes = *reinterpret_cast<const AdamSizes*>(sweep.data(kSizes));
  const A size = static_cast<A>(sizes.size), root = static_cast<A>(sizes.root);
  const A beta2 = static_cast<A>(options.beta2), eps = static_cast<A>(options.eps);
  const A rest1 = static_cast<A>(1.0 - options.beta1), rest2 = static_cast<A>(1.0 - options.beta2);
  const bool decays = static_cast<A>(options.weight_decay) != 0, decoupled = options.decoupled;
  const A weight_decay = static_cast<A>(options.weight_decay);
  const A shrink = static_cast<A>(1.0 - options.rate() * options.weight_decay);
  sweep.for_each([&](const auto& place, auto width) {
    constexpr int N = decltype(width)::value;
    A theta[N], d[N], first[N], second[N];
    sweep.read(kBackup, place, theta);
    of.read(sweep, place, d);
    sweep.read(kMoment, place, first);
    sweep.read(kSquare, place, second);
    if (decays) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (decoupled)
          theta[n] = theta[n] * shrink;
        else
          d[n] = d[n] + weight_decay * theta[n];
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      first[n] = first[n] + rest1 * (d[n] - first[n]);
      second[n] = beta2 * second[n] + (rest2 * d[n]) * d[n];
      theta[n] = subtract(theta[n], (size * first[n]) / (sqrt(second[n]) / root + eps));
    }
    sweep.write(kMoment, place, first);
    sweep.write(kSquare, place, second);
    sweep.write(kTheta, place, theta);
  });
}

__global__ void ascent_step_kernel(double* result, const double* q0, const double* rho, const double* grad_scale,
                                   double shift, bool relative) {
  const double q = *q0;
  const double step = *rho / sqrt(q);
  const double shifted = relative ? step * (1.0 - shift) : step - (grad_scale == nullptr ? shift : shift / *grad_scale);
  *result = isfinite(q) && q > 0 ? shifted : 0.0;
}

// The variants in the order of `asga.ops.sam_library.VARIANTS`.
enum Variant { kSam, kAligned, kGsam, kConflict, kVariants };

// Pointers are null where there is nothing.
struct Decision {
  const double *q0, *step, *dots, *losses, *grad_scale, *found_inf;
  double* rho;
  int64_t* counts;
  int known_losses, variant;
  double weight;
  bool clips;
  double max_norm;
  bool follow_gap;
  double rho_min, rho_max;
};

__global__ void coefficients_kernel(double* result, const Decision of) {
  const double q = *of.q0, inverse = of.grad_scale == nullptr ? 1.0 : 1.0 / *of.grad_scale;
  double dot[kDots] = {};
  bool valid = isfinite(q) && (of.found_inf == nullptr || *of.found_inf == 0.0);
  for (int i = 0; i < of.known_losses; ++i) valid = valid && isfinite(of.losses[i]);
  if (of.dots != nullptr) {
#pragma unroll
    for (int i = 0; i < kDots; ++i) {
      dot[i] = of.dots[i];
      valid = valid && isfinite(dot[i]);
    }
  }

  double gap = nan("");
  if (of.known_losses == 2)
    gap = of.losses[1] - of.losses[0];
  else if (of.dots != nullptr)
    gap = *of.step * (q + dot[3]) / 2.0 * inverse;

  double c0 = 0.0, c1 = 1.0;
  // k g1 is the component of g0 along g1; a zero g1 has none.
  const double k = dot[2] > 0 ? dot[1] / dot[2] : 0.0;
  if (of.variant == kAligned) {
    c0 = c1 = 0.5;
  } else if (of.variant == kGsam) {
    c0 = -of.weight;
    c1 = 1.0 + of.weight * k;
  } else if (of.variant == kConflict) {
    c0 = 0.5;
    c1 = (1.0 - (k > 0 ? 0.0 : k)) / 2;
  }
  if (of.clips) {
    const double squared = c0 * c0 * dot[0] + 2.0 * c0 * c1 * dot[1] + c1 * c1 * dot[2];
    const double factor = of.max_norm / (sqrt(squared < 0 ? 0.0 : squared) * inverse + 1e-6);
    if (factor < 1) {
      c0 *= factor;
      c1 *= factor;
    }
  }

  if (of.follow_gap && valid && isfinite(gap)) {
    const double target = log1p(gap < 0 ? 0.0 : gap);
    *of.rho = target < of.rho_min ? of.rho_min : target > of.rho_max ? of.rho_max : target;
    of.counts[0] += 1;
    of.counts[1] += target <= of.rho_min;
    of.counts[2] += target >= of.rho_max;
  }
  of.counts[3] += 1;
  of.counts[4] += !valid;
  result[0] = c0 * inverse;
  result[1] = c1 * inverse;
  result[2] = valid ? 1.0 : 0.0;
  result[3] = gap;
}

// A scalar on the device of `like`, or `count` of them, as float64.
double* scalars(const char* name, const Tensor& tensor, const Tensor& like, int64_t count = 1) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index() &&
                      tensor.scalar_type() == ScalarType::Double && tensor.numel() == count && tensor.is_contiguous(),
                  name, " must be a float64 tensor on the device of the others with ", count, " element(s)");
  return mutable_data<double>(tensor);
}

const double* scalar_or_null(const char* name, const std::optional<Tensor>& tensor, const Tensor& like) {
  return tensor.has_value() ? scalars(name, *tensor, like) : nullptr;
}

Tensor new_scalars(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

// Launches `launch` for every list with room for `terms` partial sums, and adds those up.
template <int kOperands, typename Launch>
Tensor sums(TensorLists<kOperands>& lists, const Tensor& like, int terms, std::vector<int64_t> sizes,
            cudaStream_t stream, const Launch& launch) {
  const int64_t slots = lists.cut();
  const Tensor partials = new_scalars(like, {terms, slots}), totals = new_scalars(like, sizes);
  auto* partial = mutable_data<double>(partials);
  auto* total = mutable_data<double>(totals);
  lists.for_each_launch([&](const auto& list, unsigned blocks, auto a, auto t, auto g) {
    launch(list, blocks, a, t, g, partial, slots);
    ASGA_CUDA_CHECK(cudaGetLastError());
  });
  finish_kernel<<<terms, kThreads, 0, stream>>>(total, partial, slots);
  ASGA_CUDA_CHECK(cudaGetLastError());
  return totals;
}

Tensor sam_norm(Tensors params, Tensors grads, std::vector<double> rho_scales, bool adaptive) {
  TensorLists<kNormOperands> lists(params, &rho_scales);
  lists.set_grads(kGrad, "grads", grads);
  if (adaptive) lists.set(kTheta, "params", params);
  for (size_t i = 0; i < params.size(); ++i)
    if (rho_scales[i] == 0) lists.leave_out(i);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  return sums(lists, grads[0], 1, {}, stream,
              [&](const auto& list, unsigned blocks, auto a, auto t, auto g, double* partials, int64_t slots) {
                norm_kernel<decltype(a), decltype(t), decltype(g)>
                    <<<blocks, kThreads, 0, stream>>>(list, partials, slots);
              });
}

Tensor sam_ascent_step(Tensor q0, Tensor rho, std::optional<Tensor> grad_scale, double shift, bool relative) {
  const double *q = scalars("q0", q0, q0), *radius = scalars("rho", rho, q0);
  const double* scale = scalar_or_null("grad_scale", grad_scale, q0);
  const DeviceGuard guard(q0.get_device_index());
  const cudaStream_t stream = current_stream(q0);
  const Tensor result = new_scalars(q0, {});
  auto* step = mutable_data<double>(result);
  ascent_step_kernel<<<1, 1, 0, stream>>>(step, q, radius, scale, shift, relative);
  ASGA_CUDA_CHECK(cudaGetLastError());
  return result;
}

void sam_perturb(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensor step,
                 std::vector<double> rho_scales, bool adaptive) {
  TensorLists<kPerturbOperands> lists(params, &rho_scales);
  lists.set_grads(kGrad, "grads", grads);
  lists.set(kTheta, "params", params);
  lists.set_grads(kFirst, "first_grads", first_grads, true);
  lists.set(kBackup, "backups", backups);
  for (size_t i = 0; first_grads.empty() && i < params.size(); ++i)
    if (rho_scales[i] == 0) lists.leave_out(i);
  const double* s = scalars("step", step, params[0]);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  lists.cut();
  lists.for_each_launch([&](const auto& list, unsigned blocks, auto a, auto t, auto g) {
    perturb_kernel<decltype(a), decltype(t), decltype(g)><<<blocks, kThreads, 0, stream>>>(list, s, adaptive);
    ASGA_CUDA_CHECK(cudaGetLastError());
  });
}

Tensor sam_dots(Tensors params, Tensors first_grads, Tensors grads, std::vector<double> rho_scales, bool adaptive) {
  TensorLists<kDotsOperands> lists(params, &rho_scales);
  lists.set_grads(kGrad, "grads", grads);
  lists.set_grads(kFirst, "first_grads", first_grads, true);
  if (adaptive) lists.set(kTheta, "params", params);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  return sums(lists, grads[0], kDots, {kDots}, stream,
              [&](const auto& list, unsigned blocks, auto a, auto t, auto g, double* partials, int64_t slots) {
                dots_kernel<decltype(a), decltype(t), decltype(g)>
                    <<<blocks, kThreads, 0, stream>>>(list, partials, slots);
              });
}

Tensor sam_coefficients(Tensor q0, Tensor step, std::optional<Tensor> dots, Tensor losses,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Tensor rho, Tensor counts,
                        int64_t variant, double weight, std::optional<double> max_norm, bool follow_gap, double rho_min,
                        double rho_max) {
  constexpr int64_t kCounts = 5;
  STD_TORCH_CHECK(variant >= 0 && variant < kVariants, "variant is ", variant, "; it must be 0 to ", kVariants - 1);
  STD_TORCH_CHECK(dots.has_value() || (variant <= kAligned && !max_norm.has_value()),
                  "dots is None, but the variant or max_norm needs the dot products");
  check_same_device("counts", counts, q0);
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.numel() == kCounts && counts.is_contiguous(),
                  "counts must be an int64 tensor with ", kCounts, " elements");
  const int64_t known = losses.numel();
  STD_TORCH_CHECK(known <= 2, "losses has ", known, " elements; at most two are used");
  const Decision of{scalars("q0", q0, q0),
                    scalars("step", step, q0),
                    dots.has_value() ? scalars("dots", *dots, q0, kDots) : nullptr,
                    scalars("losses", losses, q0, known),
                    scalar_or_null("grad_scale", grad_scale, q0),
                    scalar_or_null("found_inf", found_inf, q0),
                    scalars("rho", rho, q0),
                    mutable_data<int64_t>(counts),
                    static_cast<int>(known),
                    static_cast<int>(variant),
                    weight,
                    max_norm.has_value(),
                    max_norm.value_or(0.0),
                    follow_gap,
                    rho_min,
                    rho_max};
  const DeviceGuard guard(q0.get_device_index());
  const cudaStream_t stream = current_stream(q0);
  const Tensor result = new_scalars(q0, {4});
  auto* out = mutable_data<double>(result);
  coefficients_kernel<<<1, 1, 0, stream>>>(out, of);
  ASGA_CUDA_CHECK(cudaGetLastError());
  return result;
}

// What the three operators that write share: the lists up to the backups.
template <int kOperands>
void set_update(TensorLists<kOperands>& lists, const Tensors& params, const Tensors& backups,
                const Tensors& first_grads, const Tensors& grads) {
  lists.set_grads(kGrad, "grads", grads);
  lists.set(kTheta, "params", params);
  lists.set_grads(kFirst, "first_grads", first_grads, true);
  lists.set(kBackup, "backups", backups);
}

void sam_combine(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensor coefficients) {
  TensorLists<kCombineOperands> lists(params);
  set_update(lists, params, backups, first_grads, grads);
  const double* of = scalars("coefficients", coefficients, params[0], 4);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  lists.cut();
  lists.for_each_launch([&](const auto& list, unsigned blocks, auto a, auto t, auto g) {
    combine_kernel<decltype(a), decltype(t), decltype(g)><<<blocks, kThreads, 0, stream>>>(list, of);
    ASGA_CUDA_CHECK(cudaGetLastError());
  });
}

void sam_sgd(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensors momentum_buffers,
             Tensor coefficients, std::optional<Tensor> lr_tensor, double lr, double momentum, double weight_decay,
             bool nesterov) {
  TensorLists<kSgdOperands> lists(params);
  set_update(lists, params, backups, first_grads, grads);
  lists.set(kMoment, "momentum_buffers", momentum_buffers, true);
  const double* of = scalars("coefficients", coefficients, params[0], 4);
  const SgdOptions options{scalar_or_null("lr_tensor", lr_tensor, params[0]), lr, momentum, weight_decay, nesterov};
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  lists.cut();
  lists.for_each_launch([&](const auto& list, unsigned blocks, auto a, auto t, auto g) {
    sgd_kernel<decltype(a), decltype(t), decltype(g)><<<blocks, kThreads, 0, stream>>>(list, of, options);
    ASGA_CUDA_CHECK(cudaGetLastError());
  });
}

// Counts all steps; returns the sizes of the updates, [params.size(), 2].
Tensor count_steps(const Tensors& steps, const Tensor& like, const double* coefficients, const AdamOptions& options,
                   cudaStream_t stream) {
  for (const Tensor& step : steps)
    STD_TORCH_CHECK(step.is_cuda() && step.get_device_index() == like.get_device_index() &&
                        step.scalar_type() == ScalarType::Float && step.numel() == 1,
                    "steps must hold float32 tensors on the device of params with one element");
  const auto count = static_cast<int64_t>(steps.size());
  const Tensor sizes = new_scalars(like, {count, 2});
  auto* size = reinterpret_cast<AdamSizes*>(mutable_data<double>(sizes));
  for (int64_t first = 0; first < count; first += kStepTableSize) {
    StepTable table;
    table.count = static_cast<int>(std::min<int64_t>(count - first, kStepTableSize));
    for (int i = 0; i < table.count; ++i) table.steps[i] = mutable_data<float>(steps[first + i]);
    const auto blocks = static_cast<unsigned>(ceil_div(table.count, kThreads));
    AdamSizes* mine = size + first;
    adam_sizes_kernel<<<blocks, kThreads, 0, stream>>>(mine, table, coefficients, options);
    ASGA_CUDA_CHECK(cudaGetLastError());
  }
  return sizes;
}

void sam_adam(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensors exp_avgs,
              Tensors exp_avg_sqs, Tensors steps, Tensor coefficients, std::optional<Tensor> lr_tensor, double lr,
              double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
  TensorLists<kAdamOperands> lists(params);
  set_update(lists, params, backups, first_grads, grads);
  lists.set(kMoment, "exp_avgs", exp_avgs);
  lists.set(kSquare, "exp_avg_sqs", exp_avg_sqs);
  STD_TORCH_CHECK(steps.size() == params.size(), "steps has ", steps.size(), " tensors, but params ", params.size());
  const double* of = scalars("coefficients", coefficients, params[0], 4);
  const AdamOptions options{
      scalar_or_null("lr_tensor", lr_tensor, params[0]), lr, beta1, beta2, eps, weight_decay, decoupled};
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  const Tensor sizes = count_steps(steps, params[0], of, options, stream);
  for (size_t i = 0; i < params.size(); ++i)
    lists.set_pointer(kSizes, i, reinterpret_cast<AdamSizes*>(mutable_data<double>(sizes)) + i);
  lists.cut();
  lists.for_each_launch([&](const auto& list, unsigned blocks, auto a, auto t, auto g) {
    adam_kernel<decltype(a), decltype(t), decltype(g)><<<blocks, kThreads, 0, stream>>>(list, of, options);
    ASGA_CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CUDA, m) {
  m.impl("sam_norm", TORCH_BOX(&asga::sam_norm));
  m.impl("sam_ascent_step", TORCH_BOX(&asga::sam_ascent_step));
  m.impl("sam_perturb", TORCH_BOX(&asga::sam_perturb));
  m.impl("sam_dots", TORCH_BOX(&asga::sam_dots));
  m.impl("sam_coefficients", TORCH_BOX(&asga::sam_coefficients));
  m.impl("sam_combine", TORCH_BOX(&asga::sam_combine));
  m.impl("sam_sgd", TORCH_BOX(&asga::sam_sgd));
  m.impl("sam_adam", TORCH_BOX(&asga::sam_adam));
}
