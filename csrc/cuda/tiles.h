// How a tensor x[outer][channels][inner] is cut into tiles, one per team of threads, so that each thread
// meets a single channel: its scale stays in registers and its partial sums need no atomics. Two ways: along
// the rows where the values of a channel are contiguous, down the columns where they are not. The cut depends
// on sizes only, never on the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <variant>

#include "../tensor_layout.h"
#include "reduce.h"

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

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile: the channel of this thread, where its partial sums go, and a range of offsets (rows) or outer
// indices (columns).
struct Tile {
  int64_t channel, slot, begin, end;
};

// A row, the `inner` values of one (outer, channel), belongs to a warp if it is short, else to one or more
// blocks.
struct RowTiles {
  int64_t rows, channels, inner;
  int64_t piece;  // values of a row per tile
  int pieces;     // tiles per row
  int team;       // threads per tile: a warp or a block
  bool aligned;   // every tensor starts on a 16-byte boundary

  // One vector per thread while that needs at most this many blocks, then more vectors per thread. Bounds the
  // partial sums to this many per term and gives the large GPUs (about 150 multiprocessors) a dozen blocks
  // each.
  static constexpr int64_t kMaxBlocks = 2048;

  static RowTiles cut(const ChannelLayout& layout, int vector, bool aligned) {
    const int64_t rows = layout.outer * layout.channels, vectors = ceil_div(layout.inner, vector);
    // A block for a row that would leave more than half of it idle is better spent on eight rows.
    if (vectors < kThreads / 2) return {rows, layout.channels, layout.inner, layout.inner, 1, kWarp, aligned};
    const int64_t most = std::max<int64_t>(1, kMaxBlocks / rows);
    const int64_t piece = ceil_div(vectors, kThreads * most) * kThreads * vector;
    const int pieces = static_cast<int>(ceil_div(layout.inner, piece));
    return {rows, layout.channels, layout.inner, piece, pieces, kThreads, aligned};
  }

  dim3 grid() const {
    return dim3(static_cast<unsigned>(ceil_div(rows, kThreads / team)), static_cast<unsigned>(pieces));
  }
  __host__ __device__ int64_t slots() const { return rows / channels * pieces; }

  // Empty past the last row, with a valid channel.
  __device__ Tile tile() const {
    const int64_t row = blockIdx.x * int64_t{kThreads / team} + threadIdx.x / team;
    const int64_t outer = row / channels, start = blockIdx.y * piece;
    const int64_t end = row < rows ? min(start + piece, inner) : start;
    return {row - outer * channels, outer * pieces + blockIdx.y, row * inner + start, row * inner + end};
  }

  // Calls body(offset, width): vectors where they are aligned, single values before and after them.
  template <int N, typename F>
  __device__ __forceinline__ void for_each(const Tile& tile, const F& body) const {
    const int lane = threadIdx.x % team;
    const int64_t first = aligned ? min(ceil_div(tile.begin, N) * N, tile.end) : tile.end;
    const int64_t last = aligned ? max(tile.end / N * N, first) : tile.end;
    const int64_t before = first - tile.begin, singles = before + tile.end - last;
    for (int64_t j = lane; j < singles; j += team) {
      body(j < before ? tile.begin + j : last + j - before, std::integral_constant<int, 1>{});
    }
    for (int64_t i = first + lane * N; i < last; i += team * N) body(i, std::integral_constant<int, N>{});
  }

  // Writes the team's sum of each of the first `count` terms to partials[term][channel][slot].
  template <typename A, int N>
  __device__ __forceinline__ void reduce(A (&terms)[N], int count, const Tile& tile, A* partials) const {
    const int64_t stride = channels * slots();
    A* mine = partials + tile.channel * slots() + tile.slot;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (team == kWarp) {
      if (tile.begin == tile.end) return;  // the whole warp
#pragma unroll
      for (int t = 0; t < N; ++t) {
        if (t >= count) break;
        terms[t] = warp_sum(terms[t]);
        if (lane == 0) mine[t * stride] = terms[t];
      }
      return;
    }
    __shared__ A warps[kThreads / kWarp][N];
#pragma unroll
    for (int t = 0; t < N; ++t) {
      if (t >= count) break;
      terms[t] = warp_sum(terms[t]);
      if (lane == 0) warps[warp][t] = terms[t];
    }
    __syncthreads();
    if (threadIdx.x < count) {
      A total = 0;
      for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w][threadIdx.x];
      mine[threadIdx.x * stride] = total;
    }
  }
};

// A column, the values of one (channel, inner) over all outer indices, belongs to one thread of each block
// that shares it.
struct ColumnTiles {
  int64_t outer, channels, inner;
  int width;       // columns per block
  int64_t height;  // outer indices per block
  int64_t slices;  // blocks per column

  // Enough to fill the large GPUs; each block leaves `width` partial sums per term.
  static constexpr int64_t kMaxBlocks = 1024;

  static ColumnTiles cut(const ChannelLayout& layout) {
    const int64_t columns = layout.channels * layout.inner, blocks = ceil_div(columns, kThreads);
    const int width = static_cast<int>(ceil_div(columns, blocks)), lanes = kThreads / width;
    const int64_t most = std::max<int64_t>(1, kMaxBlocks / blocks);
    const int64_t height = ceil_div(layout.outer, lanes * most) * lanes;
    return {layout.outer, layout.channels, layout.inner, width, height, ceil_div(layout.outer, height)};
  }

  dim3 grid() const {
    return dim3(static_cast<unsigned>(ceil_div(channels * inner, width)), static_cast<unsigned>(slices));
  }
  __host__ __device__ int64_t slots() const { return inner * slices; }

  // Empty for threads beyond the columns, with a valid channel.
  __device__ Tile tile() const {
    const int lane = threadIdx.x / width;
    const int64_t column = blockIdx.x * int64_t{width} + threadIdx.x % width;
    if (column >= channels * inner || lane >= kThreads / width) return {0, 0, 0, 0};
    const int64_t channel = column / inner, begin = blockIdx.y * height + lane;
    return {channel, blockIdx.y * inner + column - channel * inner, begin, min((blockIdx.y + 1) * height, outer)};
  }

  template <int N, typename F>
  __device__ __forceinline__ void for_each(const Tile& tile, const F& body) const {
    const int64_t columns = channels * inner, column = blockIdx.x * int64_t{width} + threadIdx.x % width;
    const int step = kThreads / width;
    for (int64_t o = tile.begin; o < tile.end; o += step) {
      body(o * columns + column, std::integral_constant<int, 1>{});
    }
  }

  // Writes the block's sum of each of the first `count` terms and each column to
  // partials[term][channel][slot].
  template <typename A, int N>
  __device__ __forceinline__ void reduce(A (&terms)[N], int count, const Tile& tile, A* partials) const {
    __shared__ A threads[kThreads];
    const bool writes = threadIdx.x < width && blockIdx.x * int64_t{width} + threadIdx.x < channels * inner;
    A* mine = partials + tile.channel * slots() + tile.slot;
#pragma unroll
    for (int t = 0; t < N; ++t) {
      if (t >= count) break;
      threads[threadIdx.x] = terms[t];
      __syncthreads();
      if (writes) {
        A total = 0;
        for (int j = threadIdx.x; j < kThreads / width * width; j += width) total += threads[j];
        mine[t * channels * slots()] = total;
      }
      __syncthreads();
    }
  }
};

using Tiles = std::variant<RowTiles, ColumnTiles>;

// Columns if the values of a channel are scattered one by one, or in runs shorter than a warp that repeat
// often.
inline Tiles cut_tiles(const ChannelLayout& layout, int vector, bool aligned) {
  const bool short_rows = layout.inner < kWarp && layout.outer >= kWarp;
  if (layout.inner == 1 || short_rows) return ColumnTiles::cut(layout);
  return RowTiles::cut(layout, vector, aligned);
}

inline int64_t slots(const Tiles& tiles) {
  return std::visit([](const auto& cut) { return cut.slots(); }, tiles);
}

// True if all tensors start on the boundary of a 16-byte access.
template <typename... Pointers>
bool is_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace asga
