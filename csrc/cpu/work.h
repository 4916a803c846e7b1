// How a dense tensor with channels, [outer, channels, inner] in memory order, is cut into pieces of work. The borders
// depend on the sizes alone, never on the number of threads: sums are added within a piece, then over the pieces in
// order, so they have the same bits on every run.
#pragma once

#include <stdint.h>

namespace asga {

struct Work {
  // Rows: a row is `inner` values of one channel; there are `rows` = outer * channels of them, and a long row is cut
  // every `step` values.
  // Columns: where `inner` is too short for a vector, a row is `channels * inner` values whose channels change along
  // the vector; there are `rows` = outer of them, cut into blocks of `step` rows. Parameters then come one per column.
  bool columns;
  int64_t channels, rows, width, step, pieces_per_row, pieces;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Work plan_work(int64_t outer, int64_t channels, int64_t inner) {
  // 8,192 values: 32 KiB of float32, well inside L2 with the gradient beside it, and short enough that float32 sums
  // of 512 values a lane lose nothing that matters.
  constexpr int64_t kPiece = 8192;
  // Below half a vector, tails would waste more lanes than they use.
  constexpr int64_t kShortestRow = 8;
  if (channels > 1 && outer > 1 && inner < kShortestRow) {
    const int64_t width = channels * inner;
    const int64_t step = width >= kPiece ? 1 : ceil_div(kPiece, width);
    // Every piece has sums of its own for every column: at most 256 of them bound the workspace.
    const int64_t bounded = step > ceil_div(outer, 256) ? step : ceil_div(outer, 256);
    return {true, channels, outer, width, bounded, 1, ceil_div(outer, bounded)};
  }
  const int64_t pieces_per_row = ceil_div(inner, kPiece);
  return {false, channels, outer * channels, inner, kPiece, pieces_per_row, outer * channels * pieces_per_row};
}

// One piece of work: where it starts and how many values (rows mode) or rows (columns mode) it has.
struct Piece {
  int64_t offset, count, channel;
};

inline __attribute__((always_inline)) Piece piece_of(const Work& work, int64_t index) {
  if (work.columns) {
    const int64_t first = index * work.step;
    const int64_t left = work.rows - first;
    return {first * work.width, left < work.step ? left : work.step, 0};
  }
  const int64_t row = index / work.pieces_per_row;
  const int64_t first = (index % work.pieces_per_row) * work.step;
  const int64_t left = work.width - first;
  return {row * work.width + first, left < work.step ? left : work.step, row % work.channels};
}

}  // namespace asga
