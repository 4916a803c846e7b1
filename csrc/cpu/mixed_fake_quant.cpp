// The operators mixed_fake_quant and mixed_fake_quant_backward on CPU tensors. `asga/ops/reference.py` is the
// definition.
#include "mixed_fake_quant.h"

#include <torch/csrc/stable/library.h>

#include "dispatch.h"

namespace asga {
namespace {

int check_candidates(const std::vector<int64_t>& quant_mins, const std::vector<int64_t>& quant_maxs) {
  const int64_t candidates = quant_mins.size();
  STD_TORCH_CHECK(candidates >= 1 && candidates <= kMaxCandidates, "quant_mins has ", candidates,
                  " candidates; between 1 and ", kMaxCandidates, " are supported");
  STD_TORCH_CHECK(quant_maxs.size() == quant_mins.size(), "quant_maxs has ", quant_maxs.size(),
                  " entries but quant_mins has ", candidates);
  return static_cast<int>(candidates);
}

// Both directions as the sweeps take them; keeps the tensors alive that it points into.
template <typename compute>
struct Call {
  Tensor scales, probs;
  std::optional<Tensor> zero_points;
  MixedFakeQuant<compute> op;

  Call(const Tensor& input, const ChannelLayout& layout, const Tensor& scales, const Tensor& probs,
       const std::optional<Tensor>& zero_points, const std::vector<int64_t>& quant_mins,
       const std::vector<int64_t>& quant_maxs)
      : scales(to_parameter("scales", scales, input, quant_mins.size() * layout.channels, compute_type(input))),
        probs(to_parameter("probs", probs, input, quant_mins.size(), compute_type(input))) {
    if (zero_points.has_value())
      this->zero_points =
          to_parameter("zero_points", *zero_points, input, quant_mins.size() * layout.channels, compute_type(input));
    op = {layout,
          static_cast<int>(quant_mins.size()),
          data<compute>(this->scales),
          data_or_null<compute>(this->zero_points),
          data<compute>(this->probs),
          quant_mins.data(),
          quant_maxs.data()};
  }
};

Tensor forward(Tensor input, Tensor scales, Tensor probs, std::optional<Tensor> zero_points,
               std::vector<int64_t> quant_mins, std::vector<int64_t> quant_maxs, std::optional<int64_t> axis) {
  const int candidates = check_candidates(quant_mins, quant_maxs);
  compute_type(input);
  const Tensor dense = to_dense(input);
  const ChannelLayout layout = channel_layout(dense, axis);
  Tensor output = empty_as(dense);
  prefer_huge_pages(output);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    const Call<compute_t<scalar_t>> call(dense, layout, scales, probs, zero_points, quant_mins, quant_maxs);
    mixed_fake_quant_forward(call.op, data<scalar_t>(dense), mutable_data<scalar_t>(output), Threads{candidates});
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor input, Tensor scales, Tensor probs,
                                                    std::optional<Tensor> zero_points, std::vector<int64_t> quant_mins,
                                                    std::vector<int64_t> quant_maxs, std::optional<int64_t> axis) {
  const int candidates = check_candidates(quant_mins, quant_maxs);
  compute_type(input);
  check_same_device("grad", grad, input);
  check_same_shape("grad", grad, input);
  const Tensor dense = to_dense(input);
  const Tensor dense_grad = to_layout_of(dense, grad);
  const ChannelLayout layout = channel_layout(dense, axis);
  Tensor grad_input = empty_as(dense), grad_scales, grad_probs, grad_zero_points;
  prefer_huge_pages(grad_input);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    using compute = compute_t<scalar_t>;
    const Call<compute> call(dense, layout, scales, probs, zero_points, quant_mins, quant_maxs);
    grad_scales = empty_as(call.scales);
    grad_probs = empty_as(call.probs);
    grad_zero_points =
        call.zero_points.has_value() ? empty_as(*call.zero_points) : torch::stable::new_empty(scales, {0});
    mixed_fake_quant_backward(call.op, data<scalar_t>(dense_grad), data<scalar_t>(dense),
                              mutable_data<scalar_t>(grad_input), mutable_data<compute>(grad_scales),
                              mutable_data<compute>(grad_probs), mutable_data<compute>(grad_zero_points),
                              Threads{candidates});
  });
  return {grad_input, to_layout_of(scales, grad_scales), to_layout_of(probs, grad_probs),
          zero_points.has_value() ? to_layout_of(*zero_points, grad_zero_points) : grad_zero_points};
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CPU, library) {
  library.impl("mixed_fake_quant", TORCH_BOX(&asga::forward));
  library.impl("mixed_fake_quant_backward", TORCH_BOX(&asga::backward));
}
