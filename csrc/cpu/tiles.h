// Convolution on matrix tiles: products of bfloat16 with float32 accumulation in 16x16 tiles (Intel AMX), as
// an implicit GEMM that reads the parameter itself: no packed copy of the weights exists between two calls.
//
// float32 operands are split into bfloat16 slices, x = x0 + x1 + x2, whose products are exact in float32
// (Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations", ARITH 2019): three slices and six products keep the error of float32, two slices and three
// products about 4e-6, one slice is plain bfloat16.
#pragma once

#include <vector>

#include "../conv3d.h"
#include "winograd.h"

namespace r3d::cpu {

struct TilesArgs {
  ConvArgs conv;              // conv.weight is the parameter, [K, C, T, R, S]
  DType weight_dtype;         // float32 or bfloat16
  bool weight_channels_last;  // [K, T, R, S, C] in memory
  const float* scale;         // [K], multiplied into the sums, or null
  int slices;                 // of every operand: 1, 2 or 3
  WinogradTile tile;          // outputs along depth (1, 2, 4) and height (1, 2; 4 alone); width 1
};

// nullptr when tiles compute this convolution, otherwise why not.
const char* tiles_refuse(const TilesArgs& args);

// On the tile unit of this processor where `hardware`; otherwise by plain loops, for tests.
void conv3d_tiles(const TilesArgs& args, bool hardware);

// ---- how the work is cut up ----

// One axis of depth or height. Input positions that outputs `stride` apart read are one phase of the scratch,
// so that a tap is a constant shift there: tap t of output o reads phase `phase` at o + `shift`.
struct TilesAxis {
  struct Tap {
    int phase, shift;
    int index;  // of the kernel's taps, or groups of them
  };
  int points = 1;          // Winograd: transformed inputs of a tile; 1 otherwise
  int outputs = 1;         // of one unit: m of a Winograd tile, else 1
  int64_t units = 0;       // outputs or tiles along the axis
  int64_t halo = 0;        // positions that the last unit reads beyond its own
  std::vector<Tap> taps;   // of the reduction, those left out that only see padding; one for Winograd
  std::vector<int> phase;  // offsets of the phases that are read, below stride
};

// A step multiplies 32 elements of the reduction. `element` counts from the scratch pixel of the output.
struct TilesStep {
  int d, h;         // indices into the axes' taps
  int64_t element;  // elements to the right
};

// Channels [c0, c1) of all taps: pixels and weights of a chunk are in L2 while they meet, sums of chunks are
// added.
struct TilesChunk {
  int64_t c0, c1;
  int first, count;  // steps
};

struct TilesPlan {
  TilesAxis d, h;
  int group = 1;        // kernel rows side by side in one scratch pixel: fills the steps of stems
  bool picks = false;   // scratch rows hold only the pixels that a 1-wide strided kernel reads
  bool merged = false;  // a step runs over (s, row of the group, c) rather than over channels of one tap
  int64_t width = 0;    // channels of a scratch pixel: of a chunk
  int64_t pixel = 0;    // elements of a scratch pixel: width * group
  int64_t unit = 0;     // elements from one output to the next in a row
  int64_t pitch = 0;    // outputs of a scratch row, those that do not exist included
  int64_t padded = 0;   // steps * 32 of one tap row when merged
  std::vector<TilesStep> steps;
  std::vector<TilesChunk> chunks;
};

TilesPlan plan_tiles(const TilesArgs& args);

// A plan without containers: what instruction-set specific code may look at.
struct TilesAxisView {
  int points, outputs, phases, taps;
  int64_t units, halo;
  const TilesAxis::Tap* tap;
  const int* phase;
};
struct TilesView {
  TilesAxisView d, h;
  int group;
  bool picks, merged;
  int64_t width, pixel, unit, pitch, padded;
  const TilesStep* steps;
  int step_count;
  const TilesChunk* chunks;
  int chunk_count;
};

// Units of a block and channel panels of a task.
struct TilesBlock {
  int64_t n, d, h;  // samples, units along depth and height
  int64_t splits;   // of the output channels
};

TilesBlock choose_block(const TilesArgs& args, const TilesPlan& plan, int threads);

void conv3d_tiles_amx(const TilesArgs& args, const TilesView& plan, const TilesBlock& block);
void conv3d_tiles_plain(const TilesArgs& args, const TilesView& plan, const TilesBlock& block);

}  // namespace r3d::cpu
