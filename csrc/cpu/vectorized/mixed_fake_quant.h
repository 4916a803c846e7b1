// The loops of mixed_fake_quant: compiled once per instruction set, picked and fed by ../mixed_fake_quant.cpp.
#pragma once

#include "../../quant_math.h"
#include "../storage.h"
#include "../work.h"

namespace asga {

// K grids per channel (rows) or per column (columns), candidate after candidate: inverse and weight are
// [K, channels or width] with 1/scale and probability * scale.
template <typename compute>
struct MixedGrids {
  const compute *inverse, *weight;
  int64_t stride;  // channels or width
  int candidates;
  compute low[kMaxCandidates], high[kMaxCandidates], probs[kMaxCandidates];
};

template <typename scalar_t>
struct MixedFakeQuantLoops {
  using compute = compute_t<scalar_t>;

  // Handle the pieces from `begin` to `end`.
  void (*forward)(const Work&, const MixedGrids<compute>&, const scalar_t* input, scalar_t* output, int64_t begin,
                  int64_t end);
  // Also adds to `sums`, zero at first, per piece and candidate: sum g (q - v [inside]) and sum g q: rows [pieces, K,
  // 2], columns [pieces, K, 2, width].
  void (*backward)(const Work&, const MixedGrids<compute>&, const scalar_t* grad, const scalar_t* input,
                   scalar_t* grad_input, double* sums, int64_t begin, int64_t end);
};

}  // namespace asga
