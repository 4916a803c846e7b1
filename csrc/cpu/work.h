// How a dense tensor with channels, [outer, channels, inner] in memory order, is cut into tasks for threads. The cuts
// depend on the sizes alone, never on the number of threads: sums are added within a task, then over the tasks in
// order, so they have the same bits on every run.
#pragma once

#include <stdint.h>

#include "../channel_layout.h"

namespace asga {

ASGA_NO_COPY int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A line is what has one grid and one set of sums: a channel, or a column where a channel's values are too few in a
// row for a vector. A task is a block of neighboring lines for a range of units.
//
// Rows: a unit is a piece of `width` values (the last of a row has less) in the row of every channel of the block.
// Columns: a unit is a row of `width` values whose channels change along the vector. Where channels * inner is narrow,
// several such rows are taken as one, so that it holds whole vectors; the last row can be short then.
struct Work {
  bool columns;
  ChannelLayout layout;
  int64_t width, units, lines, block, blocks, slots;

  ASGA_NO_COPY int64_t tasks() const { return blocks * slots; }
  ASGA_NO_COPY int64_t pieces_per_row() const { return columns ? 1 : ceil_div(layout.inner, width); }
  ASGA_NO_COPY int64_t channel_of(int64_t line) const { return columns ? line / layout.inner % layout.channels : line; }
};

// The task with a number: tasks of neighboring numbers work on neighboring memory.
struct Task {
  int64_t slot, first_line, last_line, first_unit, last_unit;
};

ASGA_NO_COPY Task task_of(const Work& work, int64_t index) {
  const int64_t slot = index / work.blocks, first = (index - slot * work.blocks) * work.block;
  const int64_t last = first + work.block < work.lines ? first + work.block : work.lines;
  return {slot, first, last, work.units * slot / work.slots, work.units * (slot + 1) / work.slots};
}

// `terms` is how many sums a line has; 0 where none are computed.
inline Work plan_work(const ChannelLayout& layout, int64_t terms) {
  // 8,192 values: 32 KiB of float32, well inside L2 with the gradient beside it, and short enough that float32 sums
  // of 512 values a lane lose nothing that matters.
  constexpr int64_t kPiece = 8192;
  // Threads are fed from about this many tasks.
  constexpr int64_t kTasks = 64;
  // Every slot has sums of its own. Beyond 16 KiB of them two slots must do, for the sake of memory.
  constexpr int64_t kSums = 2048, kFewestSlots = 2;
  // In shorter rows, tails would waste more lanes than they use. Columns pay for that with sums for every one of them,
  // so they must be long.
  constexpr int64_t kShortestRow = 8, kShortestColumn = 64, kVector = 16;
  const auto [outer, channels, inner] = layout;
  Work work{channels > 1 && inner < kShortestRow && outer >= kShortestColumn, layout};
  if (work.columns) {
    // Enough rows at once to make whole vectors, unless that needs large tables.
    constexpr int64_t kWidestRepeat = 2048;
    int64_t repeat = 1, row = channels * inner;
    while (row * repeat % kVector != 0) repeat *= 2;
    if (outer < kShortestColumn * repeat || row * repeat > kWidestRepeat) repeat = 1;
    work.width = work.lines = row * repeat;
    work.units = ceil_div(outer, repeat);
    work.block = terms > 0 ? 32 : 256;
  } else {
    work.width = kPiece;
    work.units = outer * ceil_div(inner, kPiece);
    work.lines = channels;
    // Short rows of neighboring channels go together, for the sake of long accesses.
    work.block = inner < 1024 ? ceil_div(1024, inner > 0 ? inner : 1) : 1;
  }
  if (work.block > work.lines) work.block = work.lines > 0 ? work.lines : 1;
  work.blocks = ceil_div(work.lines, work.block);
  work.slots = work.blocks > 0 ? ceil_div(kTasks, work.blocks) : 1;
  if (terms > 0 && work.lines > 0) {
    const int64_t most = kSums / (terms * work.lines);
    if (work.slots > most) work.slots = most > kFewestSlots ? most : kFewestSlots;
    // More sums than one for 128 values would be more work than the sweep.
    const int64_t worthwhile = layout.numel() / work.lines / 128;
    if (work.slots > worthwhile) work.slots = worthwhile > 0 ? worthwhile : 1;
  }
  if (work.slots > work.units) work.slots = work.units > 0 ? work.units : 1;
  return work;
}

}  // namespace asga
