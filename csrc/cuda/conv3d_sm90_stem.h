// The Hopper convolution of few channels: how x and the weights are laid out for it, what it takes, how it is
// cut into tiles, and the call. No CUDA and no torch in here.
//
// The GEMM is that of conv3d_sm90.h: channels by pixels. Few channels fill no 128 bytes of a TMA box, but
// where an output's window of a row begins 16 bytes behind its neighbour's, wgmma reads all windows from one
// copy of the row: without swizzle an operand is made of pieces of eight rows of 16 bytes, and the distances
// between pieces are the descriptor's. Pieces that overlap are the windows of neighbouring outputs.
//
// x is copied to such rows first: a unit of 16 bytes is `stride.w` pixels, a pixel has `slots` = 8 / stride.w
// elements. Where the channels leave room in them, a pixel has those of the next `group` rows as well, so
// that a filter of R rows is R / group rows of units. A row begins with the padding on its left, and the
// padding on its right is that of the next row. Rows that are `stride.h` apart are neighbours in memory: the
// windows of several output rows are then at one distance from each other too.
//
// The max-pool that follows the stems of ResNets can be part of the kernel; the convolution's own outputs
// then never leave shared memory. Their maxima do: see StemPool.
#pragma once

#include <cstdint>

#include "../conv3d.h"
#include "conv3d_sm90.h"

namespace r3d::cuda {

constexpr int kStemPixels[] = {240, 176, 128};  // positions of a consumer: wgmma's N
constexpr int kStemKinds = sizeof(kStemPixels) / sizeof(kStemPixels[0]);
constexpr int kStemChannels = 64;    // of a tile: wgmma's M
constexpr int kStemMostBlocks = 64;  // wgmmas of one filter frame
constexpr int kStemMostPhases = 4;   // distances between input rows of one output row, modulo stride.h
constexpr int kStemMostStages = 6;
constexpr int kStemUnit = 16;                        // bytes
constexpr int kStemBlockBytes = kStemChannels * 32;  // weights of one wgmma: 16 elements of the sum

struct StemLayout {
  int slots;       // elements of a pixel
  int group;       // filter rows whose channels are in one pixel
  int row_groups;  // R / group, rounded up
  int units;       // of a window: as many as make whole pairs of wgmmas, each of which sums over two
  int phases;      // rows of x are stored modulo so many
  int64_t rows;    // of one phase of one frame
  int64_t pitch;   // units of a row

  int blocks() const { return row_groups * units / 2; }
  int64_t frame_units() const { return phases * rows * pitch; }
  // Elements of the packed weights [channel tile][T][row group][unit][channel][8].
  int64_t weight_elements(const ConvGeometry& g) const {
    return ceil_div(g.k, kStemChannels) * g.kernel.d * blocks() * kStemBlockBytes / 2;
  }
};

constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// What depends on the weights and the stride alone.
inline StemLayout stem_packing(int64_t c, const Dim3& kernel, const Dim3& stride) {
  StemLayout l{};
  l.slots = int(8 / stride.w);
  l.group = int(l.slots / c);
  if (l.group > kernel.h) l.group = int(kernel.h);
  l.row_groups = int(ceil_div(kernel.h, l.group));
  l.units = int(ceil_div(ceil_div(kernel.w, stride.w), 2) * 2);
  if (l.blocks() % 2) l.units += 2;  // the kernel multiplies two at a time
  l.phases = int(stride.h) / common_divisor(int(stride.h), l.group);
  return l;
}

inline StemLayout stem_layout(const ConvGeometry& g) {
  StemLayout l = stem_packing(g.c, g.kernel, g.stride);
  l.rows = g.out.h + l.group * (l.row_groups - 1) / g.stride.h;
  // Zeros behind the row: as many as the padding, and what the last window reads is zero in the next row too.
  const int64_t last = (g.out.w - 1) * g.stride.w + g.kernel.w - g.padding.w;
  const int64_t pixels = g.in.w + g.padding.w > last ? g.in.w + g.padding.w : last;
  l.pitch = ceil_div(pixels, g.stride.w);
  if (l.pitch < g.out.w) l.pitch = g.out.w;
  return l;
}

// Null, or why the kernel cannot run this convolution.
inline const char* conv3d_sm90_stem_refuses(const ConvGeometry& g, DType dtype) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) return "has bfloat16 and float16 only";
  if (g.stride.w != 1 && g.stride.w != 2 && g.stride.w != 4) return "the stride along the width is 1, 2 or 4";
  if (g.c * g.stride.w > 8) return "the channels of `stride` pixels are eight at most";
  if (g.dilation.d != 1 || g.dilation.h != 1 || g.dilation.w != 1) return "has no dilation";
  if (g.stride.h > kStemMostPhases) return "the stride along the height is at most 4";
  if (g.padding.d >= g.kernel.d) return "the padding of frames is smaller than the kernel";
  if (g.kernel.h > 64 || g.kernel.w > 64) return "the kernel is too large";
  const StemLayout l = stem_layout(g);
  if (l.blocks() > kStemMostBlocks) return "the kernel is too large";
  if (g.out.w > kStemPixels[0] || l.pitch > 256) return "rows have at most 240 outputs";
  if (g.in.h >= 1 << 19 || g.in.d >= 1 << 24 || g.k >= 1 << 24) return "an axis is too long";
  // Indices of rows, tiles and planes are 32-bit.
  if (g.n * g.in.d * l.phases * l.rows >= INT32_MAX / 2) return "more than 2^30 rows";
  if (g.n * g.out.d * g.out.h * ceil_div(g.k, kStemChannels) >= INT32_MAX / 2)
    return "more than 2^30 rows of outputs";
  if (g.out.h * g.out.w >= INT32_MAX / 2) return "more than 2^30 outputs of a frame";
  return nullptr;
}

// A max-pool with windows of 3 x 3 outputs, stride 2 and padding 1, along the frames too (`frames` 3) or not
// (1). `frames` 0: none.
//
// A slice, the rows of one consumer in one plane, has outputs a to b - 1: pooled row j is the maximum over 2j
// - 1 to 2j + 1, so the slice knows something of rows a / 2 to b / 2. That is what it leaves in memory, the
// last row for the slice below it. Whoever leaves the last piece that a group, the pooled rows of one slice
// in one pooled plane, is made of puts it together.
struct StemPool {
  int frames;
  Dim3 out;             // pooled
  int slices;           // of a plane
  int slice_rows;       // pooled rows that a slice leaves, at most
  int64_t slice_units;  // of 16 bytes: [slice_rows, out.w, 64 channels]
  int64_t pieces;       // slices of all planes and tiles of channels
  int64_t groups;       // counters: what has arrived of each group

  int64_t counter_units() const { return ceil_div(groups * 4, kStemUnit); }
  int64_t units() const { return counter_units() + pieces * slice_units; }
};

// The tiles of one width, or stages = 0 where there is no room.
struct StemPlan {
  int kind;        // index into kStemPixels
  int slice_rows;  // output rows of a consumer
  int tiles_a_plane, channel_tiles;
  int64_t tiles;
  int stages, grid;
  int weight_bytes, slice_bytes, stage_bytes, shared_bytes;
  int64_t units;   // of the copy of x, with what tiles read behind its end
  int64_t cycles;  // the estimate that made it win
  StemPool pool;   // behind the copy of x in the workspace

  int64_t workspace_bytes() const { return (units + pool.units()) * kStemUnit; }
};

// What a consumer loads of one phase of a frame: from which row behind the tile's first, how much, and where
// it lies behind the consumer's part of a stage.
struct StemPhase {
  int first_row, bytes, offset;
};

inline StemPhase stem_phase(const ConvGeometry& g, const StemLayout& l, int slice_rows, int phase) {
  int64_t first = -1, last = 0;
  StemPhase p{};
  const int divisor = common_divisor(int(g.stride.h), l.group);
  for (int earlier = 0; earlier <= phase; earlier++) {
    p.offset += p.bytes;
    first = -1, last = 0;
    for (int i = 0; i < l.row_groups; i++) {
      const int64_t row = int64_t(l.group) * i;
      if (row % g.stride.h / divisor != earlier) continue;
      if (first < 0) first = row / g.stride.h;
      last = row / g.stride.h;
    }
    // A window begins in the last row as far as its last output, and reaches over its end.
    p.bytes = first < 0 ? 0 : int((slice_rows + last - first) * l.pitch + l.units) * kStemUnit;
  }
  p.first_row = first < 0 ? 0 : int(first);
  return p;
}

// What the convolution makes, pooled.
inline Dim3 stem_pooled(const Dim3& out, int frames) {
  if (frames == 0) return out;
  return {frames == 3 ? ceil_div(out.d, 2) : out.d, ceil_div(out.h, 2), ceil_div(out.w, 2)};
}

inline StemPool stem_pool(const ConvGeometry& g, int frames, int slice_rows, int slices) {
  StemPool p{};
  if (frames == 0) return p;
  p.frames = frames;
  p.out = stem_pooled(g.out, frames);
  p.slices = slices;
  p.slice_rows = (slice_rows + 1) / 2 + 1;
  p.slice_units = p.slice_rows * p.out.w * (kStemChannels * 2 / kStemUnit);
  const int64_t columns = ceil_div(g.k, kStemChannels) * slices;
  p.pieces = columns * g.n * g.out.d;
  p.groups = columns * g.n * p.out.d;
  return p;
}

inline StemPlan stem_plan_for(const ConvGeometry& g, int kind, int multiprocessors, int pool_frames = 0) {
  const StemLayout l = stem_layout(g);
  const int n = kStemPixels[kind];
  StemPlan p{};
  p.kind = kind;
  if (g.out.w > n) return p;
  p.slice_rows = int((n - g.out.w) / l.pitch + 1);
  if (p.slice_rows > g.out.h) p.slice_rows = int(g.out.h);
  // A pooled row would be in three slices.
  if (pool_frames && p.slice_rows == 1 && g.out.h > 1) return p;
  p.tiles_a_plane = int(ceil_div(g.out.h, int64_t(kSm90Consumers) * p.slice_rows));
  p.channel_tiles = int(ceil_div(g.k, kStemChannels));
  p.tiles = g.n * g.out.d * p.tiles_a_plane * p.channel_tiles;
  p.grid = int(p.tiles < multiprocessors ? p.tiles : multiprocessors);
  p.weight_bytes = l.blocks() * kStemBlockBytes;
  const StemPhase end = stem_phase(g, l, p.slice_rows, l.phases - 1);
  p.slice_bytes = end.offset + end.bytes;
  p.stage_bytes = p.weight_bytes + kSm90Consumers * p.slice_bytes;
  const int staging = kSm90Consumers * n * kStemChannels * 2;
  const int control = kSm90Control + 128 * kSm90Consumers * 16;
  // Behind the last row of a slice wgmma reads on, for positions that are no outputs: in the last slice of
  // the last stage, behind its end. The room is for an operand's bytes one after the other, although windows
  // overlap and end sooner: that is what compute-sanitizer takes them for.
  const int over = 2 * n - int(p.slice_rows * l.pitch) - 2;
  const int tail = over > 0 ? over * kStemUnit : 0;
  p.stages = (kSm90Shared - staging - control - tail) / p.stage_bytes;
  if (p.stages > kStemMostStages) p.stages = kStemMostStages;
  if (p.stages < 2) p.stages = 0;
  p.shared_bytes = p.stages * p.stage_bytes + staging + control + tail;
  // The last tile of a plane may have fewer rows than it reads, of the last plane behind its end.
  p.units = g.n * g.in.d * l.frame_units() + kSm90Consumers * p.slice_rows * l.pitch + l.units;
  p.pool = stem_pool(g, pool_frames, p.slice_rows, kSm90Consumers * p.tiles_a_plane);
  // both consumers' wgmmas take N / 2 clocks each
  const int64_t each = kSm90TileOverhead + g.kernel.d * l.blocks() * n +
                       int64_t(kSm90Consumers) * n * kStemChannels / kSm90OutputsPerClock;
  p.cycles = ceil_div(p.tiles, multiprocessors) * each;
  return p;
}

// stages = 0 where none fits.
inline StemPlan stem_plan(const ConvGeometry& g, int multiprocessors, int kind = -1, int pool_frames = 0) {
  StemPlan best{};
  for (int i = 0; i < kStemKinds; i++) {
    if (kind >= 0 && i != kind) continue;
    const StemPlan p = stem_plan_for(g, i, multiprocessors, pool_frames);
    if (p.stages && (!best.stages || p.cycles < best.cycles)) best = p;
  }
  return best;
}

// ---- the call

// x in any layout, of args.dtype or a decoder's clip, which is x * scale[c] + shift[c].
struct StemSource {
  const void* x;
  int64_t stride_n, stride_c, stride_d, stride_h, stride_w;  // elements
  int from;                                                  // 0 float32, 1 bfloat16, 2 float16, 3 uint8
  const float* scale;                                        // [C] or null: 1
  const float* shift;                                        // [C] or null: 0
};

// y = act(scale[k] * conv + args.bias[k]), pooled where the plan says so; args.x, args.residual are not used;
// args.weight is packed. y's pixels lie at sm90_pitch(K), 16-byte aligned. `workspace`:
// plan.workspace_bytes() on the device, 16-byte aligned, of any contents. Enqueues on `stream` of the current
// device. Returns null, or what went wrong.
const char* conv3d_sm90_stem(const ConvArgs& args, const StemSource& source, const float* scale,
                             const StemPlan& plan, void* workspace, void* stream);

}  // namespace r3d::cuda
