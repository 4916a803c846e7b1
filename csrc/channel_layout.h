// How a channel axis lies in memory. Knows no framework.
#pragma once

#include <stdint.h>

// For what the loops in cpu/vectorized/ call from outside of their folder: a function of which each instruction set
// had a copy could be linked in its AVX-512 version.
#define ASGA_NO_COPY inline __attribute__((always_inline))

namespace asga {

// Element (o, c, i) of a dense tensor lies at (o * channels + c) * inner + i, whatever the order of its dimensions.
struct ChannelLayout {
  int64_t outer, channels, inner;
  ASGA_NO_COPY int64_t numel() const { return outer * channels * inner; }
};

}  // namespace asga
