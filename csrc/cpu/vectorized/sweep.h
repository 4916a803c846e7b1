// The way of a sweep over the tasks of a tensor: which values follow each other, and where sums end. What is done with
// the values is the Body's, with these members, all inlined:
//
//   packs(line, offset, count, stride)   `count` whole packs, `stride` values apart, on the grid of `line` (columns: on
//                                        those of `line` to `line` + 15)
//   tail(line, offset, count)            the first `count` < 16 values of a pack
//   add_sums(slot, line, count)          add the sums since the last call to those of `slot` and `line` (columns: of
//                                        `count` lines), and begin new ones
#pragma once

#include <type_traits>

#include "../work.h"
#include "lanes.h"

namespace asga {
namespace {

// Float32 sums go on in double after this many additions: their error stays near that of one addition.
constexpr int64_t kLongestSum = 512;
// Values of a block of columns that are taken together, to find them in the L1 cache.
constexpr int64_t kColumnBlock = 8192;

// Calls f(part, some) for every register of a pack with `some` of the first `count` values.
template <typename V, typename F>
ASGA_INLINE void for_each_part(int count, const F& f) {
  for (int r = 0; r < kRegisters<V>; ++r) {
    const int some = count - r * kWidth<V>;
    if (some <= 0) return;
    f(r, some < kWidth<V> ? some : kWidth<V>);
  }
}

// The sum of a term of one line, or of the lines of a pack of columns.
template <bool kColumns, typename V>
ASGA_INLINE void add_terms(double* to, const V* parts, int64_t count) {
  if constexpr (kColumns)
    add_lanes(to, parts, count);
  else
    *to += sum_lanes(parts);
}

template <typename Body>
ASGA_INLINE void sweep_rows(const Work& work, int64_t begin, int64_t end, Body body) {
  const auto [outer, channels, inner] = work.layout;
  const int64_t pieces = work.pieces_per_row();
  for (int64_t index = begin; index < end; ++index) {
    const Task task = task_of(work, index);
    for (int64_t unit = task.first_unit; unit < task.last_unit; ++unit) {
      const int64_t row = unit / pieces, start = (unit - row * pieces) * work.width;
      const int64_t values = inner - start < work.width ? inner - start : work.width, packs = values / kLanes;
      for (int64_t line = task.first_line; line < task.last_line; ++line) {
        const int64_t offset = (row * channels + line) * inner + start;
        body.packs(line, offset, packs, kLanes);
        if (packs * kLanes < values)
          body.tail(line, offset + packs * kLanes, static_cast<int>(values - packs * kLanes));
        body.add_sums(task.slot, line, 1);
      }
    }
  }
}

template <typename Body>
ASGA_INLINE void sweep_columns(const Work& work, int64_t begin, int64_t end, Body body) {
  const int64_t whole_rows = work.layout.numel() / work.width;
  for (int64_t index = begin; index < end; ++index) {
    const Task task = task_of(work, index);
    int64_t most = kColumnBlock / (task.last_line - task.first_line);
    most = most < 1 ? 1 : most < kLongestSum ? most : kLongestSum;
    for (int64_t row = task.first_unit; row < task.last_unit;) {
      int64_t rows = task.last_unit - row < most ? task.last_unit - row : most, last_line = task.last_line;
      if (row + rows > whole_rows) {
        // The short last row comes by itself.
        rows = whole_rows > row ? whole_rows - row : 1;
        if (row == whole_rows && work.layout.numel() - row * work.width < last_line)
          last_line = work.layout.numel() - row * work.width;
      }
      for (int64_t line = task.first_line; line < last_line; line += kLanes) {
        const int64_t count = last_line - line < kLanes ? last_line - line : kLanes;
        if (count == kLanes)
          body.packs(line, row * work.width + line, rows, work.width);
        else
          for (int64_t i = 0; i < rows; ++i) body.tail(line, (row + i) * work.width + line, static_cast<int>(count));
        body.add_sums(task.slot, line, count);
      }
      row += rows;
    }
  }
}

// Run the tasks from `begin` to `end`; make(columns, past_caches) builds the Body from two std::bool_constant.
template <typename scalar_t, typename Make>
void sweep(const Work& work, bool past_caches, const scalar_t* output, int64_t begin, int64_t end, const Make& make) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (work.columns) return sweep_columns(work, begin, end, make(yes, no));
  // Every pack has to begin on a line of the cache.
  const int64_t row_bytes = work.layout.inner * static_cast<int64_t>(sizeof(scalar_t));
  const bool one_row = work.layout.outer * work.layout.channels == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(output) % 64 == 0 && (one_row || row_bytes % 64 == 0);
  if (!past_caches || !aligned) return sweep_rows(work, begin, end, make(no, no));
  sweep_rows(work, begin, end, make(no, yes));
  fence_writes();
}

}  // namespace
}  // namespace asga
