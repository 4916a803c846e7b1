// The loops of mixed_fake_quant: compiled once per instruction set, picked and fed by ../mixed_fake_quant.h.
#pragma once

#include "../../quant_math.h"
#include "../storage.h"
#include "../work.h"

namespace asga {

// K grids per line of `Work`, candidate after candidate, each padded to `stride` lines: 1/scale, probability * scale,
// and the range minus the zero point.
template <typename compute>
struct MixedGrids {
  const compute *inverse, *weight, *low, *high;
  int64_t stride;
  int candidates;
  compute probs[kMaxCandidates];
};

template <typename scalar_t>
struct MixedFakeQuantLoops {
  using compute = compute_t<scalar_t>;

  // Handle the tasks from `begin` to `end`. `past_caches`: the output is too large to be found in a cache later.
  void (*forward)(const Work&, const MixedGrids<compute>&, const scalar_t* input, scalar_t* output, bool past_caches,
                  int64_t begin, int64_t end);
  // Also adds to `sums` [slots, K, terms, lines], zero at first: sum g (q - v [inside]) for the gradient of the scale,
  // sum g q for that of the probability, and with three `terms` sum g [outside] for that of the zero point.
  void (*backward)(const Work&, const MixedGrids<compute>&, const scalar_t* grad, const scalar_t* input,
                   scalar_t* grad_input, int terms, double* sums, bool past_caches, int64_t begin, int64_t end);
};

}  // namespace asga
