// How rows are cut into tiles, and how many rows share one: like columns, by sizes and the bytes of the sums alone.
// Plain C++, which tests compile without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "column_cut.h"

namespace asga {

struct RowCut {
  int64_t height;  // rows of a channel, so outer indices, per tile
  int64_t piece;   // values of a row per tile
  int pieces;      // tiles side by side along a row
  int team;        // threads per tile: a block, a warp, or a power of two below
};

// One vector per thread while that needs at most this many blocks, then more vectors per thread: a dozen blocks for
// each of the about 150 multiprocessors of the large GPUs.
constexpr int64_t kMaxRowBlocks = 2048;
// Smaller teams would read less than 128 contiguous bytes at a time.
constexpr int kMinTeam = 8;

// `outer` rows of each channel, `inner` values in each; `sum_bytes` is what a tile leaves, 0 for nothing.
inline RowCut cut_rows(int64_t outer, int64_t channels, int64_t inner, int vector, int64_t sum_bytes, int threads,
                       int warp) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t rows = outer * channels, vectors = ceil_div(inner, vector);
  RowCut cut{1, inner, 1, threads};
  // A block for a row that would leave more than half of it idle is better spent on eight rows or more.
  if (vectors < threads / 2) {
    cut.team = kMinTeam;
    while (cut.team < warp && 2 * cut.team < vectors) cut.team *= 2;
  } else {
    const int64_t most = std::max<int64_t>(1, kMaxRowBlocks / rows);
    cut.piece = ceil_div(vectors, threads * most) * threads * vector;
    cut.pieces = static_cast<int>(ceil_div(inner, cut.piece));
  }
  // Rows in several pieces are few, and so are their sums.
  if (sum_bytes > 0 && cut.pieces == 1) {
    const int64_t within = kPartialBytes / (channels * sum_bytes);
    const int64_t fewest = ceil_div(kFewestBlocks * (threads / cut.team), channels);
    cut.height = ceil_div(outer, std::max(within, fewest));
  }
  return cut;
}

}  // namespace asga
