// What the wrappers of this room share: from a tensor's dtype to a storage type, and handing out pieces of work.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensor_layout.h"
#include "storage.h"
#include "work.h"

namespace asga {

// Call `run.template operator()<scalar_t>()` with the storage type of `input`.
template <typename Run>
void with_storage_type(const Tensor& input, Run&& run) {
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      return run(float{});
  }
}

// A large result usually lies on memory that the system has never touched, and a fault for every 4 KiB of it can take
// longer than the sweep itself: ask for pages of 2 MiB. It is advice only; the memory goes back like any other.
inline void prefer_huge_pages(const Tensor& result) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (start + result.numel() * result.element_size()) / kHugePage * kHugePage;
  // Below 8 MiB the allocator mostly reuses memory.
  if (last >= first + 4 * kHugePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)result;
#endif
}

// Hands the tasks of a sweep to torch's threads. `effort` is how much work a value is, 1 for a single quantizer.
struct Threads {
  int effort;

  template <typename Run>
  void operator()(const Work& work, const Run& run) const {
    const int64_t tasks = work.tasks();
    if (tasks == 0) return;
    // Values of a thread: about ten microseconds of work, the cost of waking it.
    constexpr int64_t kLeast = 32768;
    const int64_t values = ceil_div(work.layout.numel(), tasks) * effort;
    const int64_t grain = values > 0 ? ceil_div(kLeast, values) : tasks;
    if (tasks <= grain) return run(0, tasks);
    torch::stable::parallel_for(0, tasks, grain, run);
  }
};

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace asga
