// The Hopper convolution: what it takes, how it is cut into tiles, and the call. No CUDA and no torch in
// here: the rules are the same for the op, the emulator, the tests and the tables on paper.
//
// The GEMM is D[channels, pixels] = weights[channels, taps * C] * pixels[pixels, taps * C]^T: the output
// channels are wgmma's M and the pixels its N. With 64 output channels this reads 10 KB of shared memory for
// 64 x 256 outputs and 16 products, the other way round 16 KB; and a thread has two channels, so two scales
// and two biases.
#pragma once

#include <cstdint>

#include "../conv3d.h"

#ifdef __CUDACC__
#define R3D_HOST_DEVICE __host__ __device__
#else
#define R3D_HOST_DEVICE
#endif

namespace r3d::cuda {

// ---- tiles

struct Sm90Tile {
  int pixels, channels;
  // Filter taps along the width that share one load of pixels. 1: the tile is `pixels` outputs in a row.
  // Else: whole rows of the padded input, as many as fit; tap s then reads the same rows s * dilation pixels
  // further on.
  int taps;
};

// In the order of preference where the estimate is the same.
constexpr Sm90Tile kSm90Tiles[] = {{240, 128, 3}, {352, 64, 3}, {480, 64, 3}, {128, 64, 3},  {256, 128, 1},
                                   {128, 256, 1}, {384, 64, 1}, {256, 64, 1}, {128, 128, 1}, {64, 256, 1},
                                   {128, 64, 1},  {64, 128, 1}, {64, 64, 1}};
constexpr int kSm90TileCount = sizeof(kSm90Tiles) / sizeof(kSm90Tiles[0]);

constexpr int kSm90Consumers = 2;                         // warpgroups that multiply
constexpr int kSm90Threads = 128 * (1 + kSm90Consumers);  // and one that copies
constexpr int kSm90Depth = 64;                            // channels in a step: 128 bytes, one swizzled row
constexpr int kSm90Shared = 227 << 10;                    // bytes a block may have on sm_90
constexpr int kSm90Control = 1024;                        // bytes for barriers and flags

struct Sm90Layout {
  int slices;  // parts of the pixels: a consumer has its own, or both have the same and differ in channels
  int slice_pixels;               // wgmma's N
  int slice_channels;             // channels of a consumer: one or two wgmma's M
  int pixel_bytes, weight_bytes;  // of a step; weights of one tap
  int stage_bytes;                // all that a step loads
  int staging_bytes;
  int control_bytes;  // with taps, and 16 bytes a thread for outputs that lie in the padding
  // Stages of the ring: pixels and weights of a step. Where taps share their pixels, a step is too large for
  // more than two, which would leave no time for a load: weights then have a ring of their own, one tap a
  // stage. Pixels have three stages, or two where those of the largest tile leave no room.
  int stages, weight_stages;
  int ring_bytes, shared_bytes;
};

constexpr Sm90Layout sm90_layout(const Sm90Tile& t) {
  Sm90Layout l{};
  l.slices = t.channels == 64 ? 2 : 1;
  l.slice_pixels = t.pixels / l.slices;
  l.slice_channels = t.channels * l.slices / kSm90Consumers;
  l.pixel_bytes = t.pixels * kSm90Depth * 2;
  l.weight_bytes = t.channels * kSm90Depth * 2;
  l.stage_bytes = l.pixel_bytes + t.taps * l.weight_bytes;
  l.staging_bytes = t.pixels * t.channels * 2;
  l.control_bytes = kSm90Control + (t.taps > 1 ? 128 * kSm90Consumers * 16 : 0);
  const int room = kSm90Shared - l.control_bytes - l.staging_bytes;
  l.stages = room / l.stage_bytes < 8 ? room / l.stage_bytes : 8;
  if (t.taps > 1) {
    const int enough = 3 * l.pixel_bytes + (t.taps + 1) * l.weight_bytes <= room ? 3 : 2;
    if (l.stages < enough) l.stages = enough;
    l.weight_stages = (room - l.stages * l.pixel_bytes) / l.weight_bytes;
    if (l.weight_stages > 16) l.weight_stages = 16;
  }
  l.ring_bytes =
      t.taps > 1 ? l.stages * l.pixel_bytes + l.weight_stages * l.weight_bytes : l.stages * l.stage_bytes;
  l.shared_bytes = l.ring_bytes + l.staging_bytes + l.control_bytes;
  return l;
}

// ---- what it takes

// Elements from a pixel to the next, of weights from a filter position to the next: whole 16 bytes, as TMA
// wants. Channels that are no multiple of 8 therefore lie apart. What is between them is never read; in y it
// is written, as TMA stores whole 16 bytes: with zeros where the sums are finite.
struct Sm90Pitch {
  int64_t x, weight, residual, y;
};

constexpr int64_t sm90_pitch(int64_t channels) { return (channels + 7) / 8 * 8; }

// Null, or why the kernel cannot run this convolution.
inline const char* conv3d_sm90_refuses(const ConvGeometry& g, DType dtype) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) return "has bfloat16 and float16 only";
  const int64_t in[] = {g.in.d, g.in.h, g.in.w}, kernel[] = {g.kernel.d, g.kernel.h, g.kernel.w};
  const int64_t stride[] = {g.stride.d, g.stride.h, g.stride.w};
  const int64_t padding[] = {g.padding.d, g.padding.h, g.padding.w};
  const int64_t dilation[] = {g.dilation.d, g.dilation.h, g.dilation.w};
  for (int i = 0; i < 3; i++) {
    const int64_t span = (kernel[i] - 1) * dilation[i];
    if (stride[i] > 8) return "TMA has strides up to 8";
    // The corners of TMA's box, -padding and padding - span, are five-bit numbers; filter offsets end at 31.
    if (padding[i] > 15 || padding[i] - span < -16 || span >= 31)
      return "padding or dilation is beyond TMA's im2col range: padding <= 15, "
             "(kernel - 1) * dilation <= padding + 16 and < 31";
    if (in[i] >= int64_t(1) << 30) return "an axis is too long for TMA's coordinates";
  }
  const int64_t row = 2 * sm90_pitch(g.c) * g.in.w;
  if (row * g.in.h * g.in.d >= int64_t(1) << 40) return "a sample is too large for TMA's strides (1 TiB)";
  if (2 * sm90_pitch(g.c) * g.kernel.volume() >= int64_t(1) << 40 || g.c >= 1 << 30 || g.k >= 1 << 30)
    return "too many channels for TMA's coordinates";
  // Tile indices and coordinates are 32-bit; the widest tile reaches past the end.
  if (g.n * g.out.d * g.out.h * (g.out.w + 30) >= INT32_MAX - 4096) return "more than 2^31 output pixels";
  if (g.pixels() / 64 * (g.k / 64) > INT32_MAX / 32) return "too many tiles";
  if (g.kernel.volume() * ((g.c + 63) / 64) > INT32_MAX) return "the sum is too long";
  return nullptr;
}

// Rows of the padded input in one slice of a tile whose taps share their load; 0 where they cannot.
inline int sm90_rows(const ConvGeometry& g, const Sm90Tile& t) {
  if (t.taps == 1 || g.kernel.w != t.taps || g.stride.w != 1) return 0;
  const int64_t width = g.out.w + (g.kernel.w - 1) * g.dilation.w;  // = the padded input's
  const int n = sm90_layout(t).slice_pixels;
  return width <= n ? int(n / width) : 0;
}

// ---- the choice

struct Sm90Plan {
  int tile;   // index into kSm90Tiles; -1: none
  int split;  // parts of the sum, each computed by a tile of its own
  int rows;   // of sm90_rows
  int pixel_tiles, channel_tiles;
  int steps;        // of 64 channels (times tile.taps) in the whole sum
  int grid;         // blocks
  int64_t cycles;   // the estimate that made it win
  int64_t partial;  // floats of workspace; 0 without split
  int64_t tickets;  // counters: behind them, or the caller's

  int64_t workspace_bytes() const { return 4 * (partial + tickets); }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a tile is expected to take, in clocks of a multiprocessor; integers, so that every language agrees.
// Fitted to benchmarks of an H100 SXM (132 multiprocessors, about 1.7 GHz under load): every tile on every
// layer of R3D-18 at batch 8 and 32 that takes longer than its launch.
// (benchmarks/results/h100/gpu_report_2.json)
constexpr int64_t kSm90FlopsPerClock = 4096;  // dense bf16, of one multiprocessor
constexpr int64_t kSm90SharedPerClock = 128;  // bytes
constexpr int64_t kSm90L2PerClock = 36;       // bytes, of one multiprocessor while all read
constexpr int64_t kSm90L2Most = 48;           // where the others are idle
constexpr int64_t kSm90PixelBytes = 128;      // of a row of 64 channels, that L2 is asked for
constexpr int64_t kSm90WeightBytes = 72;  // the others read the same weights: L2 sends some once for several
constexpr int64_t kSm90RowOutside = 10;   // TMA's zeros for a row of weights that is not there
constexpr int64_t kSm90RowPartly = 4;     // and for the end of one with fewer than 64 channels
constexpr int64_t kSm90Latency = 1400;    // of a load, before its first byte
constexpr int64_t kSm90TileOverhead = 1000;   // filling the pipeline, barriers
constexpr int64_t kSm90OutputsPerClock = 10;  // of the epilogue
// Of a part of a split sum: fences, its ticket, the last part's wait; and, in those benchmarks, counters that
// were cleared in front of each kernel.
constexpr int64_t kSm90Join = 10000;
constexpr int64_t kSm90JoinPerClock = 64;  // bytes of parts, written and read again
constexpr int64_t kSm90SmallestPart = 4;   // steps in a part of a split sum
constexpr int kSm90Splits[] = {1, 2, 3, 4, 6, 8, 12, 16};

// What an average step of 64 channels and `taps` taps loads.
struct Sm90Load {
  int64_t pixels, weights;  // rows of 64 channels that are there
  int64_t zeros;            // clocks that TMA spends on what is not there

  int64_t bytes() const { return kSm90PixelBytes * pixels + kSm90WeightBytes * weights; }
};

inline Sm90Load sm90_load(const ConvGeometry& g, const Sm90Tile& t, int rows, int channel_tiles) {
  Sm90Load l{};
  l.pixels = t.pixels;
  if (t.taps > 1) l.pixels = sm90_layout(t).slices * rows * (g.out.w + (g.kernel.w - 1) * g.dilation.w);
  l.weights = ceil_div(g.k * t.taps, channel_tiles);
  l.zeros = kSm90RowOutside * (t.channels * t.taps - l.weights);
  if (g.c % kSm90Depth)  // in the last step of every tap
    l.zeros += kSm90RowPartly * (l.pixels + l.weights) / ceil_div(g.c, kSm90Depth);
  return l;
}

// One step, everything overlapping: the slowest of multiplying, shared memory, the load, and the way of a
// stage while the others are read. `busy` of the multiprocessors work.
inline int64_t sm90_step_cycles(const Sm90Tile& t, const Sm90Load& load, int64_t busy,
                                int64_t multiprocessors) {
  const Sm90Layout l = sm90_layout(t);
  const int64_t flops = int64_t(2) * t.pixels * t.channels * kSm90Depth * t.taps;
  // each wgmma reads its 64 x 16 weights and its N x 16 pixels; half of what is written gets in its way
  const int64_t wgmmas = int64_t(kSm90Consumers) * (l.slice_channels / 64) * t.taps * (kSm90Depth / 16);
  const int64_t shared = wgmmas * 32 * (64 + l.slice_pixels) + l.stage_bytes / 2;
  const int64_t alone = ceil_div(load.bytes(), kSm90L2Most);
  const int64_t among = ceil_div(load.bytes() * busy, kSm90L2PerClock * multiprocessors);
  const int64_t loading = load.zeros + (alone > among ? alone : among);
  const int64_t ahead = t.taps > 1 ? l.pixel_bytes : l.stage_bytes;
  int64_t most = ceil_div(flops, kSm90FlopsPerClock);
  const int64_t others[] = {ceil_div(shared, kSm90SharedPerClock), loading,
                            ceil_div(kSm90Latency + loading * ahead / l.stage_bytes, l.stages - 1)};
  for (int64_t c : others) most = c > most ? c : most;
  return most;
}

inline Sm90Plan sm90_plan_for(const ConvGeometry& g, int tile, int split, int multiprocessors) {
  const Sm90Tile& t = kSm90Tiles[tile];
  Sm90Plan p{};
  p.tile = -1;
  p.rows = sm90_rows(g, t);
  if (t.taps > 1 && p.rows == 0) return p;
  p.steps = int(g.kernel.volume() / t.taps * ceil_div(g.c, kSm90Depth));
  if (split > 1 && p.steps < split * kSm90SmallestPart) return p;
  p.tile = tile;
  p.split = split;
  const int64_t slices = sm90_layout(t).slices;
  p.pixel_tiles =
      int(t.taps > 1 ? ceil_div(g.n * g.out.d * g.out.h, slices * p.rows) : ceil_div(g.pixels(), t.pixels));
  p.channel_tiles = int(ceil_div(g.k, t.channels));
  const int64_t tiles = int64_t(p.pixel_tiles) * p.channel_tiles, outputs = int64_t(t.pixels) * t.channels;
  p.grid = int(tiles * split < multiprocessors ? tiles * split : multiprocessors);
  if (split > 1) {
    p.partial = tiles * split * outputs;
    p.tickets = tiles * kSm90Consumers;
  }
  int64_t ends = kSm90TileOverhead + outputs / kSm90OutputsPerClock;
  // a part is written, and the last one to finish reads all of them
  if (split > 1) ends += kSm90Join + ceil_div((1 + split) * outputs * 4, kSm90JoinPerClock);
  const Sm90Load load = sm90_load(g, t, p.rows, p.channel_tiles);
  const auto wave = [&](int64_t busy) {
    return ends + ceil_div(p.steps, split) * sm90_step_cycles(t, load, busy, multiprocessors);
  };
  // the last wave has what the others leave
  const int64_t full = tiles * split / multiprocessors, rest = tiles * split % multiprocessors;
  p.cycles = (full ? full * wave(multiprocessors) : 0) + (rest ? wave(rest) : 0);
  return p;
}

// `tiles`: bits of those that may be taken; `split` 0: any. The tile is -1 where none fits.
inline Sm90Plan sm90_plan(const ConvGeometry& g, int multiprocessors, unsigned tiles = ~0u, int split = 0) {
  Sm90Plan best{};
  best.tile = -1;
  for (int tile = 0; tile < kSm90TileCount; tile++)
    for (int s : kSm90Splits) {
      if (!(tiles >> tile & 1) || (split && s != split)) continue;
      const Sm90Plan p = sm90_plan_for(g, tile, s, multiprocessors);
      if (p.tile >= 0 && (best.tile < 0 || p.cycles < best.cycles)) best = p;
    }
  return best;
}

// ---- the order of the tiles

struct Sm90Place {
  int pixel, channel, part;
};

// Blocks that run at the same time have neighbouring indices: they share pixels (all channel tiles of a band
// come before the next pixels) and the weights of at most kSm90Band channel tiles, which stay in L2.
constexpr int kSm90Band = 8;

R3D_HOST_DEVICE inline Sm90Place sm90_place(int index, int pixel_tiles, int channel_tiles, int split) {
  const int tile = index / split, part = index - tile * split;
  const int per_band = pixel_tiles * kSm90Band;
  const int band = tile / per_band, inside = tile - band * per_band;
  const int first = band * kSm90Band;
  const int width = channel_tiles - first < kSm90Band ? channel_tiles - first : kSm90Band;
  const int pixel = inside / width;
  return {pixel, first + inside - pixel * width, part};
}

// ---- the call

// args.weight is [K, T, R, S, C] as it is in the module, of the dtype of x: a weight in torch's
// channels_last_3d. All tensors but the vectors lie at the pitches given. Batch norm is not folded into it: y
// = act(scale[k] * conv + args.bias[k] + residual), so that no folded weight is rounded. `workspace`:
// plan.workspace_bytes() bytes on the device, 16-byte aligned, of any contents. `tickets`: plan.tickets
// counters on the device that are zero when the kernel begins and when it has ended, and nobody else's
// meanwhile; null has those in the workspace cleared in front of the kernel, which takes longer than a small
// layer's products. Enqueues the kernel on `stream` (a cudaStream_t) of the current device. Returns null, or
// what went wrong.
const char* conv3d_sm90(const ConvArgs& args, const Sm90Pitch& pitch, const float* scale,
                        const Sm90Plan& plan, void* workspace, unsigned* tickets, void* stream);

// Zeroes counters on the stream.
const char* sm90_clear(unsigned* tickets, int64_t count, void* stream);
// Whether what is enqueued on the stream goes into a CUDA graph, or nobody can tell.
bool sm90_captures(void* stream);

// sm90_plan for the current device; remembered for the geometries that the calling thread met last.
Sm90Plan conv3d_sm90_plan(const ConvGeometry& g, unsigned tiles = ~0u, int split = 0);

}  // namespace r3d::cuda
