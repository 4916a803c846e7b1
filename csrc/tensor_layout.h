// How a tensor and its channel axis lie in memory, and the argument checks that memory safety needs. Host
// code shared by the CPU and the CUDA rooms; `asga/ops/functional.py` has checked everything else before.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "channel_layout.h"

namespace asga {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// True if the elements fill their memory without gaps or overlaps, in any order of the dimensions.
inline bool is_dense(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<size_t> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) dims.push_back(d);
  }
  std::sort(dims.begin(), dims.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t d : dims) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// An uninitialized tensor with the dtype, device, sizes and strides of the dense `tensor`: empty_like at a third of the
// cost, for it does not look the operator up by name.
inline Tensor empty_as(const Tensor& tensor) {
  int32_t dtype, device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(tensor.dim(), sizes.data(), strides.data(), dtype, device_type,
                                                         tensor.get_device_index(), &handle));
  return Tensor(handle);
}

// `tensor`, or a dense copy with the strides of `empty_like(tensor)` if it has gaps or overlaps.
inline Tensor to_dense(const Tensor& tensor) {
  if (is_dense(tensor)) return tensor;
  Tensor dense = torch::stable::empty_like(tensor);
  torch::stable::copy_(dense, tensor);
  return dense;
}

// `tensor`, or a copy of it with the dtype and strides of the dense `like`.
inline Tensor to_layout_of(const Tensor& like, const Tensor& tensor) {
  const auto sizes = like.sizes(), wanted = like.strides(), strides = tensor.strides();
  bool same = tensor.scalar_type() == like.scalar_type();
  // Strides of dimensions of size 1 address nothing and differ freely between producers.
  for (size_t d = 0; same && d < sizes.size(); ++d) same = sizes[d] <= 1 || strides[d] == wanted[d];
  if (same) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The layout of a dense tensor: one channel without an axis.
inline ChannelLayout channel_layout(const Tensor& dense, std::optional<int64_t> axis) {
  const int64_t numel = dense.numel();
  if (!axis.has_value()) return {1, 1, numel};
  STD_TORCH_CHECK(*axis >= 0 && *axis < dense.dim(), "axis is ", *axis, ", but input has ", dense.dim(), " dimensions");
  const int64_t channels = dense.size(*axis);
  if (channels <= 1 || numel == 0) return {1, channels, channels == 0 ? 0 : numel};
  const int64_t inner = dense.stride(*axis);
  return {numel / (channels * inner), channels, inner};
}

// The dtype of the arithmetic; also the one place that rejects dtypes no kernel is compiled for.
inline ScalarType compute_type(const Tensor& input) {
  const ScalarType type = input.scalar_type();
  if (type == ScalarType::Double) return ScalarType::Double;
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "input has dtype code ", static_cast<int>(type),
                  "; float32, bfloat16, float16 and float64 are supported");
  return ScalarType::Float;
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(tensor.is_cuda() == input.is_cuda() && tensor.get_device_index() == input.get_device_index(), name,
                  " is not on the device of input");
}

inline void check_same_shape(const char* name, const Tensor& tensor, const Tensor& input) {
  const auto sizes = tensor.sizes(), wanted = input.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()), name,
                  " does not have the shape of input");
}

// A scale, zero point or probability as a contiguous tensor of `type` on the device of `input`.
inline Tensor to_parameter(const char* name, const Tensor& tensor, const Tensor& input, int64_t numel,
                           ScalarType type) {
  check_same_device(name, tensor, input);
  STD_TORCH_CHECK(tensor.numel() == numel, name, " has ", tensor.numel(), " elements, but ", numel, " are needed");
  if (tensor.is_contiguous() && tensor.scalar_type() == type) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), type);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// An empty input: nothing to launch, and sums over nothing are zero.
inline Tensor zeros_like(const Tensor& tensor) {
  Tensor zeros = torch::stable::empty_like(tensor);
  return torch::stable::zero_(zeros);
}

}  // namespace asga
