// The operators of the fused ASGA step on CPU tensors; `asga/ops/sam_reference.py` is the definition. Every operator
// but those of a few scalars is one sweep over all tensors of its lists.
#include "vectorized/sam.h"

#include <math.h>
#include <torch/csrc/stable/library.h>

#include "isa.h"
#include "tensor_lists.h"

ASGA_PICK_ISA(SamLoops, sam_loops)

namespace asga {
namespace {

using Tensors = std::vector<Tensor>;

// From this many bytes of parameters on, what a sweep writes is not found in the caches by the next one.
constexpr int64_t kLargerThanCaches = int64_t{16} << 20;

// Calls run(loops) with those of the arithmetic on `params`.
template <typename Run>
void with_loops(const Tensors& params, const Run& run) {
  STD_TORCH_CHECK(!params.empty(), "params is empty; at least one tensor is needed");
  if (params[0].scalar_type() == ScalarType::Double)
    run(sam_loops<double>());
  else
    run(sam_loops<float>());
}

bool past_caches(const TensorLists& lists) {
  return lists.numel() * static_cast<int64_t>(lists.params()[0].element_size()) >= kLargerThanCaches;
}

void check_scales(const std::vector<double>& rho_scales, const Tensors& params) {
  STD_TORCH_CHECK(rho_scales.size() == params.size(), "rho_scales has ", rho_scales.size(), " entries, but params ",
                  params.size());
}

// A scalar, or `count` of them, as float64.
const double* scalars(const char* name, const Tensor& tensor, int64_t count = 1) {
  STD_TORCH_CHECK(!tensor.is_cuda() && tensor.scalar_type() == ScalarType::Double && tensor.numel() == count &&
                      tensor.is_contiguous(),
                  name, " must be a float64 tensor on the device of params with ", count, " element(s)");
  return data<double>(tensor);
}

double scalar_or(const char* name, const std::optional<Tensor>& tensor, double otherwise) {
  return tensor.has_value() ? *scalars(name, *tensor) : otherwise;
}

Tensor new_scalars(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

// `terms` sums of every chunk: its lanes are added up in a fixed order, then the chunks of every tensor in theirs.
class ChunkSums {
 public:
  ChunkSums(const TensorLists& lists, int terms) : lists_(lists), terms_(terms), sums_(lists.chunks() * terms) {}

  template <typename compute>
  void add(int64_t chunk, int term, const compute* lanes) {
    double halves[kSumLanes];
    for (int lane = 0; lane < kSumLanes; ++lane) halves[lane] = static_cast<double>(lanes[lane]);
    for (int half = kSumLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) halves[lane] += halves[lane + half];
    sums_[chunk * terms_ + term] += halves[0];
  }

  // Calls f(entry, sums of its terms).
  template <typename F>
  void for_each_entry(const F& f) const {
    for (int64_t i = 0; i < lists_.size(); ++i) {
      double totals[kDots] = {};
      const Entry& entry = lists_.entry(i);
      for (int64_t chunk = 0; chunk < ceil_div(entry.numel, kChunk); ++chunk)
        for (int term = 0; term < terms_; ++term) totals[term] += sums_[(entry.first_chunk + chunk) * terms_ + term];
      f(i, totals);
    }
  }

 private:
  const TensorLists& lists_;
  int terms_;
  std::vector<double> sums_;
};

Tensor sam_norm(Tensors params, Tensors grads, std::vector<double> rho_scales, bool adaptive) {
  check_scales(rho_scales, params);
  TensorLists lists(params);
  const int theta = lists.add("params", params), g = lists.add("grads", grads);
  ChunkSums sums(lists, 1);
  with_loops(params, [&](const auto& loops) {
    sweep_lists(lists, loops, [&](auto& block, int64_t entry, int64_t chunk) {
      if (rho_scales[entry] == 0) return;
      std::remove_const_t<std::remove_pointer_t<decltype(block.read(g))>> lanes[kSumLanes] = {};
      loops.norm(adaptive ? block.read(theta) : nullptr, block.read(g), block.count(), lanes);
      sums.add(chunk, 0, lanes);
    });
  });
  Tensor q0 = new_scalars(grads[0], {});
  double& total = *mutable_data<double>(q0) = 0.0;
  sums.for_each_entry([&](int64_t entry, const double* sum) {
    // 0 * Inf would be NaN.
    if (rho_scales[entry] != 0) total += rho_scales[entry] * rho_scales[entry] * *sum;
  });
  return q0;
}

Tensor sam_ascent_step(Tensor q0, Tensor rho, std::optional<Tensor> grad_scale, double shift, bool relative) {
  const double q = *scalars("q0", q0), scale = scalar_or("grad_scale", grad_scale, 1.0);
  double step = *scalars("rho", rho) / sqrt(q);
  step = relative ? step * (1.0 - shift) : step - shift / scale;
  Tensor result = new_scalars(q0, {});
  *mutable_data<double>(result) = isfinite(q) && q > 0 ? step : 0.0;
  return result;
}

void sam_perturb(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensor step,
                 std::vector<double> rho_scales, bool adaptive) {
  check_scales(rho_scales, params);
  TensorLists lists(params);
  const int theta = lists.add("params", params), backup = lists.add("backups", backups),
            first = lists.add("first_grads", first_grads, true), g = lists.add("grads", grads);
  for (size_t i = 0; i < params.size(); ++i)
    STD_TORCH_CHECK(backups[i].scalar_type() == params[i].scalar_type(), "backups and params differ in dtype");
  for (size_t i = 0; i < first_grads.size(); ++i)
    STD_TORCH_CHECK(first_grads[i].scalar_type() == grads[i].scalar_type(), "first_grads and grads differ in dtype");
  const double s = *scalars("step", step);
  const bool past = past_caches(lists);
  with_loops(params, [&](const auto& loops) {
    using compute = std::remove_const_t<std::remove_pointer_t<decltype(Block(loops).read(g))>>;
    sweep_lists(lists, loops, [&](auto& block, int64_t entry, int64_t) {
      const bool perturbed = rho_scales[entry] != 0;
      const auto size = static_cast<compute>(s * (rho_scales[entry] * rho_scales[entry]));
      if (!perturbed || size == 0) {
        // Copies only: whatever the gradient holds, the weights keep their bits.
        if (perturbed) block.copy(theta, backup);
        block.copy(g, first);
        return;
      }
      // What needs a conversion on its way into the loop is copied apart from it, for the sake of its bits.
      const bool copied = block.in_place(first) && block.in_place(g), saved = block.in_place(theta);
      if (!copied) block.copy(g, first);
      if (!saved) block.copy(theta, backup);
      const compute* old = block.read(theta);
      loops.perturb(size, adaptive, old, block.read(g), block.write(theta), saved ? block.write(backup) : nullptr,
                    copied ? block.write(first) : nullptr, block.count(), past);
      if (saved) block.save(backup);
      block.save(theta);
    });
  });
}

Tensor sam_dots(Tensors params, Tensors first_grads, Tensors grads, std::vector<double> rho_scales, bool adaptive) {
  check_scales(rho_scales, params);
  TensorLists lists(params);
  const int theta = lists.add("params", params), first = lists.add("first_grads", first_grads, true),
            g = lists.add("grads", grads);
  ChunkSums sums(lists, kDots);
  with_loops(params, [&](const auto& loops) {
    sweep_lists(lists, loops, [&](auto& block, int64_t entry, int64_t chunk) {
      std::remove_const_t<std::remove_pointer_t<decltype(block.read(g))>> lanes[kDots][kSumLanes] = {};
      const bool in_metric = adaptive && rho_scales[entry] != 0;
      loops.dots(in_metric ? block.read(theta) : nullptr, block.read(first), block.read(g), block.count(), lanes[0]);
      for (int term = 0; term < kDots; ++term) sums.add(chunk, term, lanes[term]);
    });
  });
  Tensor dots = new_scalars(grads[0], {kDots});
  double* totals = mutable_data<double>(dots);
  std::fill(totals, totals + kDots, 0.0);
  sums.for_each_entry([&](int64_t entry, const double* sum) {
    for (int term = 0; term < 3; ++term) totals[term] += sum[term];
    const double square = rho_scales[entry] * rho_scales[entry];
    if (square != 0) totals[3] += square * (adaptive ? sum[3] : sum[1]);
  });
  return dots;
}

// The variants in the order of `asga.ops.sam_library.VARIANTS`.
enum Variant { kSam, kAligned, kGsam, kConflict, kVariants };

Tensor sam_coefficients(Tensor q0, Tensor step, std::optional<Tensor> dots, Tensor losses,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, Tensor rho, Tensor counts,
                        int64_t variant, double weight, std::optional<double> max_norm, bool follow_gap, double rho_min,
                        double rho_max) {
  constexpr int64_t kCounts = 5;
  STD_TORCH_CHECK(variant >= 0 && variant < kVariants, "variant is ", variant, "; it must be 0 to ", kVariants - 1);
  STD_TORCH_CHECK(dots.has_value() || (variant <= kAligned && !max_norm.has_value()),
                  "dots is None, but the variant or max_norm needs the dot products");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.numel() == kCounts && counts.is_contiguous(),
                  "counts must be an int64 tensor with ", kCounts, " elements");
  const double q = *scalars("q0", q0), s = *scalars("step", step);
  const double* dot = dots.has_value() ? scalars("dots", *dots, kDots) : nullptr;
  const int64_t known = losses.numel();
  STD_TORCH_CHECK(known <= 2, "losses has ", known, " elements; at most two are used");
  const double* loss = scalars("losses", losses, known);
  const double inverse = 1.0 / scalar_or("grad_scale", grad_scale, 1.0);

  bool valid = isfinite(q) && scalar_or("found_inf", found_inf, 0.0) == 0.0;
  for (int64_t i = 0; i < known; ++i) valid = valid && isfinite(loss[i]);
  for (int i = 0; dot != nullptr && i < kDots; ++i) valid = valid && isfinite(dot[i]);

  double gap = NAN;
  if (known == 2)
    gap = loss[1] - loss[0];
  else if (dot != nullptr)
    gap = s * (q + dot[3]) / 2.0 * inverse;

  double c0 = 0.0, c1 = 1.0;
  // k g1 is the component of g0 along g1; a zero g1 has none.
  const double k = dot != nullptr && dot[2] > 0 ? dot[1] / dot[2] : 0.0;
  if (variant == kAligned) {
    c0 = c1 = 0.5;
  } else if (variant == kGsam) {
    c0 = -weight;
    c1 = 1.0 + weight * k;
  } else if (variant == kConflict) {
    c0 = 0.5;
    c1 = (1.0 - (k > 0 ? 0.0 : k)) / 2;
  }
  if (max_norm.has_value()) {
    const double squared = c0 * c0 * dot[0] + 2.0 * c0 * c1 * dot[1] + c1 * c1 * dot[2];
    const double factor = *max_norm / (sqrt(squared < 0 ? 0.0 : squared) * inverse + 1e-6);
    if (factor < 1) {
      c0 *= factor;
      c1 *= factor;
    }
  }

  auto* count = mutable_data<int64_t>(counts);
  scalars("rho", rho);
  if (follow_gap && valid && isfinite(gap)) {
    const double target = log1p(gap < 0 ? 0.0 : gap);
    *mutable_data<double>(rho) = target < rho_min ? rho_min : target > rho_max ? rho_max : target;
    count[0] += 1;
    count[1] += target <= rho_min;
    count[2] += target >= rho_max;
  }
  count[3] += 1;
  count[4] += !valid;
  Tensor result = new_scalars(q0, {4});
  auto* out = mutable_data<double>(result);
  out[0] = c0 * inverse;
  out[1] = c1 * inverse;
  out[2] = valid ? 1.0 : 0.0;
  out[3] = gap;
  return result;
}

// What the three writing operators share: the lists up to the gradients, and what the coefficients say.
struct Update {
  TensorLists lists;
  int theta, backup, first, g;
  double c0, c1;
  bool valid;

  Update(const Tensors& params, const Tensors& backups, const Tensors& first_grads, const Tensors& grads,
         const Tensor& coefficients)
      : lists(params),
        theta(lists.add("params", params)),
        backup(lists.add("backups", backups)),
        first(lists.add("first_grads", first_grads, true)),
        g(lists.add("grads", grads)) {
    const double* values = scalars("coefficients", coefficients, 4);
    c0 = values[0];
    c1 = values[1];
    valid = values[2] != 0.0;
  }

  template <typename compute>
  Combination<compute> combination(Block<compute>& block) const {
    return {static_cast<compute>(c0), static_cast<compute>(c1), block.read(first), block.read(g)};
  }
};

void restore(Tensors& params, const Tensors& backups) {
  for (size_t i = 0; i < params.size(); ++i)
    if (params[i].mutable_data_ptr() != backups[i].mutable_data_ptr()) torch::stable::copy_(params[i], backups[i]);
}

void sam_combine(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensor coefficients) {
  const Update update(params, backups, first_grads, grads, coefficients);
  restore(params, backups);
  if (!update.valid) return;
  with_loops(params, [&](const auto& loops) {
    sweep_lists(update.lists, loops, [&](auto& block, int64_t, int64_t) {
      const auto of = update.combination(block);
      loops.combine(of, block.write(update.g), block.count());
      block.save(update.g);
    });
  });
}

void sam_sgd(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensors momentum_buffers,
             Tensor coefficients, std::optional<Tensor> lr_tensor, double lr, double momentum, double weight_decay,
             bool nesterov) {
  Update update(params, backups, first_grads, grads, coefficients);
  const int buffer = update.lists.add("momentum_buffers", momentum_buffers, true);
  if (!update.valid) return restore(params, backups);
  lr = scalar_or("lr_tensor", lr_tensor, lr);
  const bool past = past_caches(update.lists);
  with_loops(params, [&](const auto& loops) {
    using compute = std::remove_const_t<std::remove_pointer_t<decltype(Block(loops).read(0))>>;
    const SgdScalars<compute> of{static_cast<compute>(lr), static_cast<compute>(momentum),
                                 static_cast<compute>(weight_decay), nesterov};
    sweep_lists(update.lists, loops, [&](auto& block, int64_t, int64_t) {
      loops.sgd(of, update.combination(block), block.read(update.backup), block.update(buffer),
                block.write(update.theta), block.count(), past);
      block.save(buffer);
      block.save(update.theta);
    });
  });
}

void sam_adam(Tensors params, Tensors backups, Tensors first_grads, Tensors grads, Tensors exp_avgs,
              Tensors exp_avg_sqs, Tensors steps, Tensor coefficients, std::optional<Tensor> lr_tensor, double lr,
              double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
  Update update(params, backups, first_grads, grads, coefficients);
  const int first = update.lists.add("exp_avgs", exp_avgs), second = update.lists.add("exp_avg_sqs", exp_avg_sqs);
  STD_TORCH_CHECK(steps.size() == params.size(), "steps has ", steps.size(), " tensors, but params ", params.size());
  for (const Tensor& step : steps)
    STD_TORCH_CHECK(!step.is_cuda() && step.scalar_type() == ScalarType::Float && step.numel() == 1,
                    "steps must hold float32 tensors on the device of params with one element");
  if (!update.valid) return restore(params, backups);
  lr = scalar_or("lr_tensor", lr_tensor, lr);
  const bool past = past_caches(update.lists);
  with_loops(params, [&](const auto& loops) {
    using compute = std::remove_const_t<std::remove_pointer_t<decltype(Block(loops).read(0))>>;
    std::vector<AdamScalars<compute>> of(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      float& step = *mutable_data<float>(steps[i]);
      const double count = static_cast<double>(step) + 1.0;
      step += 1.0f;
      of[i] = {static_cast<compute>(lr / (1.0 - pow(beta1, count))),
               static_cast<compute>(sqrt(1.0 - pow(beta2, count))),
               static_cast<compute>(beta2),
               static_cast<compute>(1.0 - beta1),
               static_cast<compute>(1.0 - beta2),
               static_cast<compute>(eps),
               static_cast<compute>(weight_decay),
               static_cast<compute>(1.0 - lr * weight_decay),
               decoupled};
    }
    sweep_lists(update.lists, loops, [&](auto& block, int64_t entry, int64_t) {
      loops.adam(of[entry], update.combination(block), block.read(update.backup), block.update(first),
                 block.update(second), block.write(update.theta), block.count(), past);
      block.save(first);
      block.save(second);
      block.save(update.theta);
    });
  });
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CPU, library) {
  library.impl("sam_norm", TORCH_BOX(&asga::sam_norm));
  library.impl("sam_ascent_step", TORCH_BOX(&asga::sam_ascent_step));
  library.impl("sam_perturb", TORCH_BOX(&asga::sam_perturb));
  library.impl("sam_dots", TORCH_BOX(&asga::sam_dots));
  library.impl("sam_coefficients", TORCH_BOX(&asga::sam_coefficients));
  library.impl("sam_combine", TORCH_BOX(&asga::sam_combine));
  library.impl("sam_sgd", TORCH_BOX(&asga::sam_sgd));
  library.impl("sam_adam", TORCH_BOX(&asga::sam_adam));
}
