// How columns are cut into blocks, and how many blocks share one: by sizes and the bytes of the sums alone, never by
// the device, so that the same input gives the same sums everywhere. Plain C++, which tests compile without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace asga {

struct ColumnCut {
  int width;       // vectors of columns per block
  int64_t height;  // outer indices per block
  int64_t slices;  // blocks per column
};

// Enough to fill the large GPUs several times.
constexpr int64_t kMaxColumnBlocks = 1024;
// Each block leaves one partial sum per column and term. Within this many bytes of them the blocks may be that many.
constexpr int64_t kPartialBytes = int64_t{1} << 20;
// Beyond, they are no fewer than four for each of 132 multiprocessors, which hold two or three of a mixture at once.
constexpr int64_t kFewestBlocks = 4 * 132;
// A warp reads one run of memory. Wider blocks would leave more sums, narrower ones read less than 128 bytes at a time.
constexpr int64_t kWidestColumns = 32;

// `vectors` of `per_vector` columns, `outer` values in each; `sum_bytes` is what a block leaves for a column, 0 for
// none.
inline ColumnCut cut_columns(int64_t outer, int64_t vectors, int per_vector, int64_t sum_bytes, int threads) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t blocks = ceil_div(vectors, kWidestColumns);
  const int width = static_cast<int>(ceil_div(vectors, blocks)), lanes = threads / width;
  int64_t most = kMaxColumnBlocks / blocks;
  if (sum_bytes > 0) {
    const int64_t within = kPartialBytes / (vectors * per_vector * sum_bytes);
    most = std::min(most, std::max(within, ceil_div(kFewestBlocks, blocks)));
  }
  const int64_t height = ceil_div(outer, lanes * std::max<int64_t>(1, most)) * lanes;
  return {width, height, ceil_div(outer, height)};
}

}  // namespace asga
