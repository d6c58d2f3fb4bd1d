// The Hopper convolution of few channels: x to rows of units, and persistent blocks that multiply them.
//
// As in conv3d_sm90.cu, warp 0 fills a ring of stages, two warpgroups multiply, and behind each consumer's
// staging buffer a warp stores its tiles. A step is a frame of the filter: its weights, and of the rows that
// each consumer's outputs need one piece a phase, all of them whole runs of memory. Frames of padding are
// left out.
//
// Where a max-pool is part of it, the storing warps take maxima instead, in the time that the products of the
// next tile take: of the tile, from the staging buffer to memory, and of what tiles have left there, for the
// last of them to arrive.
#include "conv3d_sm90_stem.h"

#include "conv3d_sm90_parts.cuh"
#include "tensor_map.h"

#include <type_traits>

namespace r3d::cuda {
namespace stem {

using namespace sm90;

constexpr int kThreads = 256, kLanes = 64;  // of the copy: threads that share a row
constexpr int kRowsABlock = 16;

struct RowsParams {
  const void* x;
  int64_t stride_n, stride_d, stride_h, stride_w;
  const float* scale;
  const float* shift;
  uint4* rows;
  int64_t tail;  // units of zeros behind the last row
  int planes, frames, phases, rows_a_phase, pitch, height, width;
  int pad_h, pad_w, step_h, phase_step;
  int slots, used;         // elements of a pixel, and those that have a value
  int row[8], channel[8];  // of an element: the row counted from the pixel's own
  int64_t offset[8];       // and where it is, from there
};

template <class From>
__device__ __forceinline__ float as_float(const From& v) {
  if constexpr (std::is_same_v<From, BFloat16> || std::is_same_v<From, Float16>)
    return From::load(v.bits);
  else
    return float(v);
}

// A block makes rows of one phase of one frame, a thread units: x * scale + shift where x is, else 0. The
// last blocks make the zeros behind them, which are the counters of the max-pool too.
template <class T, class From, int kSlots>
__global__ void __launch_bounds__(kThreads)
    conv3d_sm90_stem_rows_kernel(const __grid_constant__ RowsParams p) {
  const int plane = int(blockIdx.x);
  uint4* to = p.rows + int64_t(plane) * p.rows_a_phase * p.pitch;
  if (plane == p.planes) {
    for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < p.tail; i += gridDim.y * kThreads)
      to[i] = uint4{0, 0, 0, 0};
    return;
  }
  const int frame = plane / p.phases, n = frame / p.frames;
  const From* x = static_cast<const From*>(p.x) + n * p.stride_n + (frame - n * p.frames) * p.stride_d;
  const int first = int(blockIdx.y) * kRowsABlock, lane = int(threadIdx.x) % kLanes;
  const int end = first + kRowsABlock < p.rows_a_phase ? first + kRowsABlock : p.rows_a_phase;
  for (int j = first + int(threadIdx.x) / kLanes; j < end; j += kThreads / kLanes) {
    const int h = (plane - frame * p.phases) * p.phase_step + j * p.step_h - p.pad_h;
    const From* row = x + h * p.stride_h;
    for (int u = lane; u < p.pitch; u += kLanes) {
      float v[8];
#pragma unroll
      for (int pixel = 0; pixel < 8 / kSlots; pixel++) {
        const int w = u * (8 / kSlots) + pixel - p.pad_w;
        const From* at = row + w * p.stride_w;
        const bool inside = w >= 0 && w < p.width;
#pragma unroll
        for (int i = 0; i < kSlots; i++) {
          float& value = v[pixel * kSlots + i];
          value = 0.f;
          const int its = h + p.row[i];
          if (i < p.used && inside && its >= 0 && its < p.height) {
            value = as_float(at[p.offset[i]]);
            if (p.scale) value *= p.scale[p.channel[i]];
            if (p.shift) value += p.shift[p.channel[i]];
          }
        }
      }
      Pack<T, 8> unit;
      unit.set(v);
      to[j * p.pitch + u] = unit.raw;
    }
  }
}

// What the multiplying kernel knows besides the map of its output. The names that finish() and Affine read
// are those of Sm90Params.
struct Params {
  const char* copy;                                           // units of x
  const char* weight;                                         // packed
  const float* scale;                                         // [K]
  const float* bias;                                          // [K]
  int channels, out_w, out_h, out_d, width, per_width, rows;  // rows: of a slice
  int frames, kernel_d, stride_d, pad_d;
  int tiles, tiles_a_plane, channel_tiles;
  int stages, blocks, phases;
  int weight_bytes, slice_bytes, stage_bytes;
  int64_t frame_bytes, phase_bytes;
  int row_bytes;
  StemPhase phase[kStemMostPhases];
  uint16_t window[kStemMostBlocks];  // where the windows of a block begin in a slice, in units
  bool relu;
  // of the max-pool
  int pool_frames, pool_d, pool_h, pool_w, slices, piece_units, samples, planes;
  int y_pitch;
  uint16_t* y;
  uint4* pieces;
  unsigned* counters;
  static constexpr bool has_residual = false;
};

template <int kKind>
struct Kernel {
  static constexpr int kN = kStemPixels[kKind], kBlocks = 1;
  static constexpr Sm90Tile tile{kSm90Consumers * kN, kStemChannels, 3};  // rows with padding between them
  static constexpr int kRow = kStemChannels * 2;                          // bytes of a staged pixel
  static constexpr int kStagingBytes = kN * kRow;
  static_assert(kStagingBytes % 1024 == 0, "a staging buffer begins where the swizzle pattern does");

  // Shared memory, in this order.
  char* staging;
  uint64_t *full, *empty, *open, *done;
  char* spare;  // 16 bytes a thread
  char* ring;

  __device__ __forceinline__ explicit Kernel(char* shared)
      : staging(shared),
        full(reinterpret_cast<uint64_t*>(staging + kSm90Consumers * kStagingBytes)),
        empty(full + kStemMostStages),
        open(empty + kStemMostStages),
        done(open + kSm90Consumers),
        spare(staging + kSm90Consumers * kStagingBytes + kSm90Control),
        ring(spare + 128 * kSm90Consumers * 16) {}

  __device__ __forceinline__ char* block(int consumer, int) const {
    return staging + consumer * kStagingBytes;
  }
};

// The tiles of this block, the same for every role: all channels of some rows before the next rows.
struct Tiles {
  const Params& p;
  int index, number = 0;
  int channel, row, plane, frame;  // row: of the first consumer's outputs; frame: of the first tap
  int begin, end;                  // taps along the depth that are in x

  __device__ __forceinline__ explicit Tiles(const Params& params) : p(params), index(int(blockIdx.x)) {
    place();
  }
  __device__ __forceinline__ bool more() const { return index < p.tiles; }
  __device__ __forceinline__ void next() {
    index += int(gridDim.x);
    number++;
    place();
  }
  __device__ __forceinline__ void place() {
    const int rows = index / p.channel_tiles;
    channel = (index - rows * p.channel_tiles) * kStemChannels;
    plane = rows / p.tiles_a_plane;
    row = (rows - plane * p.tiles_a_plane) * kSm90Consumers * p.rows;
    const int n = plane / p.out_d, d = (plane - n * p.out_d) * p.stride_d - p.pad_d;
    begin = d < 0 ? -d : 0;
    end = d + p.kernel_d > p.frames ? p.frames - d : p.kernel_d;
    frame = n * p.frames + d;
  }
};

template <class K>
__device__ __forceinline__ void load_tiles(const K& k, const Params& p) {
  Turn<0> at;
  for (Tiles t(p); t.more(); t.next()) {
    const char* weight = p.weight + int64_t(t.channel / kStemChannels) * p.kernel_d * p.weight_bytes;
    for (int d = t.begin; d < t.end; d++) {
      char* stage = k.ring + at.stage * p.stage_bytes;
      uint64_t* full = k.full + at.stage;
      hopper::mbarrier_wait(k.empty + at.stage, at.phase ^ 1);
      hopper::mbarrier_arrive_expect(full, p.stage_bytes);
      hopper::load_run(stage, weight + d * p.weight_bytes, p.weight_bytes, full);
      const char* frame = p.copy + int64_t(t.frame + d) * p.frame_bytes;
      for (int i = 0; i < kSm90Consumers; i++)
        for (int phase = 0; phase < p.phases; phase++) {
          const StemPhase& of = p.phase[phase];
          if (of.bytes == 0) continue;
          const int row = t.row + i * p.rows + of.first_row;
          hopper::load_run(stage + p.weight_bytes + i * p.slice_bytes + of.offset,
                           frame + phase * p.phase_bytes + int64_t(row) * p.row_bytes, of.bytes, full);
        }
      at.next(p.stages);
    }
  }
}

// Stands behind the staging buffer of one consumer.
template <class K>
__device__ __forceinline__ void store_tiles(const K& k, const Params& p, int consumer, const void* y) {
  hopper::prefetch(y);
  for (Tiles t(p); t.more(); t.next()) {
    hopper::mbarrier_arrive(k.open + consumer);
    hopper::mbarrier_wait(k.done + consumer, t.number & 1);
    // what is behind the plane's last row is not stored
    hopper::store_tile(y, k.block(consumer, 0), t.channel, (t.row + consumer * p.rows) * p.out_w, t.plane);
    hopper::commit_stores();
    hopper::wait_for_stores();
  }
}

// Maxima of the rows of a slice that are in the staging buffer, rows `first` to `end` - 1 of the plane.
template <class T, class K>
__device__ __forceinline__ void pool_rows(const K& k, const Params& p, int consumer, int lane, int first,
                                          int end, uint4* piece) {
  const char* staged = k.block(consumer, 0);
  const int items = p.pool_w * (K::kRow / 16);
  for (int item = lane; item < items; item += 32) {
    const int chunk = item % 8, column = item / 8 * 2;
    const auto row = [&](int h) {
      Pack<T, 8> v[3];
#pragma unroll
      for (int i = 0; i < 3; i++) {
        const int w = column + i - 1, pixel = (h - first) * p.out_w + w;
        v[i].raw = lowest(Pack<T, 8>());
        if (w >= 0 && w < p.out_w)
          v[i].raw = *reinterpret_cast<const uint4*>(staged + pixel * K::kRow + ((chunk ^ (pixel & 7)) << 4));
      }
      raise(v[1], v[0]);
      raise(v[1], v[2]);
      return v[1];
    };
    Pack<T, 8> shared;
    shared.raw = lowest(Pack<T, 8>());
    uint4* to = piece + item;
    for (int h = first & ~1; h <= end; h += 2) {
      Pack<T, 8> best = shared;
      if (h >= first && h < end) raise(best, row(h));
      shared.raw = lowest(Pack<T, 8>());
      if (h + 1 < end) shared = row(h + 1);
      raise(best, shared);
      *to = best.raw;
      to += items;
    }
  }
}

// A group: the pooled rows of one slice in one pooled plane, of 64 channels.
struct Group {
  int n, plane, slice;  // plane: of the sample
};

// Of each plane in the group's windows, its own slice and the last row of the slice above.
template <class T>
__device__ __forceinline__ void pool_group(const Params& p, const Group& g, int channel, int lane) {
  const int columns = p.pool_w * (kStemChannels * 2 / 16), a = g.slice * p.rows;
  const int from = a / 2, to = g.slice + 1 == p.slices || a + p.rows >= p.out_h ? p.pool_h : (a + p.rows) / 2;
  const int edge = (from - (a - p.rows) / 2) * columns;  // in the slice above
  const int begin = p.pool_frames == 3 ? max(2 * g.plane - 1, 0) : g.plane;
  const int end = p.pool_frames == 3 ? min(2 * g.plane + 2, p.out_d) : g.plane + 1;
  const int64_t step = int64_t(p.slices) * p.piece_units;  // from plane to plane
  const int tile = channel / kStemChannels;
  const uint4* pieces =
      p.pieces +
      ((int64_t(tile) * p.planes + int64_t(g.n) * p.out_d + begin) * p.slices + g.slice) * p.piece_units;
  uint16_t* y =
      p.y + ((int64_t(g.n) * p.pool_d + g.plane) * p.pool_h + from) * p.pool_w * p.y_pitch + channel;
  const auto make = [&](int item, bool shared) {
    Pack<T, 8> v[6];
#pragma unroll
    for (int i = 0; i < 3; i++) {
      v[i].raw = v[3 + i].raw = lowest(Pack<T, 8>());
      if (begin + i >= end) continue;
      v[i].raw = pieces[i * step + item];
      if (shared) v[3 + i].raw = pieces[i * step - p.piece_units + edge + item];
    }
#pragma unroll
    for (int i = 1; i < 6; i++) raise(v[0], v[i]);
    const int c = item % 8 * 8;
    if (channel + c < p.y_pitch) *reinterpret_cast<uint4*>(y + item / 8 * p.y_pitch + c) = v[0].raw;
  };
  int item = lane;
  if (g.slice > 0)
#pragma unroll 1
    for (; item < columns; item += 32) make(item, true);
#pragma unroll 2
  for (; item < (to - from) * columns; item += 32) make(item, false);
}

// A warp behind the staging buffer of one consumer, where the outputs are pooled.
template <class T, class K>
__device__ __forceinline__ void pool_tiles(const K& k, const Params& p, int consumer, int lane) {
  if (lane == 0) hopper::mbarrier_arrive(k.open + consumer);
  for (Tiles t(p); t.more(); t.next()) {
    hopper::mbarrier_wait(k.done + consumer, t.number & 1);
    const int first = t.row + consumer * p.rows, end = min(first + p.rows, p.out_h);
    const int slice = first / p.rows;
    const int64_t plane = int64_t(t.channel / kStemChannels) * p.planes + t.plane;
    if (first < end)
      pool_rows<T>(k, p, consumer, lane, first, end, p.pieces + (plane * p.slices + slice) * p.piece_units);
    hopper::warp_barrier();
    if (lane == 0) hopper::mbarrier_arrive(k.open + consumer);
    if (first >= end) continue;

    // An odd plane is in two windows, a slice's last row in two groups: a lane asks for each.
    const int n = t.plane / p.out_d, d = t.plane - n * p.out_d;
    Group g{n, d, slice + lane / 2};
    int planes = 1;
    bool asks = lane < 4 && g.slice * p.rows < p.out_h;
    if (p.pool_frames == 3) {
      g.plane = (d + lane % 2) / 2;
      planes = min(2 * g.plane + 2, p.out_d) - max(2 * g.plane - 1, 0);
      asks &= (lane % 2 == 0 || d % 2) && g.plane < p.pool_d;
    } else {
      asks &= lane % 2 == 0;
    }
    bool last = false;
    if (asks) {
      const int64_t place =
          ((int64_t(t.channel / kStemChannels) * p.samples + n) * p.pool_d + g.plane) * p.slices + g.slice;
      const unsigned all = planes * (g.slice > 0 ? 2 : 1);
      last = hopper::take_ticket<32>(p.counters + place) == all - 1;
    }
    hopper::warp_barrier();
    const unsigned complete = __ballot_sync(~0u, last);
    for (int asked = 0; asked < 4; asked++)
      if (complete >> asked & 1)
        pool_group<T>(p, {n, __shfl_sync(~0u, g.plane, asked), slice + asked / 2}, t.channel, lane);
  }
}

template <class T, class K>
__device__ __forceinline__ void multiply_tiles(const K& k, const Params& p, int consumer, int thread) {
  Turn<0> at;
  const bool leads = thread % 32 == 0;  // the lane that speaks for its warp
  for (Tiles t(p); t.more(); t.next()) {
    const Affine<1> affine(p, t.channel, thread);
    float acc[1][K::kN / 2];
    int read = -1;  // the stage of the products under way
    for (int d = t.begin; d < t.end; d++) {
      const char* stage = k.ring + at.stage * p.stage_bytes;
      const uint64_t weights = hopper::plain_descriptor(stage, 1024, 128);
      const uint64_t windows =
          hopper::plain_descriptor(stage + p.weight_bytes + consumer * p.slice_bytes, kStemUnit, 128);
      hopper::mbarrier_wait(k.full + at.stage, at.phase);
      const auto two = [&](int b) {  // even: a row of windows has two blocks, or more of them
        hopper::wgmma_fence();       // the compiler wants one in a loop
#pragma unroll
        for (int i = 0; i < 2; i++)
          hopper::wgmma<T, K::kN>(acc[0], hopper::plus(weights, (b + i) * kStemBlockBytes),
                                  hopper::plus(windows, p.window[b + i] * kStemUnit),
                                  d > t.begin || b + i > 0);
      };
#pragma unroll 1
      for (int b = 0; b < p.blocks - 2; b += 2) two(b);
      // Behind the loop, where each turn is a group to the hardware: the last one alone is still under way
      // when the wait below is over.
      two(p.blocks - 2);
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();  // the products before have read their operands
      if (leads && read >= 0) hopper::mbarrier_arrive(k.empty + read);
      read = at.stage;
      at.next(p.stages);
    }
    hopper::wgmma_wait<0>();
    hopper::settle(acc[0]);
    if (leads) hopper::mbarrier_arrive(k.empty + read);
    hopper::mbarrier_wait(k.open + consumer, t.number & 1);
    finish<T>(k, p, affine, consumer, thread, acc);
    hopper::fence_for_copies();
    hopper::mbarrier_arrive(k.done + consumer);
  }
}

template <class T, int kKind>
__global__ void __launch_bounds__(kSm90Threads, 1)
    conv3d_sm90_stem_kernel(const __grid_constant__ TensorMap y, const __grid_constant__ Params p) {
#if defined(R3D_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using K = Kernel<kKind>;
  R3D_DYNAMIC_SHARED(shared);
  const K k(shared);
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    hopper::require_swizzle_alignment(shared);
    for (int s = 0; s < p.stages; s++) {
      hopper::mbarrier_init(k.full + s, 1);
      hopper::mbarrier_init(k.empty + s, kSm90Consumers * 4);  // one lane of each warp
    }
    for (int c = 0; c < kSm90Consumers; c++) {
      hopper::mbarrier_init(k.open + c, 1);
      hopper::mbarrier_init(k.done + c, 128);
    }
    hopper::fence_mbarrier_init();
  }
  __syncthreads();
  hopper::let_next_begin();
  hopper::wait_for_earlier();
  if (warp < 4) {
    hopper::give_registers<kCopyRegisters>();
    if (warp == 0 && hopper::elect_one()) load_tiles(k, p);
    if (warp == 1 || warp == 2) {
      if (p.pool_frames)
        pool_tiles<T>(k, p, warp - 1, int(threadIdx.x) % 32);
      else if (hopper::elect_one())
        store_tiles(k, p, warp - 1, &y);
    }
  } else {
    hopper::take_registers<kMultiplyRegisters>();
    multiply_tiles<T>(k, p, warp / 4 - 1, int(threadIdx.x) % 128);
  }
#endif
}

// ---- the host's side

RowsParams rows_parameters(const ConvGeometry& g, const StemLayout& l, const StemSource& s,
                           const StemPlan& plan, void* rows) {
  RowsParams p{};
  p.x = s.x;
  p.stride_n = s.stride_n, p.stride_d = s.stride_d, p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.scale = s.scale, p.shift = s.shift;
  p.rows = static_cast<uint4*>(rows);
  p.planes = int(g.n * g.in.d) * l.phases;
  p.tail = plan.units - g.n * g.in.d * l.frame_units() + plan.pool.counter_units();
  p.frames = int(g.in.d), p.phases = l.phases, p.rows_a_phase = int(l.rows), p.pitch = int(l.pitch);
  p.height = int(g.in.h), p.width = int(g.in.w);
  p.pad_h = int(g.padding.h), p.pad_w = int(g.padding.w);
  p.step_h = int(g.stride.h), p.phase_step = common_divisor(int(g.stride.h), l.group);
  p.slots = l.slots, p.used = l.group * int(g.c);
  for (int i = 0; i < p.used; i++) {
    p.row[i] = i / int(g.c), p.channel[i] = i % int(g.c);
    p.offset[i] = p.row[i] * s.stride_h + p.channel[i] * s.stride_c;
  }
  return p;
}

template <class T, class From>
const char* launch_rows(const RowsParams& p, void* stream) {
  const dim3 grid(unsigned(p.planes + 1), unsigned(ceil_div(p.rows_a_phase, kRowsABlock))), block(kThreads);
  if (p.slots == 8)
    R3D_LAUNCH((conv3d_sm90_stem_rows_kernel<T, From, 8>), grid, block, stream, p);
  else if (p.slots == 4)
    R3D_LAUNCH((conv3d_sm90_stem_rows_kernel<T, From, 4>), grid, block, stream, p);
  else
    R3D_LAUNCH((conv3d_sm90_stem_rows_kernel<T, From, 2>), grid, block, stream, p);
  return launch_error();
}

template <class T>
const char* launch_rows(const RowsParams& p, int from, void* stream) {
  switch (from) {
    case 0:
      return launch_rows<T, float>(p, stream);
    case 1:
      return launch_rows<T, BFloat16>(p, stream);
    case 2:
      return launch_rows<T, Float16>(p, stream);
    default:
      return launch_rows<T, uint8_t>(p, stream);
  }
}

Params parameters(const ConvArgs& a, const StemLayout& l, const float* scale, const StemPlan& plan,
                  void* copy) {
  const ConvGeometry& g = a.g;
  Params p{};
  p.copy = static_cast<const char*>(copy);
  p.weight = static_cast<const char*>(a.weight);
  p.scale = scale, p.bias = a.bias;
  p.channels = int(g.k);
  p.out_w = int(g.out.w), p.out_h = int(g.out.h), p.out_d = int(g.out.d);
  p.width = int(l.pitch), p.per_width = (65535 + p.width) / p.width;
  p.rows = plan.slice_rows;
  p.frames = int(g.in.d), p.kernel_d = int(g.kernel.d);
  p.stride_d = int(g.stride.d), p.pad_d = int(g.padding.d);
  p.tiles = int(plan.tiles), p.tiles_a_plane = plan.tiles_a_plane, p.channel_tiles = plan.channel_tiles;
  p.stages = plan.stages, p.blocks = l.blocks(), p.phases = l.phases;
  p.weight_bytes = plan.weight_bytes, p.slice_bytes = plan.slice_bytes, p.stage_bytes = plan.stage_bytes;
  p.frame_bytes = l.frame_units() * kStemUnit, p.phase_bytes = l.rows * l.pitch * kStemUnit;
  p.row_bytes = int(l.pitch) * kStemUnit;
  for (int i = 0; i < l.phases; i++) p.phase[i] = stem_phase(g, l, plan.slice_rows, i);
  const int divisor = common_divisor(int(g.stride.h), l.group);
  for (int b = 0; b < p.blocks; b++) {
    const int pairs = l.units / 2, row = b / pairs * l.group;
    const StemPhase& phase = p.phase[row % g.stride.h / divisor];
    p.window[b] =
        uint16_t(phase.offset / kStemUnit + (row / g.stride.h - phase.first_row) * l.pitch + b % pairs * 2);
  }
  p.relu = a.activation == Activation::kRelu;
  const StemPool& pool = plan.pool;
  p.pool_frames = pool.frames;
  p.pool_d = int(pool.out.d), p.pool_h = int(pool.out.h), p.pool_w = int(pool.out.w);
  p.slices = pool.slices, p.piece_units = int(pool.slice_units);
  p.samples = int(g.n), p.planes = int(g.n * g.out.d);
  p.y_pitch = int(sm90_pitch(g.k)), p.y = static_cast<uint16_t*>(a.y);
  char* behind = static_cast<char*>(copy) + plan.units * kStemUnit;
  p.counters = reinterpret_cast<unsigned*>(behind);
  p.pieces = reinterpret_cast<uint4*>(behind + pool.counter_units() * kStemUnit);
  return p;
}

template <class T, int kKind>
const char* launch(const TensorMap& y, const Params& p, const StemPlan& plan, void* stream) {
  static Devices ready;
  // of any geometry: the attribute is set once
  if (const char* error = prepare(ready, conv3d_sm90_stem_kernel<T, kKind>, kSm90Shared)) return error;
  R3D_LAUNCH_SHARED((conv3d_sm90_stem_kernel<T, kKind>), dim3(unsigned(plan.grid)), dim3(kSm90Threads),
                    plan.shared_bytes, stream, y, p);
  return launch_error();
}

template <class T>
const char* launch(const TensorMap& y, const Params& p, const StemPlan& plan, void* stream) {
  static_assert(kStemKinds == 3, "every width has its kernel");
  return plan.kind == 0   ? launch<T, 0>(y, p, plan, stream)
         : plan.kind == 1 ? launch<T, 1>(y, p, plan, stream)
                          : launch<T, 2>(y, p, plan, stream);
}

}  // namespace stem

const char* conv3d_sm90_stem(const ConvArgs& args, const StemSource& source, const float* scale,
                             const StemPlan& plan, void* workspace, void* stream) {
  using namespace stem;
  const ConvGeometry& g = args.g;
  if (g.pixels() == 0) return nullptr;
  if (const char* error = conv3d_sm90_stem_refuses(g, args.dtype)) return error;
  if (!plan.stages) return "rows of this length leave no room in shared memory";
  const StemLayout l = stem_layout(g);
  const int64_t pixels = g.out.h * g.out.w, pitch = sm90_pitch(g.k);
  const Tiled tiled{3,
                    args.y,
                    {pitch, pixels, g.n * g.out.d},
                    {2, 2 * pitch, 2 * pitch * pixels},
                    {kStemChannels, int(plan.slice_rows * g.out.w), 1}};
  TensorMap y{};
  if (!plan.pool.frames)
    if (const char* error = encode(&y, tiled)) return error;
  const RowsParams rows = rows_parameters(g, l, source, plan, workspace);
  const Params p = parameters(args, l, scale, plan, workspace);
  const bool bf16 = args.dtype == DType::kBFloat16;
  const char* error = bf16 ? launch_rows<BFloat16>(rows, source.from, stream)
                           : launch_rows<Float16>(rows, source.from, stream);
  if (error) return error;
  return bf16 ? launch<BFloat16>(y, p, plan, stream) : launch<Float16>(y, p, plan, stream);
}

}  // namespace r3d::cuda
