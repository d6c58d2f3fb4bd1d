// What the Hopper kernels share: the ring's turns, and the way of the sums from registers to a staging
// buffer.
#pragma once

#ifdef R3D_EMU
#include "device.cuh"
#include "emu/hopper.h"
#else
#include "ptx/hopper.cuh"
#endif
#include "conv3d_sm90.h"
#include "element.cuh"

namespace r3d::cuda::sm90 {

// A block has 168 a thread; what the copying warpgroup gives up, the consumers can take.
constexpr int kCopyRegisters = 72, kMultiplyRegisters = 216;
static_assert(kCopyRegisters + kSm90Consumers * kMultiplyRegisters <= 168 * (1 + kSm90Consumers),
              "setmaxnreg waits for ever for registers that the block does not have");

// Where a ring is read or filled: a stage, and the parity of the phase that its barriers are in.
template <int kStages>
struct Turn {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() { next(kStages); }
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// Scale and bias of the two channels that a thread has in each of its blocks. Read before the products, which
// hide how long that takes.
template <int kBlocks>
struct Affine {
  float scale[kBlocks][2], bias[kBlocks][2];
  template <class Params>
  __device__ __forceinline__ Affine(const Params& p, int first_channel, int thread) {
#pragma unroll
    for (int m = 0; m < kBlocks; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int channel = first_channel + m * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * i;
        const bool inside = channel < p.channels;
        scale[m][i] = inside ? p.scale[channel] : 0.f;
        bias[m][i] = inside ? p.bias[channel] : 0.f;
      }
  }
};

// Scale, bias, residual, activation, conversion: registers to staging buffer. A warp has sixteen channels;
// sixteen pixels at a time make four 8 x 8 matrices, which are stored transposed: a row is one pixel's eight
// channels.
template <class T, class K, class Params>
__device__ __forceinline__ void finish(const K& k, const Params& p, const Affine<K::kBlocks>& affine,
                                       int consumer, int thread, const float (&acc)[K::kBlocks][K::kN / 2]) {
  const int warp = thread / 32, lane = thread % 32;
  const float floor = p.relu ? 0.f : -INFINITY;  // nothing is below it; NaN passes the comparison below
#pragma unroll
  for (int m = 0; m < K::kBlocks; m++) {
    char* block = k.block(consumer, m);
    const int chunk = warp * 2 + lane / 8 % 2;  // 16 bytes of the pixel's 128
#pragma unroll
    for (int j = 0; j < K::kN / 16; j++) {
      int pixel = j * 16 + lane / 16 * 8 + lane % 8;
      bool stored = true;
      if constexpr (K::tile.taps > 1) {  // the padding between rows is left out
        const int row = pixel * p.per_width >> 16, column = pixel - row * p.width;
        stored = row < p.rows && column < p.out_w;
        pixel = row * p.out_w + column;
      }
      char* at = block + pixel * K::kRow + ((chunk ^ (pixel & 7)) << 4);
      if (!stored) at = k.spare + (consumer * 128 + thread) * 16;
      float v[4][2];
#pragma unroll
      for (int q = 0; q < 4; q++)  // q: pixels of this half, channels of this half
#pragma unroll
        for (int e = 0; e < 2; e++)
          v[q][e] = fmaf(acc[m][j * 8 + q * 2 + e], affine.scale[m][q % 2], affine.bias[m][q % 2]);
      uint32_t packed[4];
      if (p.has_residual) {
        hopper::load_transposed(packed, at);
#pragma unroll
        for (int q = 0; q < 4; q++) {
          v[q][0] += T::load(uint16_t(packed[q]));
          v[q][1] += T::load(uint16_t(packed[q] >> 16));
        }
      }
#pragma unroll
      for (int q = 0; q < 4; q++)
        packed[q] = T::pack(v[q][0] < floor ? floor : v[q][0], v[q][1] < floor ? floor : v[q][1]);
      hopper::store_transposed(at, packed);
    }
  }
}

}  // namespace r3d::cuda::sm90
