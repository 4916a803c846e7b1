// mixed_fake_quant on the CPU: K quantizers in one sweep forward and one backward, whatever K is. Bytes moved per value
// of size b: forward 2b (read x, write y), backward 3b (read g and x, write dx); only x is kept between them.
#include "vectorized/mixed_fake_quant.h"

#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "isa.h"

ASGA_PICK_ISA(MixedFakeQuantLoops, mixed_fake_quant_loops)

namespace asga {
namespace {

// 1/scale and probability * scale of every candidate and channel, or column where that is how the loops read them.
template <typename compute>
class GridTable {
 public:
  GridTable(const Work& work, const Tensor& scales, const Tensor& probs, const std::vector<int64_t>& quant_mins,
            const std::vector<int64_t>& quant_maxs) {
    const auto* scale = static_cast<const compute*>(scales.const_data_ptr());
    const auto* prob = static_cast<const compute*>(probs.const_data_ptr());
    view_.candidates = static_cast<int>(quant_mins.size());
    view_.stride = work.columns ? work.width : work.channels;
    for (int k = 0; k < view_.candidates; ++k) {
      view_.low[k] = static_cast<compute>(quant_mins[k]);
      view_.high[k] = static_cast<compute>(quant_maxs[k]);
      view_.probs[k] = prob[k];
      std::vector<compute> inverse(work.channels), weight(work.channels);
      for (int64_t c = 0; c < work.channels; ++c) {
        inverse[c] = compute(1) / scale[k * work.channels + c];
        weight[c] = scale[k * work.channels + c] * prob[k];
      }
      append(work, inverse_, inverse);
      append(work, weight_, weight);
    }
    view_.inverse = inverse_.data();
    view_.weight = weight_.data();
  }
  GridTable(const GridTable&) = delete;

  const MixedGrids<compute>& view() const { return view_; }

 private:
  static void append(const Work& work, std::vector<compute>& to, const std::vector<compute>& per_channel) {
    const std::vector<compute> values = work.columns ? repeat_per_column(per_channel, work.width) : per_channel;
    to.insert(to.end(), values.begin(), values.end());
  }

  std::vector<compute> inverse_, weight_;
  MixedGrids<compute> view_;
};

void check_candidates(const std::vector<int64_t>& quant_mins, const std::vector<int64_t>& quant_maxs) {
  const int64_t candidates = quant_mins.size();
  STD_TORCH_CHECK(candidates >= 1 && candidates <= kMaxCandidates, "quant_mins has ", candidates,
                  " candidates; between 1 and ", kMaxCandidates, " are supported");
  STD_TORCH_CHECK(quant_maxs.size() == quant_mins.size(), "quant_maxs has ", quant_maxs.size(),
                  " entries but quant_mins has ", candidates);
}

void check_symmetric(const std::optional<Tensor>& zero_points) {
  STD_TORCH_CHECK(!zero_points.has_value(), "zero_points is given, but mixtures on the CPU are symmetric");
}

Tensor mixed_fake_quant(Tensor input, Tensor scales, Tensor probs, std::optional<Tensor> zero_points,
                        std::vector<int64_t> quant_mins, std::vector<int64_t> quant_maxs, std::optional<int64_t> axis) {
  check_symmetric(zero_points);
  check_candidates(quant_mins, quant_maxs);
  const ScalarType type = compute_type(input);
  const int64_t candidates = quant_mins.size();
  const Tensor dense = to_dense(input);
  const ChannelLayout layout = channel_layout(dense, axis);
  const Tensor scale_values = to_parameter("scales", scales, input, candidates * layout.channels, type);
  const Tensor prob_values = to_parameter("probs", probs, input, candidates, type);
  Tensor output = empty_as(dense);
  if (layout.numel() == 0) return output;
  prefer_huge_pages(output);

  const Work work = plan_work(layout);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    const GridTable<compute_t<scalar_t>> table(work, scale_values, prob_values, quant_mins, quant_maxs);
    const auto loops = mixed_fake_quant_loops<scalar_t>();
    const auto* x = static_cast<const scalar_t*>(dense.const_data_ptr());
    auto* y = static_cast<scalar_t*>(output.mutable_data_ptr());
    for_each_piece(work, [&](int64_t begin, int64_t end) { loops.forward(work, table.view(), x, y, begin, end); });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixed_fake_quant_backward(Tensor grad, Tensor input, Tensor scales,
                                                                     Tensor probs, std::optional<Tensor> zero_points,
                                                                     std::vector<int64_t> quant_mins,
                                                                     std::vector<int64_t> quant_maxs,
                                                                     std::optional<int64_t> axis) {
  check_symmetric(zero_points);
  check_candidates(quant_mins, quant_maxs);
  check_same_shape("grad", grad, input);
  const ScalarType type = compute_type(input);
  const int64_t candidates = quant_mins.size();
  const Tensor dense = to_dense(input);
  const Tensor dense_grad = to_layout_of(dense, grad);
  const ChannelLayout layout = channel_layout(dense, axis);
  const Tensor scale_values = to_parameter("scales", scales, input, candidates * layout.channels, type);
  const Tensor prob_values = to_parameter("probs", probs, input, candidates, type);
  Tensor grad_input = empty_as(dense);
  prefer_huge_pages(grad_input);
  Tensor grad_scales = empty_as(scale_values);
  Tensor grad_probs = empty_as(prob_values);

  const Work work = plan_work(layout);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    using compute = compute_t<scalar_t>;
    const GridTable<compute> table(work, scale_values, prob_values, quant_mins, quant_maxs);
    const auto loops = mixed_fake_quant_loops<scalar_t>();
    std::vector<double> sums(work.pieces * candidates * 2 * (work.columns ? work.width : 1));
    const auto* g = static_cast<const scalar_t*>(dense_grad.const_data_ptr());
    const auto* x = static_cast<const scalar_t*>(dense.const_data_ptr());
    auto* dx = static_cast<scalar_t*>(grad_input.mutable_data_ptr());
    for_each_piece(work, [&](int64_t begin, int64_t end) {
      loops.backward(work, table.view(), g, x, dx, sums.data(), begin, end);
    });

    // Per candidate: sum g (q - v [inside]), then sum g q, each per channel.
    const std::vector<double> totals = sum_per_channel(work, sums, 2 * candidates);
    const auto* scale = static_cast<const compute*>(scale_values.const_data_ptr());
    const auto* prob = static_cast<const compute*>(prob_values.const_data_ptr());
    auto* scales_out = static_cast<compute*>(grad_scales.mutable_data_ptr());
    auto* probs_out = static_cast<compute*>(grad_probs.mutable_data_ptr());
    for (int64_t k = 0; k < candidates; ++k) {
      const double* residual = totals.data() + 2 * k * layout.channels;
      const double* rounded = residual + layout.channels;
      double prob_total = 0.0;
      for (int64_t c = 0; c < layout.channels; ++c) {
        scales_out[k * layout.channels + c] = static_cast<compute>(residual[c] * prob[k]);
        prob_total += rounded[c] * scale[k * layout.channels + c];
      }
      probs_out[k] = static_cast<compute>(prob_total);
    }
  });
  return {grad_input, to_layout_of(scales, grad_scales), to_layout_of(probs, grad_probs),
          torch::stable::new_empty(scales, {0})};
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CPU, library) {
  library.impl("mixed_fake_quant", TORCH_BOX(&asga::mixed_fake_quant));
  library.impl("mixed_fake_quant_backward", TORCH_BOX(&asga::mixed_fake_quant_backward));
}
