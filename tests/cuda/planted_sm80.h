// Small kernels for the sm_80 part of the emulator: each pipelined, so that a missing wait or barrier is a
// race.
#pragma once

#include "../../csrc/cuda/ptx/sm80.cuh"

namespace planted {

constexpr int kTile = 64, kDepth = 32;  // C[64, 64] = A[64, K] * B[K, 64], 32 of K a step

// Four warps of 32x32, A by ldmatrix, B by ldmatrix.trans, two stages. bfloat16 in, float32 out.
inline __global__ void gemm(const uint16_t* a, const uint16_t* b, float* c, int k) {
  R3D_DYNAMIC_SHARED(memory);
  using RowA = uint16_t[kDepth + 8];
  using RowB = uint16_t[kTile + 8];
  RowA* as = reinterpret_cast<RowA*>(memory);                             // [2 * 64]
  RowB* bs = reinterpret_cast<RowB*>(memory + 2 * kTile * sizeof(RowA));  // [2 * 32]
  const int t = int(threadIdx.x), warp = t / 32, lane = t % 32, m0 = warp / 2 * 32, n0 = warp % 2 * 32;
  auto copy = [&](int stage, int k0) {
    for (int i = t; i < kTile * kDepth / 8; i += 128) {
      const int row = i / (kDepth / 8), column = i % (kDepth / 8) * 8;
      r3d::cuda::cp_async_16(&as[stage * kTile + row][column], a + row * k + k0 + column,
                             k0 + column < k ? 16 : 0);
    }
    for (int i = t; i < kTile * kDepth / 8; i += 128) {
      const int row = i / (kTile / 8), column = i % (kTile / 8) * 8;
      r3d::cuda::cp_async_16(&bs[stage * kDepth + row][column], b + (k0 + row) * kTile + column,
                             k0 + row < k ? 16 : 0);
    }
    r3d::cuda::cp_async_commit();
  };
  float sum[2][4][4] = {};
  const int steps = (k + kDepth - 1) / kDepth;
  copy(0, 0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      copy((step + 1) % 2, (step + 1) * kDepth);
      r3d::cuda::cp_async_wait<1>();
    } else {
      r3d::cuda::cp_async_wait<0>();
    }
    __syncthreads();
    for (int half = 0; half < kDepth; half += 16) {
      uint32_t fa[2][4], fb[4][2];
      for (int i = 0; i < 2; i++)
        r3d::cuda::ldmatrix_x4(fa[i], &as[step % 2 * kTile + m0 + i * 16 + lane % 16][half + lane / 16 * 8]);
      for (int j = 0; j < 4; j++)
        r3d::cuda::ldmatrix_x2_trans(fb[j], &bs[step % 2 * kDepth + half + lane % 16][n0 + j * 8]);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) r3d::cuda::mma_bf16(sum[i][j], fa[i], fb[j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int e = 0; e < 4; e++)
        c[(m0 + i * 16 + e / 2 * 8 + lane / 4) * kTile + n0 + j * 8 + lane % 4 * 2 + e % 2] = sum[i][j][e];
}

// One warp: words[0..32) by x1, [32..96) by x2, [96..224) by x4, [224..352) by x4.trans, of 32 rows of 8
// numbers.
inline __global__ void load_matrices(const uint16_t* from, uint32_t* words) {
  R3D_DYNAMIC_SHARED(memory);
  const int lane = int(threadIdx.x);
  r3d::cuda::cp_async_16(memory + lane * 16, from + lane * 8, 16);
  r3d::cuda::cp_async_commit();
  r3d::cuda::cp_async_wait<0>();
  __syncthreads();
  uint32_t one[1], two[2], four[4];
  r3d::cuda::ldmatrix_x1(one, memory + lane * 16);
  words[lane] = one[0];
  r3d::cuda::ldmatrix_x2(two, memory + lane * 16);
  for (int i = 0; i < 2; i++) words[32 + i * 32 + lane] = two[i];
  r3d::cuda::ldmatrix_x4(four, memory + lane * 16);
  for (int i = 0; i < 4; i++) words[96 + i * 32 + lane] = four[i];
  r3d::cuda::ldmatrix_x4_trans(four, memory + lane * 16);
  for (int i = 0; i < 4; i++) words[224 + i * 32 + lane] = four[i];
}

// c[16, 8] = a[16, k] * b[8, k]^T by one instruction: a row of a and of b is 32 bytes.
template <int kind>  // 0 bfloat16, 1 float16, 2 TF32
__global__ void product(const uint32_t* a, const uint32_t* b, float* c) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const uint32_t fa[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  const uint32_t fb[2] = {b[g * 8 + t], b[g * 8 + t + 4]};
  float sum[4] = {};
  if (kind == 0) r3d::cuda::mma_bf16(sum, fa, fb);
  if (kind == 1) r3d::cuda::mma_f16(sum, fa, fb);
  if (kind == 2) r3d::cuda::mma_tf32(sum, fa, fb);
  for (int e = 0; e < 4; e++) c[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sum[e];
}

// Lane i copies the first i bytes of 16; lane 31 none, from nowhere.
inline __global__ void partial_copies(const uint16_t* from, uint32_t* words) {
  R3D_DYNAMIC_SHARED(memory);
  const int lane = int(threadIdx.x);
  const uint16_t* nowhere = from - (1 << 20);
  r3d::cuda::cp_async_16(memory + lane * 16, lane == 31 ? nowhere : from + lane * 8,
                         lane == 31 ? 0 : lane % 17);
  r3d::cuda::cp_async_commit();
  r3d::cuda::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; i++) words[lane * 4 + i] = reinterpret_cast<const uint32_t*>(memory)[lane * 4 + i];
}

inline __global__ void misaligned_copy(const uint16_t* from, uint32_t*) {
  R3D_DYNAMIC_SHARED(memory);
  r3d::cuda::cp_async_16(memory, from + 1, 16);
}
inline __global__ void misaligned_matrix(const uint16_t*, uint32_t* words) {
  R3D_DYNAMIC_SHARED(memory);
  uint32_t one[1];
  r3d::cuda::ldmatrix_x1(one, memory + threadIdx.x * 16 + 8);
  words[threadIdx.x] = one[0];
}

}  // namespace planted
