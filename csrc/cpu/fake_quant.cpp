// The operators fake_quant and fake_quant_backward on CPU tensors. `asga/ops/reference.py` is the definition.
#include "fake_quant.h"

#include <torch/csrc/stable/library.h>

#include "dispatch.h"

namespace asga {
namespace {

// Both directions as the sweeps take them; keeps the tensors alive that it points into.
template <typename compute>
struct Call {
  Tensor scale;
  std::optional<Tensor> zero_point;
  FakeQuant<compute> op;

  Call(const Tensor& input, const ChannelLayout& layout, const Tensor& scale, const std::optional<Tensor>& zero_point,
       int64_t quant_min, int64_t quant_max)
      : scale(to_parameter("scale", scale, input, layout.channels, compute_type(input))) {
    if (zero_point.has_value())
      this->zero_point = to_parameter("zero_point", *zero_point, input, layout.channels, compute_type(input));
    op = {layout, data<compute>(this->scale), data_or_null<compute>(this->zero_point), quant_min, quant_max};
  }
};

Tensor forward(Tensor input, Tensor scale, std::optional<Tensor> zero_point, int64_t quant_min, int64_t quant_max,
               std::optional<int64_t> axis) {
  compute_type(input);
  const Tensor dense = to_dense(input);
  const ChannelLayout layout = channel_layout(dense, axis);
  Tensor output = empty_as(dense);
  prefer_huge_pages(output);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    const Call<compute_t<scalar_t>> call(dense, layout, scale, zero_point, quant_min, quant_max);
    fake_quant_forward(call.op, data<scalar_t>(dense), mutable_data<scalar_t>(output), Threads{1});
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor input, Tensor scale, std::optional<Tensor> zero_point,
                                            int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  compute_type(input);
  check_same_device("grad", grad, input);
  check_same_shape("grad", grad, input);
  const Tensor dense = to_dense(input);
  const Tensor dense_grad = to_layout_of(dense, grad);
  const ChannelLayout layout = channel_layout(dense, axis);
  Tensor grad_input = empty_as(dense), grad_scale, grad_zero_point;
  prefer_huge_pages(grad_input);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    using compute = compute_t<scalar_t>;
    const Call<compute> call(dense, layout, scale, zero_point, quant_min, quant_max);
    grad_scale = empty_as(call.scale);
    grad_zero_point = call.zero_point.has_value() ? empty_as(*call.zero_point) : torch::stable::new_empty(scale, {0});
    fake_quant_backward(call.op, data<scalar_t>(dense_grad), data<scalar_t>(dense), mutable_data<scalar_t>(grad_input),
                        mutable_data<compute>(grad_scale), mutable_data<compute>(grad_zero_point), Threads{1});
  });
  return {grad_input, to_layout_of(scale, grad_scale),
          zero_point.has_value() ? to_layout_of(*zero_point, grad_zero_point) : grad_zero_point};
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CPU, library) {
  library.impl("fake_quant", TORCH_BOX(&asga::forward));
  library.impl("fake_quant_backward", TORCH_BOX(&asga::backward));
}
