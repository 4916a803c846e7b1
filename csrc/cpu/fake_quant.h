// fake_quant on memory: pointers and sizes, no framework. One sweep forward, one sweep backward. Bytes moved per value
// of size b: forward 2b (read x, write y), backward 3b (read g and x, write dx).
#pragma once

#include <vector>

#include "isa.h"
#include "tables.h"
#include "vectorized/fake_quant.h"

ASGA_PICK_ISA(FakeQuantLoops, fake_quant_loops)

namespace asga {

// What both directions are given: scale and zero point [channels], the latter null for none.
template <typename compute>
struct FakeQuant {
  ChannelLayout layout;
  const compute *scale, *zero_point;
  int64_t quant_min, quant_max;
};

// The grids of a FakeQuant as the loops read them.
template <typename compute>
class GridTable {
 public:
  GridTable(const Work& work, const FakeQuant<compute>& op) : table_(work, 3) {
    table_.fill(0, [scale = op.scale](int64_t c) { return scale[c]; });
    table_.fill_bound(1, op.quant_min, op.zero_point);
    table_.fill_bound(2, op.quant_max, op.zero_point);
  }
  Grids<compute> view() const { return {table_.row(0), table_.row(1), table_.row(2)}; }

 private:
  Table<compute> table_;
};

// `parallel(work, run)` calls run(begin, end) for all tasks of `work`.
template <typename scalar_t, typename Parallel>
void fake_quant_forward(const FakeQuant<compute_t<scalar_t>>& op, const scalar_t* x, scalar_t* y,
                        const Parallel& parallel) {
  const Work work = plan_work(op.layout, 0);
  const GridTable<compute_t<scalar_t>> table(work, op);
  const auto loops = fake_quant_loops<scalar_t>();
  const bool past_caches = larger_than_caches<scalar_t>(work);
  parallel(work, [&](int64_t begin, int64_t end) { loops.forward(work, table.view(), x, y, past_caches, begin, end); });
}

// Writes grad_scale [channels] and, where there is a zero point, grad_zero_point [channels].
template <typename scalar_t, typename Parallel>
void fake_quant_backward(const FakeQuant<compute_t<scalar_t>>& op, const scalar_t* g, const scalar_t* x, scalar_t* dx,
                         compute_t<scalar_t>* grad_scale, compute_t<scalar_t>* grad_zero_point,
                         const Parallel& parallel) {
  using compute = compute_t<scalar_t>;
  const int terms = op.zero_point == nullptr ? 1 : 2;
  const Work work = plan_work(op.layout, terms);
  const GridTable<compute> table(work, op);
  const auto loops = fake_quant_loops<scalar_t>();
  const bool past_caches = larger_than_caches<scalar_t>(work);
  std::vector<double> sums(work.slots * terms * work.lines);
  parallel(work, [&](int64_t begin, int64_t end) {
    loops.backward(work, table.view(), g, x, dx, terms, sums.data(), past_caches, begin, end);
  });
  for_each_total(work, sums, terms, [&](int term, const double* totals) {
    const int64_t channels = op.layout.channels;
    if (term == 0)
      for (int64_t c = 0; c < channels; ++c) grad_scale[c] = static_cast<compute>(totals[c]);
    else
      for (int64_t c = 0; c < channels; ++c) grad_zero_point[c] = static_cast<compute>(-totals[c] * op.scale[c]);
  });
}

}  // namespace asga
