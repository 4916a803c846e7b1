// The loops of fake_quant: compiled once per instruction set, picked and fed by ../fake_quant.cpp.
#pragma once

#include "../storage.h"
#include "../work.h"

namespace asga {

// One grid per channel (rows) or per column (columns); low and high are the range minus the zero point.
template <typename compute>
struct Grids {
  const compute *scale, *low, *high;
};

template <typename scalar_t>
struct FakeQuantLoops {
  using compute = compute_t<scalar_t>;

  // Handle the pieces from `begin` to `end`.
  void (*forward)(const Work&, const Grids<compute>&, const scalar_t* input, scalar_t* output, int64_t begin,
                  int64_t end);
  // Also adds to `sums`, zero at first, per piece: the sums for the gradients of scale and zero point: rows [pieces,
  // 2], columns [pieces, 2, width]. The sum for the zero point is per unit of -scale.
  void (*backward)(const Work&, const Grids<compute>&, const scalar_t* grad, const scalar_t* input,
                   scalar_t* grad_input, double* sums, int64_t begin, int64_t end);
};

}  // namespace asga
