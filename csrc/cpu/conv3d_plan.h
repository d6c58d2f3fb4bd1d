// How a direct convolution is cut up: the reduction into chunks whose packed weights stay in cache, the
// output pixels into blocks, the output channels into panels. The packer and every kernel follow the same
// plan.
#pragma once

#include <cstdint>
#include <vector>

#include "../conv3d.h"
#include "isa.h"

namespace r3d::cpu {

// The reduction index runs over (t, r, s, c); for fixed (t, r) the pairs (s, c) form a "row" of S*C elements
// that lies contiguously in a channels-last input when dilation.w == 1. A chunk is a piece of one row, or
// several whole rows of one t.
struct Chunk {
  int32_t t, r, rows;  // rows r .. r+rows-1 of plane t
  int32_t pos, len;    // piece [pos, pos+len) of the row; whole rows when rows > 1
  int64_t packed;      // first step of this chunk in the packed reduction
  int32_t steps;       // steps of the kernel (one element, or one bf16 pair) in this chunk
};

// Traits of a micro-kernel: what the packer has to know.
struct KernelTraits {
  Isa isa;
  bool dot;   // weights stay bfloat16, in pairs for vdpbf16ps; float32 otherwise
  int lanes;  // float32 lanes of one vector
  int panel;  // output channels of a full panel: a multiple of lanes
  int chunk;  // upper limit for the elements of a chunk
};

KernelTraits kernel_traits(Isa isa, DType dtype);

std::vector<Chunk> plan_chunks(int64_t c, const Dim3& kernel, const KernelTraits& traits);
int64_t plan_steps(const std::vector<Chunk>& chunks);

// Packed weights: a 64-byte header, then for every panel of output channels
// [steps][panel width] float32, or [steps][panel width][2] bfloat16. The last panel is narrower (a multiple
// of lanes).
struct PackHeader {
  uint32_t magic;
  int32_t isa, dot;
  int32_t t, r, s;
  int64_t c, k;
  int64_t bytes;
  int32_t reserved[4];
};
static_assert(sizeof(PackHeader) == 64, "the payload behind the header must stay 64-byte aligned");

constexpr uint32_t kPackMagic = 0x52334431;  // "R3D1"

int64_t packed_bytes(int64_t k, int64_t c, const Dim3& kernel, const KernelTraits& traits);
// weight: [K, C, T, R, S] of T = float, double or uint16_t (bfloat16 bits); scale: [K] or null, multiplied in
// float64.
template <class T>
void pack_weights(const T* weight, const double* scale, int64_t k, int64_t c, const Dim3& kernel,
                  const KernelTraits& traits, void* out);
// nullptr when `packed` fits the problem, otherwise what is wrong with it.
const char* check_packed(const void* packed, int64_t bytes, const ConvGeometry& g, DType dtype);

// Runs the convolution by the kernel that its weights were packed for.
void conv3d(const ConvArgs& args);

// A direct convolution that reads the parameter itself, of the activations' dtype: nothing packed is kept.
struct DirectArgs {
  ConvArgs conv;              // conv.weight is the parameter, [K, C, T, R, S]
  bool weight_channels_last;  // [K, T, R, S, C] in memory
  const float* scale;         // [K], multiplied into the sums, or null
  const void* kept;           // what keep_weights made for the same geometry, or null: sooner, in longer sums
};
void conv3d_direct(const DirectArgs& args);

// Weights that were turned once; for layers of few pixels without the planes of taps that only meet padding.
struct KeptHeader {
  uint32_t magic;
  int32_t isa, dot;
  int32_t panels;  // 0: all weights, as for many pixels
  int64_t bytes;
  ConvGeometry geometry;
  int64_t reserved[32 - 3 - sizeof(ConvGeometry) / 8];
};
static_assert(sizeof(KeptHeader) == 256, "the payload behind the header must stay 64-byte aligned");
constexpr uint32_t kKeptMagic = 0x52334b31;  // "R3K1"

// Bytes of the kept weights, and where `out` is not null the weights; 0 where the kernel has no use for any.
int64_t keep_weights(const DirectArgs& args, void* out);
// nullptr when `kept` was made for the arguments, otherwise what is wrong with it.
const char* check_kept(const void* kept, int64_t bytes, const DirectArgs& args);

void max_pool3d(const PoolArgs& args);
void avg_pool_linear(const HeadArgs& args);

}  // namespace r3d::cpu
