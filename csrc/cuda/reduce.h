// Sums in a fixed order: the same bits on every run, no atomics.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace asga {

constexpr int kThreads = 256;  // of every block
// Blocks per multiprocessor that the compiler must leave registers for: 128 a thread, and 255 in float64. Left to
// itself it aims at more blocks and spills.
template <typename A>
constexpr int kMinBlocks = sizeof(A) == 8 ? 1 : 2;
constexpr int kWarp = 32;

// The sum over each `team` adjacent lanes, a power of two up to the warp, in all of them.
template <typename A>
__device__ __forceinline__ A warp_sum(A value, int team = kWarp) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, value, lanes);
    if (lanes < team) value += other;
  }
  return value;
}

// The sum of values[0 .. count) in float64, in the first thread of a team, which is a warp or the whole block. All
// threads of the team call it.
template <typename Value>
__device__ __forceinline__ double team_sum(int64_t count, int team, const Value& value) {
  double total = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % team; i < count; i += team) total += value(i);
  total = warp_sum(total);
  if (team == kWarp) return total;
  __shared__ double warps[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = total;
  __syncthreads();
  total = 0.0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
  return total;
}

// Threads for a sum over `count` partial sums.
inline int team_for(int64_t count) { return count > 4 * kWarp ? kThreads : kWarp; }

}  // namespace asga
