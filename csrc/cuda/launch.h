// What every launcher needs: error checks that raise, torch's current stream, and the step from dtype to C++
// type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../tensor_layout.h"

// torch's STD_CUDA_CHECK needs a symbol that a CPU build of torch lacks.
#define ASGA_CUDA_CHECK(call)                                                               \
  do {                                                                                      \
    const cudaError_t status = (call);                                                      \
    if (status != cudaSuccess) throw std::runtime_error(::asga::cuda_error(#call, status)); \
  } while (0)

namespace asga {

using torch::stable::accelerator::DeviceGuard;

// The dtype of the arithmetic.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline std::string cuda_error(const char* call, cudaError_t status) {
  std::string text = std::string("asga: CUDA error in ") + call + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice) {
    text +=
        "; the CUDA library was compiled for other GPUs: install asga again with the architecture of this one in "
        "TORCH_CUDA_ARCH_LIST, or set ASGA_BACKEND=triton";
  } else if (status == cudaErrorInsufficientDriver) {
    text +=
        "; the CUDA library was compiled with a newer CUDA than the driver has: update the driver, install asga "
        "again with an older nvcc, or set ASGA_BACKEND=triton";
  }
  return text;
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls `launch` with a zero of the element type; `compute_type` has rejected every other dtype.
template <typename F>
void dispatch(ScalarType type, const F& launch) {
  switch (type) {
    case ScalarType::Double:
      return launch(double{});
    case ScalarType::Half:
      return launch(__half{});
    case ScalarType::BFloat16:
      return launch(__nv_bfloat16{});
    default:
      return launch(float{});
  }
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace asga
