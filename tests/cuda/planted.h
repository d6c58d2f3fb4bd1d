// Kernels with and without a bug, to see whether the emulator finds it. Each turns data[0..n) of a block of n
// threads into what its comment says.
#pragma once

#include "../../csrc/cuda/device.cuh"

namespace planted {

constexpr int kThreads = 96;

// data[t] = the sum of all; `bug`: 0 none, 1 no barrier before the reads, 2 none before the second round's
// writes. Two rounds, so that the second overwrites what a slow warp may still be reading.
template <int bug>
__global__ void block_sum(float* data) {
  R3D_SHARED(float, values, [kThreads]);
  float total = 0;
  for (int round = 0; round < 2; round++) {
    values[threadIdx.x] = data[threadIdx.x] + round;
    if (bug != 1) __syncthreads();
    float sum = 0;
    for (int i = 0; i < kThreads; i++) sum += values[i];
    total += sum;
    if (bug != 2) __syncthreads();
  }
  __syncthreads();
  data[threadIdx.x] = total;
}

// data[t] = the value of the thread before; the only bug is the missing barrier. In the order of the threads
// it works.
__global__ void neighbour(float* data) {
  R3D_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = threadIdx.x > 0 ? values[threadIdx.x - 1] : -1.f;
}

// data[t] = the sum over the warp, by every kind of exchange.
__global__ void warp_sum(float* data) {
  float v = data[threadIdx.x];
  for (int flip = 1; flip < 8; flip *= 2) v += __shfl_xor_sync(~0u, v, flip);
  v += __shfl_down_sync(~0u, v, 8, 16) * (threadIdx.x % 16 < 8);
  v = __shfl_sync(~0u, v, 0, 16);
  const float other = __shfl_sync(~0u, v, threadIdx.x % 32 < 16 ? 16 : 0);
  v += other;
  __syncwarp();
  if (__ballot_sync(~0u, threadIdx.x % 2) != 0xaaaaaaaau ||
      !__any_sync(~0u, threadIdx.x == 40 || threadIdx.x % 32 == 3) || __all_sync(~0u, threadIdx.x % 32 == 3))
    v = -1;
  if (threadIdx.x % 32 < 16) v += __shfl_up_sync(0xffffu, 0.f, 1);  // half a warp
  data[threadIdx.x] = v;
}

// A barrier after a third of the threads have returned: allowed.
__global__ void early_return(float* data) {
  if (threadIdx.x < kThreads / 3) return;
  __syncthreads();
  data[threadIdx.x] = 1;
}

// What the emulator must report.
__global__ void stale_shared(float* data) {
  R3D_SHARED(float, values, [kThreads]);
  data[threadIdx.x] = values[threadIdx.x];
}
__global__ void past_the_end(float* data) {
  R3D_SHARED(float, values, [kThreads]);
  values[threadIdx.x + 1] = data[threadIdx.x];
}
__global__ void past_global(float* data) { data[threadIdx.x + 1] = 0; }
__global__ void lane_missing(float* data) {
  if (threadIdx.x % 32 == 5) return;
  data[threadIdx.x] = __shfl_xor_sync(~0u, data[threadIdx.x], 1);
}
__global__ void wrong_mask(float* data) { data[threadIdx.x] = __shfl_sync(1u, data[threadIdx.x], 0); }
__global__ void too_much_shared(float* data) {
  R3D_SHARED(float, values, [64 << 10]);
  values[threadIdx.x] = data[threadIdx.x];
}

inline const char* run(const char* name, float* data, int blocks) {
  const struct {
    const char* name;
    void (*kernel)(float*);
  } all[] = {{"block_sum", block_sum<0>},
             {"no_barrier_before_read", block_sum<1>},
             {"no_barrier_after_read", block_sum<2>},
             {"neighbour", neighbour},
             {"warp_sum", warp_sum},
             {"early_return", early_return},
             {"stale_shared", stale_shared},
             {"past_the_end", past_the_end},
             {"past_global", past_global},
             {"lane_missing", lane_missing},
             {"wrong_mask", wrong_mask},
             {"too_much_shared", too_much_shared}};
  for (const auto& each : all)
    if (std::string(each.name) == name) {
      R3D_LAUNCH(each.kernel, dim3(blocks), dim3(kThreads), nullptr, data);
      return r3d::cuda::launch_error();
    }
  return "no such kernel";
}

}  // namespace planted
