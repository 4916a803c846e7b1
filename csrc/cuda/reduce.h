// Sums in a fixed order: the same bits on every run, no atomics.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace asga {

constexpr int kThreads = 256;  // of every block
// Allows 128 registers a thread: left to itself, ptxas aims at more blocks and spills in float64.
constexpr int kMinBlocks = 2;
constexpr int kWarp = 32;

// The sum over the warp, in every lane.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// The sum over a team, a warp or the whole block, in its first thread.
__device__ __forceinline__ double team_sum(double value, int team) {
  value = warp_sum(value);
  if (team == kWarp) return value;
  __shared__ double warps[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += warps[w];
  return total;
}

// sums[group][channel] = factors[group] * the sum of partials[group][0][channel][slot] over the slots, in
// float64. `terms` is the size of the second dimension of `partials`; no `factors` are ones. One team per
// sum.
template <typename A>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sum_slots_kernel(A* __restrict__ sums, const A* __restrict__ partials, const A* __restrict__ factors, int64_t count,
                     int64_t channels, int terms, int64_t slots, int team) {
  const int64_t sum = blockIdx.x * int64_t{kThreads / team} + threadIdx.x / team;
  if (sum >= count) return;  // whole teams, so none is missing from a reduction
  const int64_t group = sum / channels, channel = sum - group * channels;
  const A* mine = partials + (group * terms * channels + channel) * slots;
  const int lane = threadIdx.x % team;
  double total = 0.0;
  for (int64_t slot = lane; slot < slots; slot += team) total += static_cast<double>(mine[slot]);
  total = team_sum(total, team);
  if (lane == 0) sums[sum] = static_cast<A>(factors == nullptr ? total : total * static_cast<double>(factors[group]));
}

template <typename A>
void launch_sum_slots(A* sums, const A* partials, const A* factors, int64_t groups, int64_t channels, int terms,
                      int64_t slots, cudaStream_t stream) {
  const int team = slots > 4 * kWarp ? kThreads : kWarp;
  const int64_t count = groups * channels, per_block = kThreads / team;
  const dim3 grid(static_cast<unsigned>((count + per_block - 1) / per_block));
  sum_slots_kernel<<<grid, kThreads, 0, stream>>>(sums, partials, factors, count, channels, terms, slots, team);
  ASGA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace asga
