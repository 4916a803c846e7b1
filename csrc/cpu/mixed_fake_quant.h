// mixed_fake_quant on memory: pointers and sizes, no framework. K quantizers in one sweep forward and one backward,
// whatever K is. Bytes moved per value of size b: forward 2b (read x, write y), backward 3b (read g and x, write dx);
// only x is kept between them.
#pragma once

#include <vector>

#include "isa.h"
#include "tables.h"
#include "vectorized/mixed_fake_quant.h"

ASGA_PICK_ISA(MixedFakeQuantLoops, mixed_fake_quant_loops)

namespace asga {

// What both directions are given: scales and zero points [K, channels], the latter null for none, probabilities and
// ranges [K].
template <typename compute>
struct MixedFakeQuant {
  ChannelLayout layout;
  int candidates;
  const compute *scales, *zero_points, *probs;
  const int64_t *quant_mins, *quant_maxs;
};

// The grids of a MixedFakeQuant as the loops read them.
template <typename compute>
class MixedGridTable {
 public:
  MixedGridTable(const Work& work, const MixedFakeQuant<compute>& op) : table_(work, 4 * op.candidates) {
    const int candidates = op.candidates;
    for (int k = 0; k < candidates; ++k) {
      const compute* scale = op.scales + k * op.layout.channels;
      const compute* zero_point = op.zero_points == nullptr ? nullptr : op.zero_points + k * op.layout.channels;
      table_.fill(k, [scale](int64_t c) { return compute(1) / scale[c]; });
      table_.fill(candidates + k, [scale, prob = op.probs[k]](int64_t c) { return scale[c] * prob; });
      table_.fill_bound(2 * candidates + k, op.quant_mins[k], zero_point);
      table_.fill_bound(3 * candidates + k, op.quant_maxs[k], zero_point);
      view_.probs[k] = op.probs[k];
    }
    view_.candidates = candidates;
    view_.stride = table_.stride();
    view_.inverse = table_.row(0);
    view_.weight = table_.row(candidates);
    view_.low = table_.row(2 * candidates);
    view_.high = table_.row(3 * candidates);
  }
  const MixedGrids<compute>& view() const { return view_; }

 private:
  Table<compute> table_;
  MixedGrids<compute> view_;
};

// `parallel(work, run)` calls run(begin, end) for all tasks of `work`.
template <typename scalar_t, typename Parallel>
void mixed_fake_quant_forward(const MixedFakeQuant<compute_t<scalar_t>>& op, const scalar_t* x, scalar_t* y,
                              const Parallel& parallel) {
  const Work work = plan_work(op.layout, 0);
  const MixedGridTable<compute_t<scalar_t>> table(work, op);
  const auto loops = mixed_fake_quant_loops<scalar_t>();
  const bool past_caches = larger_than_caches<scalar_t>(work);
  parallel(work, [&](int64_t begin, int64_t end) { loops.forward(work, table.view(), x, y, past_caches, begin, end); });
}

// Writes grad_scales [K, channels], grad_probs [K] and, where there are zero points, grad_zero_points [K, channels].
template <typename scalar_t, typename Parallel>
void mixed_fake_quant_backward(const MixedFakeQuant<compute_t<scalar_t>>& op, const scalar_t* g, const scalar_t* x,
                               scalar_t* dx, compute_t<scalar_t>* grad_scales, compute_t<scalar_t>* grad_probs,
                               compute_t<scalar_t>* grad_zero_points, const Parallel& parallel) {
  using compute = compute_t<scalar_t>;
  const int terms = op.zero_points == nullptr ? 2 : 3;
  const Work work = plan_work(op.layout, op.candidates * terms);
  const MixedGridTable<compute> table(work, op);
  const auto loops = mixed_fake_quant_loops<scalar_t>();
  const bool past_caches = larger_than_caches<scalar_t>(work);
  std::vector<double> sums(work.slots * op.candidates * terms * work.lines);
  parallel(work, [&](int64_t begin, int64_t end) {
    loops.backward(work, table.view(), g, x, dx, terms, sums.data(), past_caches, begin, end);
  });
  double prob_totals[kMaxCandidates] = {};
  for_each_total(work, sums, op.candidates * terms, [&](int index, const double* totals) {
    const int k = index / terms, term = index % terms;
    const int64_t channels = op.layout.channels, first = k * channels;
    const compute* scales = op.scales + first;
    const double prob = op.probs[k];
    if (term == 0)
      for (int64_t c = 0; c < channels; ++c) grad_scales[first + c] = static_cast<compute>(totals[c] * prob);
    else if (term == 1)
      for (int64_t c = 0; c < channels; ++c) prob_totals[k] += totals[c] * scales[c];
    else
      for (int64_t c = 0; c < channels; ++c)
        grad_zero_points[first + c] = static_cast<compute>(-totals[c] * prob * scales[c]);
  });
  for (int k = 0; k < op.candidates; ++k) grad_probs[k] = static_cast<compute>(prob_totals[k]);
}

}  // namespace asga
