// How a channel axis lies in memory. Knows no framework.
#pragma once

#include <stdint.h>

namespace asga {

// Element (o, c, i) of a dense tensor lies at (o * channels + c) * inner + i, whatever the order of its dimensions.
struct ChannelLayout {
  int64_t outer, channels, inner;
  int64_t numel() const { return outer * channels * inner; }
};

}  // namespace asga
