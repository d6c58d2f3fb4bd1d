// The tensor-core convolution for compute capability 8.0 and later, as an implicit matrix product:
//
//   y[m, k] = act( scale[k] * sum_j A[m, j] * W[k, j] + bias[k] + residual[m, k] )
//
// m is an output pixel and j runs over filter taps and channels. What lies here is plain C++: how operands
// lie in memory, which tile runs, and the functions that the op calls.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../conv3d.h"

namespace r3d::cuda::sm80 {

constexpr int kChunk = 16;       // bytes of one cp.async
constexpr int kStepBytes = 128;  // of a row that one step of the main loop multiplies
constexpr int kStepChunks = kStepBytes / kChunk;
constexpr int kMostTaps = 512;         // whose offsets are kept in shared memory
constexpr int kMostTapBits = 31;       // T + R + S: one bit a tap coordinate in a word, and one to spare
constexpr int kMostShared = 99 << 10;  // bytes of a block on 8.6, 8.9 and 12.0; 8.0 has more

// How A and W lie. A tap is a run of neighbouring elements, so many for every filter position: the channels
// of a pixel up to whole chunks, zeros behind the last one; or, where channels are few, those of all S pixels
// of a filter row, which lie side by side in memory (`rows`): 7 taps of 3 channels fill 4 chunks instead
// of 7.
struct Layout {
  bool rows;             // a tap is a filter row: the kernel sees S = 1
  int64_t pixel;         // elements of a pixel in memory
  int64_t tap;           // elements of a tap, whole chunks
  Dim3 taps;             // filter positions
  int64_t steps;         // of the main loop
  int64_t row_elements;  // of a row of W: whole steps, the end is zeros
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements from a pixel to the next where pixels begin at whole chunks.
constexpr int64_t pitch_of(int64_t channels, DType t) {
  const int64_t per_chunk = kChunk / element_size(t);
  return ceil_div(channels, per_chunk) * per_chunk;
}

inline Layout layout_of(const ConvGeometry& g, DType t) {
  const int64_t per_chunk = kChunk / element_size(t);
  Layout l{};
  l.rows = false;
  l.pixel = l.tap = pitch_of(g.c, t);
  l.taps = g.kernel;
  // Windows of a row start at whole chunks where stride * pixel is a multiple of a chunk.
  int64_t pixel = g.c;
  while (pixel * g.stride.w % per_chunk) pixel++;
  const int64_t row = ceil_div(g.kernel.w * pixel, per_chunk) * per_chunk;
  // Rows are always a copy of x: only where they spare a quarter of the sum.
  if (g.kernel.w > 1 && g.dilation.w == 1 && pixel < l.pixel && 4 * row <= 3 * g.kernel.w * l.tap) {
    l.rows = true;
    l.pixel = pixel;
    l.tap = row;
    l.taps.w = 1;
  }
  const int64_t per_step = kStepBytes / element_size(t);
  l.steps = ceil_div(l.taps.volume() * l.tap, per_step);
  l.row_elements = l.steps * per_step;
  return l;
}

struct TileShape {
  int m, n;    // pixels, output channels
  int stages;  // of the pipeline
  int threads;
  int blocks;         // resident on a multiprocessor with 164 KiB of shared memory
  double efficiency;  // share of the tensor cores' rate that the operands' way through shared memory allows
  constexpr int stage_bytes() const { return (m + n) * kStepBytes; }
};
constexpr TileShape kTiles[] = {
    {128, 128, 3, 256, 1, 1.0}, {128, 64, 3, 128, 2, 0.95}, {64, 64, 4, 128, 2, 0.75}};
constexpr int kTapBytes = 16;
constexpr int shared_bytes(const TileShape& t, int64_t taps) {
  return t.stages * t.stage_bytes() + int(taps + kStepChunks) * kTapBytes;
}

struct Choice {
  int tile;           // of kTiles
  int splits;         // parts of the sum, each in blocks of its own; 0: no tile can run
  double cycles = 0;  // predicted
};

// The tile, or `only` that one, and the split of the sum with the fewest predicted cycles. Depends on the
// geometry and the number of multiprocessors alone.
inline Choice choose(const ConvGeometry& g, DType t, int multiprocessors, int only = -1) {
  const Layout l = layout_of(g, t);
  Choice best{0, 0};
  for (int i = 0; i < int(sizeof kTiles / sizeof *kTiles); i++) {
    const TileShape& tile = kTiles[i];
    if ((only >= 0 && i != only) || shared_bytes(tile, l.taps.volume()) > kMostShared) continue;
    const int64_t tiles = ceil_div(g.pixels(), tile.m) * ceil_div(g.k, tile.n);
    for (int splits : {1, 2, 3, 4, 6, 8, 12, 16}) {
      if (splits > 1 && l.steps / splits < 4) continue;
      const int64_t steps = ceil_div(l.steps, splits);
      const int64_t blocks = tiles * splits, evenly = ceil_div(blocks, multiprocessors);
      const int64_t resident = evenly < tile.blocks ? evenly : tile.blocks;
      // 1024 multiplications of 16 bits a cycle; fewer than eight warps do not hide their own latencies
      const double rate = 1024 * tile.efficiency * (resident * tile.threads < 256 ? 0.7 : 1.0);
      const double block = double(tile.m) * tile.n * 64 / rate * double(steps) + 2000.0 / double(resident);
      double cycles = double(ceil_div(blocks, multiprocessors * resident) * resident) * block;
      // the parts are written and read in float32 by one more kernel, some 10 bytes a cycle and
      // multiprocessor
      if (splits > 1)
        cycles += 3000 + double(g.pixels()) * double(g.k) * 8 * splits / (10.0 * multiprocessors);
      if (best.splits == 0 || cycles < best.cycles) best = {i, splits, cycles};
    }
  }
  return best;
}

// Null, or why the kernel does not take the geometry.
inline const char* refuses(const ConvGeometry& g, DType t) {
  const Layout l = layout_of(g, t);
  if (l.taps.d + l.taps.h + l.taps.w > kMostTapBits || l.taps.volume() > kMostTaps)
    return "the kernel size is larger than T + R + S = 31 or 512 taps";
  if (g.out.volume() > INT32_MAX - 512) return "a sample has more than 2^31 output pixels";
  for (int64_t size : {g.in.d, g.in.h, g.in.w, g.padding.d, g.padding.h, g.padding.w, g.k, g.c})
    if (size > INT32_MAX / 4) return "a size is larger than 2^29";
  for (int64_t step : {g.stride.d, g.stride.h, g.stride.w, g.dilation.d, g.dilation.h, g.dilation.w})
    if (step > INT32_MAX / 1024) return "a stride or dilation is larger than 2^21";
  if (ceil_div(g.pixels(), kTiles[2].m) * ceil_div(g.k, kTiles[2].n) > INT32_MAX / 16)
    return "more tiles than a grid has blocks";
  return nullptr;
}

struct Strides {
  int64_t n, c, d, h, w;  // elements
};

// Where conv.x is a decoder's clip, of another dtype perhaps: what it is on its way to the rows that the
// kernel reads, which are of conv.dtype and zero where they are padding.
struct ClipSource {
  int from = -1;  // of ClipArgs; -1: x is of conv.dtype and taken as it is
  const float* scale = nullptr;
  const float* shift = nullptr;
};

// conv.x may lie in any way: it is read in place where its pixels begin at whole chunks, else copied to rows.
// Pixels of residual and y lie one after the other, at pitches of K elements or more. Whole chunks of them
// are the fast way: where K is none, what lies behind the channels is never read, and is written as zeros in
// y.
struct Call {
  ConvArgs conv;  // conv.weight is what pack() wrote
  Strides x;      // of conv.x
  int64_t residual_pitch, y_pitch;
  const float* scale;  // [K] or null: 1
  int multiprocessors;
  Choice choice;
  ClipSource clip;
};

// Of the current device; 0 where there is none.
int device_multiprocessors();

// Bytes of scratch that run() needs for this call, 0 for none.
int64_t workspace_bytes(const Call& call);

// Enqueue on `stream` of the current device; null, or what went wrong.
const char* run(const Call& call, void* workspace, void* stream);
// weight [K, C, T, R, S] of type `from`, contiguous, to [K, row_elements] of type `to`; float32 is rounded to
// TF32.
const char* pack(const ConvGeometry& g, DType from, const void* weight, DType to, void* packed, void* stream);

// A clip or an activation, in any layout, to channels-last rows: y[n, d, h, wp, cp], zero where no x is.
struct Rows {
  int64_t n, c;
  Dim3 in;
  Strides x_strides;
  const void* x;
  int64_t left, width, pixel;  // x starts `left` pixels into a row of `width` pixels of `pixel` elements
  void* y;
};
const char* to_rows(const Rows& rows, DType dtype, void* stream);

// The same with the dtype changed and each channel multiplied and shifted: a decoder's clip to what a stem
// takes.
struct ClipArgs {
  Rows rows;
  int from;  // 0 float32, 1 bfloat16, 2 float16, 3 uint8
  DType to;
  const float* scale;  // [C] or null: 1
  const float* shift;  // [C] or null: 0
};
const char* clip(const ClipArgs& args, void* stream);

}  // namespace r3d::cuda::sm80
