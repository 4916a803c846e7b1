// Parameters per line on the way into the loops, and sums per line on the way out (see work.h for lines).
#pragma once

#include <math.h>
#include <stdint.h>

#include <vector>

#include "work.h"

namespace asga {

// Rows of one value per line, each padded to whole packs of sixteen and one more: rows whose distance is a power of two
// would fight for the same places of the L1 cache.
template <typename compute>
class Table {
 public:
  Table(const Work& work, int64_t rows) : work_(work), stride_((work.lines + 31) / 16 * 16), values_(rows * stride_) {}

  // Set a row to value(channel) of each line; the padding repeats the last one.
  template <typename F>
  void fill(int64_t row, const F& value) {
    compute* to = values_.data() + row * stride_;
    if (work_.columns) {
      const auto [outer, channels, inner] = work_.layout;
      for (int64_t line = 0; line < work_.lines;)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < inner; ++i) to[line++] = value(c);
    } else {
      for (int64_t line = 0; line < work_.lines; ++line) to[line] = value(line);
    }
    for (int64_t line = work_.lines; line < stride_ && line > 0; ++line) to[line] = to[line - 1];
  }

  // The same with bound - zero_point[channel], rounded; null is zero.
  void fill_bound(int64_t row, int64_t bound, const compute* zero_point) {
    const auto wide = static_cast<compute>(bound);
    if (zero_point == nullptr)
      fill(row, [&](int64_t) { return wide; });
    else
      fill(row, [&](int64_t c) { return wide - static_cast<compute>(nearbyint(zero_point[c])); });
  }

  const compute* row(int64_t row) const { return values_.data() + row * stride_; }
  int64_t stride() const { return stride_; }

 private:
  const Work& work_;
  int64_t stride_;
  std::vector<compute> values_;
};

// Calls f(term, totals) with the sums [slots, terms, lines] added up for each channel, in a fixed order.
template <typename F>
void for_each_total(const Work& work, const std::vector<double>& sums, int64_t terms, const F& f) {
  std::vector<double> totals(work.layout.channels);
  for (int64_t term = 0; term < terms; ++term) {
    const double* from = sums.data() + term * work.lines;
    if (work.columns) {
      for (double& total : totals) total = 0.0;
      for (int64_t slot = 0; slot < work.slots; ++slot)
        for (int64_t line = 0; line < work.lines; ++line)
          totals[work.channel_of(line)] += from[slot * terms * work.lines + line];
    } else {
      for (int64_t c = 0; c < work.layout.channels; ++c) {
        totals[c] = from[c];
        for (int64_t slot = 1; slot < work.slots; ++slot) totals[c] += from[slot * terms * work.lines + c];
      }
    }
    f(static_cast<int>(term), totals.data());
  }
}

// Whether a tensor of this size is gone from the caches before anyone reads it: then writing past them saves reading
// every line before it is overwritten, a third of the traffic of a forward sweep. 16 MiB is half of the last-level
// cache that common processors have for a handful of cores; the system's own figure is of no use on virtual machines.
template <typename scalar_t>
bool larger_than_caches(const Work& work) {
  constexpr int64_t kBytes = int64_t{16} << 20;
  return work.layout.numel() * static_cast<int64_t>(sizeof(scalar_t)) >= kBytes;
}

}  // namespace asga
