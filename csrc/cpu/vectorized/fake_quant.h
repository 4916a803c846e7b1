// The loops of fake_quant: compiled once per instruction set, picked and fed by ../fake_quant.h.
#pragma once

#include "../storage.h"
#include "../work.h"

namespace asga {

// One grid per line of `Work`, padded to whole packs for columns; low and high are the range minus the zero point.
template <typename compute>
struct Grids {
  const compute *scale, *low, *high;
};

template <typename scalar_t>
struct FakeQuantLoops {
  using compute = compute_t<scalar_t>;

  // Handle the tasks from `begin` to `end`. `past_caches`: the output is too large to be found in a cache later.
  void (*forward)(const Work&, const Grids<compute>&, const scalar_t* input, scalar_t* output, bool past_caches,
                  int64_t begin, int64_t end);
  // Also adds to `sums` [slots, terms, lines], zero at first: sum g (q - v [inside]) for the gradient of the scale, and
  // with two `terms` sum g [outside] for that of the zero point.
  void (*backward)(const Work&, const Grids<compute>&, const scalar_t* grad, const scalar_t* input,
                   scalar_t* grad_input, int terms, double* sums, bool past_caches, int64_t begin, int64_t end);
};

}  // namespace asga
