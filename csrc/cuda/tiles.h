// How a tensor x[outer][channels][inner] is cut into tiles, one per team of threads, so that each thread meets few
// channels: their scales stay in registers and their partial sums need no atomics. Two ways: along the rows where the
// values of a channel are contiguous, down the columns where they are not. The cut depends on sizes only, never on the
// device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <variant>

#include "../tensor_layout.h"
#include "column_cut.h"
#include "reduce.h"
#include "row_cut.h"

namespace asga {

// Values in a 16-byte access.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* pointer) {
  return *reinterpret_cast<const Vector<T, N>*>(pointer);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* pointer, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(pointer) = vector;
}

// The values in the dtype of the arithmetic.
template <typename A, typename T, int N>
__device__ __forceinline__ void widen(const Vector<T, N>& vector, A (&wide)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) wide[n] = static_cast<A>(vector.values[n]);
}

// One instruction a value: a bfloat16 is the upper half of a float.
template <int N>
__device__ __forceinline__ void widen(const Vector<__nv_bfloat16, N>& vector, float (&wide)[N]) {
  if constexpr (N == 1) {
    wide[0] = __bfloat162float(vector.values[0]);
  } else {
    uint32_t pairs[N / 2];
    memcpy(pairs, &vector, sizeof pairs);
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      wide[2 * n] = __uint_as_float(pairs[n] << 16);
      wide[2 * n + 1] = __uint_as_float(pairs[n] & 0xffff0000u);
    }
  }
}

template <typename A, typename T, int N>
__device__ __forceinline__ Vector<T, N> narrow(const A (&wide)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int n = 0; n < N; ++n) vector.values[n] = static_cast<T>(wide[n]);
  return vector;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row, the `inner` values of one (outer, channel), belongs to a part of a warp if it is short, else to one or more
// blocks. They take the next rows of the same channel, too, where each row would leave too many sums. Every thread
// meets a single channel.
struct RowTiles {
  static constexpr int kChannels = 1;  // that a thread meets

  int64_t outer, channels, inner;
  RowCut size;
  bool aligned;  // every tensor starts on a 16-byte boundary

  struct Tile {
    int64_t channel, slot;
    int64_t begin, end;  // offsets: where its piece of the first row begins, and before which that of the last one does
    int64_t length;      // of each piece
  };

  static RowTiles cut(const ChannelLayout& layout, int vector, bool aligned, int64_t sum_bytes) {
    const RowCut size = cut_rows(layout.outer, layout.channels, layout.inner, vector, sum_bytes, kThreads, kWarp);
    return {layout.outer, layout.channels, layout.inner, size, aligned};
  }

  dim3 grid() const {
    const int64_t tiles = ceil_div(outer, size.height) * channels;
    return dim3(static_cast<unsigned>(ceil_div(tiles, kThreads / size.team)), static_cast<unsigned>(size.pieces));
  }
  __host__ __device__ int64_t slots() const { return ceil_div(outer, size.height) * size.pieces; }

  // Empty past the last row, with a valid channel. Adjacent teams have adjacent channels, so adjacent memory.
  __device__ Tile tile() const {
    const int64_t team = blockIdx.x * int64_t{kThreads / size.team} + threadIdx.x / size.team;
    const int64_t group = team / channels, channel = team - group * channels, start = blockIdx.y * size.piece;
    const int64_t first = group * size.height, last = min(first + size.height, outer);
    return {channel, group * size.pieces + blockIdx.y, (first * channels + channel) * inner + start,
            (last * channels + channel) * inner, min(size.piece, inner - start)};
  }

  __device__ int64_t channel(const Tile& tile, int) const { return tile.channel; }

  // Calls body(offset, width): vectors where they are aligned, single values before and after them.
  template <int N, typename F>
  __device__ __forceinline__ void for_each(const Tile& tile, const F& body) const {
    const int team = size.team, lane = threadIdx.x % team;
#pragma unroll 1
    for (int64_t begin = tile.begin; begin < tile.end; begin += channels * inner) {
      const int64_t end = begin + tile.length;
      const int64_t first = aligned ? min(ceil_div(begin, N) * N, end) : end;
      const int64_t last = aligned ? max(end / N * N, first) : end;
      const int64_t before = first - begin, singles = before + end - last;
#pragma unroll 1
      for (int64_t j = lane; j < singles; j += team) {
        body(j < before ? begin + j : last + j - before, std::integral_constant<int, 1>{});
      }
#pragma unroll 1
      for (int64_t i = first + lane * N; i < last; i += team * N) body(i, std::integral_constant<int, N>{});
    }
  }

  // Writes the team's sum of each of the first `count` terms to partials[term][channel][slot]. All threads call it.
  template <typename A, int N>
  __device__ __forceinline__ void reduce(A (&terms)[N][kChannels], int count, const Tile& tile, A* partials) const {
    const int64_t stride = channels * slots();
    A* mine = partials + tile.channel * slots() + tile.slot;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (size.team <= kWarp) {
      const bool writes = threadIdx.x % size.team == 0 && tile.begin < tile.end;
#pragma unroll
      for (int t = 0; t < N; ++t) {
        if (t >= count) break;
        const A total = warp_sum(terms[t][0], size.team);
        if (writes) mine[t * stride] = total;
      }
      return;
    }
    __shared__ A warps[kThreads / kWarp][N];
#pragma unroll
    for (int t = 0; t < N; ++t) {
      if (t >= count) break;
      const A total = warp_sum(terms[t][0]);
      if (lane == 0) warps[warp][t] = total;
    }
    __syncthreads();
    if (threadIdx.x < count) {
      A total = 0;
      for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w][threadIdx.x];
      mine[threadIdx.x * stride] = total;
    }
  }
};

// A column, the values of one (channel, inner) over all outer indices, belongs to one thread of each block that shares
// it. A thread takes W adjacent columns and loads them as a vector.
template <int W>
struct ColumnTiles {
  static constexpr int kChannels = W;  // that a thread meets, at most

  int64_t outer, channels, inner;
  int width;       // vectors of columns per block
  int64_t height;  // outer indices per block
  int64_t slices;  // blocks per column

  struct Tile {
    int64_t column, begin, end;  // the first of its columns; a range of outer indices
  };

  static ColumnTiles cut(const ChannelLayout& layout, int64_t sum_bytes) {
    const ColumnCut cut = cut_columns(layout.outer, layout.channels * layout.inner / W, W, sum_bytes, kThreads);
    return {layout.outer, layout.channels, layout.inner, cut.width, cut.height, cut.slices};
  }

  dim3 grid() const {
    return dim3(static_cast<unsigned>(ceil_div(columns(), int64_t{width} * W)), static_cast<unsigned>(slices));
  }
  __host__ __device__ int64_t columns() const { return channels * inner; }
  __host__ __device__ int64_t slots() const { return inner * slices; }

  // Empty for threads beyond the columns, with valid channels.
  __device__ Tile tile() const {
    const int lane = threadIdx.x / width;
    const int64_t column = first_column();
    if (column >= columns() || lane >= kThreads / width) return {0, 0, 0};
    return {column, blockIdx.y * height + lane, min((blockIdx.y + 1) * height, outer)};
  }

  __device__ int64_t channel(const Tile& tile, int n) const { return (tile.column + n) / inner; }

  // Calls body(offset, width) for vectors of columns.
  template <int N, typename F>
  __device__ __forceinline__ void for_each(const Tile& tile, const F& body) const {
    const int step = kThreads / width;
#pragma unroll 1
    for (int64_t o = tile.begin; o < tile.end; o += step) {
      body(o * columns() + tile.column, std::integral_constant<int, W>{});
    }
  }

  // Writes the block's sum of each of the first `count` terms and each column to partials[term][channel][slot]. All
  // threads call it.
  template <typename A, int N>
  __device__ __forceinline__ void reduce(A (&terms)[N][kChannels], int count, const Tile& tile, A* partials) const {
    __shared__ A threads[kThreads];
    const bool writes = threadIdx.x < width && first_column() < columns();
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const int64_t column = tile.column + w, owner = channel(tile, w);
      A* mine = partials + owner * slots() + blockIdx.y * inner + column - owner * inner;
#pragma unroll
      for (int t = 0; t < N; ++t) {
        if (t >= count) break;
        threads[threadIdx.x] = terms[t][w];
        __syncthreads();
        if (writes) {
          A total = 0;
          for (int j = threadIdx.x; j < kThreads / width * width; j += width) total += threads[j];
          mine[t * channels * slots()] = total;
        }
        __syncthreads();
      }
    }
  }

 private:
  __device__ int64_t first_column() const { return (blockIdx.x * int64_t{width} + threadIdx.x % width) * W; }
};

// Where W is the width of the vectors of columns that the registers allow.
template <int W>
using Tiles = std::conditional_t<W == 1, std::variant<RowTiles, ColumnTiles<1>>,
                                 std::variant<RowTiles, ColumnTiles<1>, ColumnTiles<W>>>;

// Columns if the values of a channel are scattered one by one, or in runs shorter than a warp that repeat often.
// `sum_bytes` is what partial sums take for each channel of a tile, 0 without any.
template <int W>
Tiles<W> cut_tiles(const ChannelLayout& layout, int vector, bool aligned, int64_t sum_bytes) {
  const bool short_rows = layout.inner < kWarp && layout.outer >= kWarp;
  if (layout.inner > 1 && !short_rows) return RowTiles::cut(layout, vector, aligned, sum_bytes);
  if (aligned && layout.channels * layout.inner % W == 0) return ColumnTiles<W>::cut(layout, sum_bytes);
  return ColumnTiles<1>::cut(layout, sum_bytes);
}

template <typename AnyTiles>
int64_t slots(const AnyTiles& tiles) {
  return std::visit([](const auto& cut) { return cut.slots(); }, tiles);
}

// True if all tensors start on the boundary of a 16-byte access.
template <typename... Pointers>
bool is_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace asga
