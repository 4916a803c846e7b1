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

inline Work plan_work(const ChannelLayout& layout) { return plan_work(layout.outer, layout.channels, layout.inner); }

// Give every thread at least 32,768 values: about ten microseconds of work, the cost of waking a thread.
template <typename Run>
void for_each_piece(const Work& work, const Run& run) {
  const int64_t values = work.columns ? work.step * work.width : (work.width < work.step ? work.width : work.step);
  const int64_t grain = ceil_div(32768, values > 0 ? values : 1);
  if (work.pieces <= grain) return run(0, work.pieces);
  torch::stable::parallel_for(0, work.pieces, grain, run);
}

// One value per column of a row of `channels * inner` values, from one per channel (columns mode of Work).
template <typename compute>
std::vector<compute> repeat_per_column(const std::vector<compute>& per_channel, int64_t width) {
  const int64_t channels = per_channel.size(), inner = width / channels;
  std::vector<compute> columns(width);
  for (int64_t j = 0; j < width; ++j) columns[j] = per_channel[j / inner];
  return columns;
}

// Sum the `terms` numbers of every piece, in the order of the pieces, per channel: [terms, channels].
inline std::vector<double> sum_per_channel(const Work& work, const std::vector<double>& sums, int64_t terms) {
  std::vector<double> totals(terms * work.channels, 0.0);
  for (int64_t index = 0; index < work.pieces; ++index) {
    if (work.columns) {
      const int64_t inner = work.width / work.channels;
      const double* piece = sums.data() + index * terms * work.width;
      for (int64_t t = 0; t < terms; ++t)
        for (int64_t j = 0; j < work.width; ++j) totals[t * work.channels + j / inner] += piece[t * work.width + j];
    } else {
      const int64_t channel = (index / work.pieces_per_row) % work.channels;
      for (int64_t t = 0; t < terms; ++t) totals[t * work.channels + channel] += sums[index * terms + t];
    }
  }
  return totals;
}

}  // namespace asga
