// One small pipeline of TMA, wgmma and a staged epilogue, with and without a bug, to see whether the emulator
// finds it: y[pixel, channel] = sum over k of b[pixel, k] * a[channel, k] + residual[pixel, channel], float16
// in and out, for 64 channels, 64 pixels a tile, 64 values of k a step.
#pragma once

#include "../../csrc/cuda/tensor_map.h"

#include "../../csrc/cuda/element.cuh"

namespace planted_sm90 {

using namespace r3d::cuda;

enum Bug : int {
  kNone,
  kNoFullWait,             // products read a stage before its bytes have landed
  kNoEmptyWait,            // a stage is loaded again while it is read
  kReleasedTooEarly,       // the same: the consumer says so before its products have finished
  kReadBeforeProducts,     // accumulators are read while products are under way
  kNoProductFence,         // no wgmma_fence after the accumulators were touched
  kResidualTooEarly,       // the staging buffer is read before the residual is there
  kNoFenceBeforeStore,     // TMA does not see the outputs
  kStoreTooEarly,          // TMA stores before all threads have written
  kStagingReusedTooEarly,  // the next residual is loaded while the outputs are stored
  kTooFewBytes,            // the barrier expects less than is loaded, so that the phase ends too early
  kTooManyBytes,           // it never ends
  kTooManyArrivals,        // each lane of a warp arrives, where one is expected
  kNoNamedBarrier,         // a flag is read before it is written
  kBarrierOverwritten,     // a load that is too long runs into the barriers
  kTicketTooEarly,         // a ticket speaks for threads that have not met yet
  kWarpTicketTooEarly,     // the same, of a warp
  kNoWaitForEarlier,       // the kernel in front of this one may still write what is read
  kBugs
};

constexpr int kTiles = 3, kSteps = 5, kStages = 2, kThreads = 160;
constexpr int kTile = 64 * 128;  // bytes of 64 rows
constexpr int kShared = kStages * 2 * kTile + kTile + 1024;

template <int bug>
__global__ void pipeline(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                         const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap y,
                         float* flags, unsigned* tickets) {
  R3D_DYNAMIC_SHARED(shared);
  char* staging = shared + kStages * 2 * kTile;
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + kTile);
  uint64_t *empty = full + kStages, *open = empty + kStages, *done = open + 1;
  int* flag = reinterpret_cast<int*>(done + 1);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      hopper::mbarrier_init(full + s, 1);
      hopper::mbarrier_init(empty + s, 4);
    }
    hopper::mbarrier_init(open, 1);
    hopper::mbarrier_init(done, 128);
    hopper::fence_mbarrier_init();
  }
  __syncthreads();
  if (bug != kNoWaitForEarlier) hopper::wait_for_earlier();

  if (warp == 4) {
    if (!hopper::elect_one()) return;
    int stage = 0, phase = 0;
    for (int tile = 0; tile < kTiles; tile++) {
      hopper::mbarrier_arrive_expect(open, kTile);
      hopper::load_tile(staging, &residual, open, 0, tile * 64);
      for (int step = 0; step < kSteps; step++) {
        if (bug != kNoEmptyWait) hopper::mbarrier_wait(empty + stage, phase ^ 1);
        hopper::mbarrier_arrive_expect(full + stage, bug == kTooFewBytes    ? kTile
                                                     : bug == kTooManyBytes ? 3 * kTile
                                                                            : 2 * kTile);
        hopper::load_tile(shared + stage * 2 * kTile, &a, full + stage, step * 64, 0);
        hopper::load_tile(shared + stage * 2 * kTile + kTile, &b, full + stage, step * 64, tile * 64);
        if (bug == kBarrierOverwritten && tile == 1 && step == 0)
          hopper::load_tile(staging + 1024, &b, full + stage, 0, 0);
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      if (bug != kStoreTooEarly) hopper::mbarrier_wait(done, tile & 1);
      hopper::store_tile(&y, staging, 0, tile * 64);
      hopper::commit_stores();
      if (bug != kStagingReusedTooEarly) hopper::wait_for_stores();
    }
    return;
  }

  int stage = 0, phase = 0;
  for (int tile = 0; tile < kTiles; tile++) {
    float acc[32];
    for (int step = 0; step < kSteps; step++) {
      if (bug != kNoFullWait) hopper::mbarrier_wait(full + stage, phase);
      if (bug != kNoProductFence) hopper::wgmma_fence();
      for (int depth = 0; depth < 4; depth++)
        hopper::wgmma<Float16, 64>(acc, hopper::descriptor(shared + stage * 2 * kTile + depth * 32),
                                   hopper::descriptor(shared + stage * 2 * kTile + kTile + depth * 32),
                                   step > 0 || depth > 0);
      hopper::wgmma_commit();
      if (bug == kReleasedTooEarly) {
        if (lane == 0) hopper::mbarrier_arrive(empty + stage);
        hopper::wgmma_wait<1>();
      } else {
        if (bug == kReadBeforeProducts && step == kSteps - 1)
          hopper::wgmma_wait<1>();
        else
          hopper::wgmma_wait<0>();
        if (lane == 0 || bug == kTooManyArrivals) hopper::mbarrier_arrive(empty + stage);
      }
      if (++stage == kStages) stage = 0, phase ^= 1;
    }
    if (bug == kReleasedTooEarly) hopper::wgmma_wait<0>();

    if (bug != kResidualTooEarly) hopper::mbarrier_wait(open, tile & 1);
    const int chunk = warp * 2 + lane / 8 % 2;
    for (int j = 0; j < 4; j++) {
      const int pixel = j * 16 + lane / 16 * 8 + lane % 8;
      char* at = staging + pixel * 128 + ((chunk ^ (pixel & 7)) << 4);
      uint32_t packed[4];
      hopper::load_transposed(packed, at);
      for (int q = 0; q < 4; q++)
        packed[q] = Float16::pack(acc[j * 8 + q * 2] + Float16::load(uint16_t(packed[q])),
                                  acc[j * 8 + q * 2 + 1] + Float16::load(uint16_t(packed[q] >> 16)));
      hopper::store_transposed(at, packed);
    }
    if (bug != kNoFenceBeforeStore) hopper::fence_for_copies();
    hopper::mbarrier_arrive(done);
    if (bug == kReadBeforeProducts) hopper::wgmma_wait<0>();

    if (threadIdx.x == 70) *flag = tile;
    if (bug == kTicketTooEarly && threadIdx.x == 0) hopper::take_ticket<128>(tickets);
    if (bug != kNoNamedBarrier) hopper::named_barrier(1, 128);
    if (bug != kTicketTooEarly && bug != kNoNamedBarrier && threadIdx.x == 0)
      hopper::take_ticket<128>(tickets);
    flags[tile * 128 + threadIdx.x] = float(*flag);
    hopper::named_barrier(1, 128);

    if (bug != kWarpTicketTooEarly) hopper::warp_barrier();
    if (lane < 2) hopper::take_ticket<32>(tickets + 1 + lane);
    hopper::warp_barrier();
  }
}

template <int bug>
const char* launch(const TensorMap (&m)[4], float* flags) {
  unsigned tickets[3] = {};
  R3D_LAUNCH_SHARED(pipeline<bug>, dim3(1), dim3(kThreads), kShared, nullptr, m[0], m[1], m[2], m[3], flags,
                    tickets);
  return launch_error();
}

template <int... bug>
const char* run(int which, const TensorMap (&m)[4], float* flags, std::integer_sequence<int, bug...>) {
  using Launch = const char* (*)(const TensorMap(&)[4], float*);
  constexpr Launch all[] = {launch<bug>...};
  return all[which](m, flags);
}

// a [64, K], b and y and residual [kTiles * 64, ...]
inline const char* run(int bug, const void* a, const void* b, const void* residual, void* y, float* flags) {
  constexpr int64_t depth = kSteps * 64, pixels = kTiles * 64;
  const Tiled tiled[4] = {{2, a, {depth, 64}, {2, 2 * depth}, {64, 64}},
                          {2, b, {depth, pixels}, {2, 2 * depth}, {64, 64}},
                          {2, residual, {64, pixels}, {2, 128}, {64, 64}},
                          {2, y, {64, pixels}, {2, 128}, {64, 64}}};
  TensorMap maps[4];
  for (int i = 0; i < 4; i++)
    if (const char* error = encode(&maps[i], tiled[i])) return error;
  return run(bug, maps, flags, std::make_integer_sequence<int, kBugs>());
}

}  // namespace planted_sm90
