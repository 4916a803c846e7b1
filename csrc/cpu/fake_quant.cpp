// fake_quant on the CPU: one sweep forward, one sweep backward. Bytes moved per value of size b: forward 2b (read x,
// write y), backward 3b (read g and x, write dx). `asga/ops/reference.py` is the definition.
#include "vectorized/fake_quant.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "dispatch.h"
#include "isa.h"

ASGA_PICK_ISA(FakeQuantLoops, fake_quant_loops)

namespace asga {
namespace {

// Scale and range of every channel, or of every column where that is how the loops read them.
template <typename compute>
struct GridTable {
  std::vector<compute> scale, low, high;

  GridTable(const Work& work, const Tensor& scales, const std::optional<Tensor>& zero_points, int64_t quant_min,
            int64_t quant_max)
      : scale(work.channels), low(work.channels, quant_min), high(work.channels, quant_max) {
    const compute* values = static_cast<const compute*>(scales.const_data_ptr());
    std::copy(values, values + work.channels, scale.begin());
    if (zero_points.has_value()) {
      const compute* offsets = static_cast<const compute*>(zero_points->const_data_ptr());
      for (int64_t c = 0; c < work.channels; ++c) {
        low[c] -= std::nearbyint(offsets[c]);
        high[c] -= std::nearbyint(offsets[c]);
      }
    }
    if (work.columns) {
      scale = repeat_per_column(scale, work.width);
      low = repeat_per_column(low, work.width);
      high = repeat_per_column(high, work.width);
    }
  }

  Grids<compute> view() const { return {scale.data(), low.data(), high.data()}; }
};

std::optional<Tensor> to_optional_parameter(const char* name, const std::optional<Tensor>& tensor, const Tensor& input,
                                            int64_t numel, ScalarType type) {
  if (!tensor.has_value()) return std::nullopt;
  return to_parameter(name, *tensor, input, numel, type);
}

Tensor fake_quant(Tensor input, Tensor scale, std::optional<Tensor> zero_point, int64_t quant_min, int64_t quant_max,
                  std::optional<int64_t> axis) {
  const ScalarType type = compute_type(input);
  const Tensor dense = to_dense(input);
  const ChannelLayout layout = channel_layout(dense, axis);
  const Tensor scales = to_parameter("scale", scale, input, layout.channels, type);
  const auto zero_points = to_optional_parameter("zero_point", zero_point, input, layout.channels, type);
  Tensor output = empty_as(dense);
  if (layout.numel() == 0) return output;
  prefer_huge_pages(output);

  const Work work = plan_work(layout);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    const GridTable<compute_t<scalar_t>> table(work, scales, zero_points, quant_min, quant_max);
    const auto loops = fake_quant_loops<scalar_t>();
    const auto* x = static_cast<const scalar_t*>(dense.const_data_ptr());
    auto* y = static_cast<scalar_t*>(output.mutable_data_ptr());
    for_each_piece(work, [&](int64_t begin, int64_t end) { loops.forward(work, table.view(), x, y, begin, end); });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> fake_quant_backward(Tensor grad, Tensor input, Tensor scale,
                                                       std::optional<Tensor> zero_point, int64_t quant_min,
                                                       int64_t quant_max, std::optional<int64_t> axis) {
  const ScalarType type = compute_type(input);
  check_same_shape("grad", grad, input);
  const Tensor dense = to_dense(input);
  const Tensor dense_grad = to_layout_of(dense, grad);
  const ChannelLayout layout = channel_layout(dense, axis);
  const Tensor scales = to_parameter("scale", scale, input, layout.channels, type);
  const auto zero_points = to_optional_parameter("zero_point", zero_point, input, layout.channels, type);
  Tensor grad_input = empty_as(dense);
  prefer_huge_pages(grad_input);
  Tensor grad_scale = empty_as(scales);
  Tensor grad_zero_point = zero_points.has_value() ? empty_as(*zero_points) : torch::stable::new_empty(scale, {0});

  const Work work = plan_work(layout);
  with_storage_type(dense, [&](auto storage) {
    using scalar_t = decltype(storage);
    using compute = compute_t<scalar_t>;
    const GridTable<compute> table(work, scales, zero_points, quant_min, quant_max);
    const auto loops = fake_quant_loops<scalar_t>();
    std::vector<double> sums(work.pieces * 2 * (work.columns ? work.width : 1));
    const auto* g = static_cast<const scalar_t*>(dense_grad.const_data_ptr());
    const auto* x = static_cast<const scalar_t*>(dense.const_data_ptr());
    auto* dx = static_cast<scalar_t*>(grad_input.mutable_data_ptr());
    for_each_piece(work, [&](int64_t begin, int64_t end) {
      loops.backward(work, table.view(), g, x, dx, sums.data(), begin, end);
    });

    const std::vector<double> totals = sum_per_channel(work, sums, 2);
    auto* scale_out = static_cast<compute*>(grad_scale.mutable_data_ptr());
    for (int64_t c = 0; c < layout.channels; ++c) scale_out[c] = static_cast<compute>(totals[c]);
    if (!zero_points.has_value()) return;
    const auto* scale_values = static_cast<const compute*>(scales.const_data_ptr());
    auto* zero_point_out = static_cast<compute*>(grad_zero_point.mutable_data_ptr());
    for (int64_t c = 0; c < layout.channels; ++c)
      zero_point_out[c] = static_cast<compute>(-totals[layout.channels + c] * scale_values[c]);
  });
  return {grad_input, to_layout_of(scale, grad_scale),
          zero_points.has_value() ? to_layout_of(*zero_point, grad_zero_point) : grad_zero_point};
}

}  // namespace
}  // namespace asga

STABLE_TORCH_LIBRARY_IMPL(asga, CPU, library) {
  library.impl("fake_quant", TORCH_BOX(&asga::fake_quant));
  library.impl("fake_quant_backward", TORCH_BOX(&asga::fake_quant_backward));
}
