// The 16-bit formats as memory holds them; vectorized/lanes.h converts them.
#pragma once

#include <stdint.h>

namespace asga {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that the arithmetic on a storage type runs in.
template <typename scalar_t>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename scalar_t>
using compute_t = typename Compute<scalar_t>::type;

}  // namespace asga
