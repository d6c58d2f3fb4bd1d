// Fused 3-D convolution for Hopper: persistent blocks of one warpgroup that copies and two that multiply.
//
// Warp 0 loads tiles of pixels (im2col TMA: padding, strides and tails cost nothing) and of weights into a
// ring of stages. The consumers multiply them by wgmma; each has its own accumulators, and its own staging
// buffer behind which warp 1 or 2 stands: it has the residual loaded into the buffer while the sum is still
// under way, and stores the finished tile while the consumer is at the next one.
//
//   ring      full[s]: the bytes of a stage have landed.  empty[s]: the consumers' warps have read it.
//             weights_full, weights_empty: the same for weights, where they have a ring of their own.
//   staging   open[c]: free, and the residual is there.    done[c]: consumer c has written its outputs,
//   fenced.
#include "conv3d_sm90.h"

#include "conv3d_sm90_parts.cuh"
#include "tensor_map.h"

#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

namespace r3d::cuda {

// What the kernel knows besides its tensor maps.
struct Sm90Params {
  int channels;  // K
  int out_d, out_h, out_w;
  int width;      // positions in a row: out_w, or the padded input's where taps share their load
  int per_width;  // 2^16 / width rounded up: position i of a slice is in row i * per_width >> 16
  int rows;       // whole rows in a slice, or 0
  int stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w;
  int kernel_h, kernel_w;  // kernel_w: loads along the width, 1 where taps share theirs
  int depth_steps;         // of 64 channels
  int steps, split, pixel_tiles, channel_tiles;
  int load_pixels;  // positions that a slice loads
  bool relu, has_residual;
  const float* scale;  // [K]
  const float* bias;   // [K]
  float* partial;      // [tile][consumer][part][register][thread]
  unsigned* tickets;   // [tile][consumer]
};

namespace sm90 {

constexpr int kConsumerBarrier = 1;  // named barriers of the consumers: this and the next

template <int kTile>
struct Sm90Kernel {
  static constexpr Sm90Tile tile = kSm90Tiles[kTile];
  static constexpr Sm90Layout layout = sm90_layout(tile);
  static constexpr int kN = layout.slice_pixels;
  static constexpr int kBlocks = layout.slice_channels / 64;  // wgmma's M is 64
  static constexpr int kStages = layout.stages, kWeightStages = layout.weight_stages;
  static constexpr bool kApart = kWeightStages > 0;  // weights have a ring of their own
  static constexpr int kStagingBytes = layout.staging_bytes / kSm90Consumers;
  static constexpr int kRow = kSm90Depth * 2;  // bytes
  static_assert(kStages >= 2, "the ring needs a stage to load while another is read");
  static_assert(!kApart || kWeightStages > tile.taps,
                "the next step's weights are loaded while this one's are read");
  static_assert(kN % 16 == 0, "the epilogue handles sixteen pixels at a time");
  static_assert((kN * kRow) % 1024 == 0, "every operand begins where the swizzle pattern does");
  static_assert((2 * (kStages + kWeightStages) + 2 * kSm90Consumers) * 8 + 4 * kSm90Consumers <= kSm90Control,
                "barriers and flags fit in");

  // Shared memory, in this order.
  char* ring;
  char* staging;
  uint64_t *full, *empty, *weights_full, *weights_empty, *open, *done;
  int* last;    // [consumer]: this part of a split sum was the last to finish
  char* spare;  // 16 bytes a thread

  __device__ __forceinline__ explicit Sm90Kernel(char* shared)
      : ring(shared),
        staging(shared + layout.ring_bytes),
        full(reinterpret_cast<uint64_t*>(staging + layout.staging_bytes)),
        empty(full + kStages),
        weights_full(empty + kStages),
        weights_empty(weights_full + kWeightStages),
        open(weights_empty + kWeightStages),
        done(open + kSm90Consumers),
        last(reinterpret_cast<int*>(done + kSm90Consumers)),
        spare(staging + layout.staging_bytes + kSm90Control) {}

  __device__ __forceinline__ char* pixels(int stage, int slice) const {
    return ring + stage * (kApart ? layout.pixel_bytes : layout.stage_bytes) + slice * kN * kRow;
  }
  // `stage` of the weights' own ring, or of the one.
  __device__ __forceinline__ char* weights(int stage, int channel) const {
    return ring +
           (kApart ? kStages * layout.pixel_bytes + stage * layout.weight_bytes
                   : stage * layout.stage_bytes + layout.pixel_bytes) +
           channel * kRow;
  }
  // One block of 64 channels: [pixel][64], swizzled.
  __device__ __forceinline__ char* block(int consumer, int m) const {
    return staging + consumer * kStagingBytes + m * kN * kRow;
  }
};

// The tiles of this block, the same for every role.
struct Tiles {
  const Sm90Params& p;
  int index, count;
  int number = 0;  // of tiles done
  Sm90Place at;
  int begin, end;  // steps

  __device__ __forceinline__ explicit Tiles(const Sm90Params& params)
      : p(params), index(int(blockIdx.x)), count(params.pixel_tiles * params.channel_tiles * params.split) {
    place();
  }
  __device__ __forceinline__ bool more() const { return index < count; }
  __device__ __forceinline__ void next() {
    index += int(gridDim.x);
    number++;
    place();
  }
  __device__ __forceinline__ void place() {
    if (!more()) return;
    at = sm90_place(index, p.pixel_tiles, p.channel_tiles, p.split);
    // the first parts are one longer where the steps do not divide
    const int each = p.steps / p.split, longer = p.steps - each * p.split;
    begin = at.part * each + (at.part < longer ? at.part : longer);
    end = begin + each + (at.part < longer);
  }
};

// The first output pixel of a slice.
template <class K>
__device__ __forceinline__ int first_pixel(const Sm90Params& p, int pixel_tile, int slice) {
  const int i = pixel_tile * K::layout.slices + slice;
  return K::tile.taps > 1 ? i * p.rows * p.out_w : i * K::kN;
}

// Where the pixels of a slice begin in the input, under the filter's first tap.
struct Corner {
  int w, h, d, n;
};

template <class K>
__device__ __forceinline__ Corner corner(const Sm90Params& p, int pixel_tile, int slice) {
  const int i = pixel_tile * K::layout.slices + slice;
  int row = i * p.rows, w = 0;
  if (K::tile.taps == 1) {
    row = i * K::kN / p.out_w;
    w = i * K::kN - row * p.out_w;
  }
  const int plane = row / p.out_h, n = plane / p.out_d;
  return {w * p.stride_w - p.pad_w, (row - plane * p.out_h) * p.stride_h - p.pad_h,
          (plane - n * p.out_d) * p.stride_d - p.pad_d, n};
}

template <class K>
__device__ __forceinline__ void load_tiles(const K& k, const Sm90Params& p, const void* x, const void* w) {
  hopper::prefetch(x);
  hopper::prefetch(w);
  Turn<K::kStages> at;
  Turn<K::kWeightStages> weights_at;
  const int bytes = p.load_pixels * K::layout.slices * K::kRow + (K::kApart ? 0 : K::layout.weight_bytes);
  for (Tiles t(p); t.more(); t.next()) {
    Corner corners[2];
#pragma unroll
    for (int i = 0; i < K::layout.slices; i++) corners[i] = corner<K>(p, t.at.pixel, i);
    // counted on, not divided: the smallest tiles multiply a step in 128 clocks
    int c = t.begin % p.depth_steps, tap = t.begin / p.depth_steps;
    int s = tap % p.kernel_w, r = tap / p.kernel_w % p.kernel_h, d = tap / (p.kernel_w * p.kernel_h);
    for (int step = t.begin; step < t.end; step++) {
      hopper::mbarrier_wait(k.empty + at.stage, at.phase ^ 1);
      hopper::mbarrier_arrive_expect(k.full + at.stage, bytes);
#pragma unroll
      for (int i = 0; i < K::layout.slices; i++)
        hopper::load_im2col(k.pixels(at.stage, i), x, k.full + at.stage, c * kSm90Depth, corners[i].w,
                            corners[i].h, corners[i].d, corners[i].n, s * p.dil_w, r * p.dil_h, d * p.dil_d);
#pragma unroll
      for (int i = 0; i < K::tile.taps; i++) {
        uint64_t* full = k.full + at.stage;
        int stage = at.stage;
        if constexpr (K::kApart) {
          stage = weights_at.stage, full = k.weights_full + stage;
          hopper::mbarrier_wait(k.weights_empty + stage, weights_at.phase ^ 1);
          hopper::mbarrier_arrive_expect(full, K::layout.weight_bytes);
          weights_at.next();
        }
        hopper::load_tile(k.weights(stage, 0), w, full, c * kSm90Depth, tap * K::tile.taps + i,
                          t.at.channel * K::tile.channels);
      }
      if (++c == p.depth_steps) {
        c = 0, tap++;
        if (++s == p.kernel_w) {
          s = 0;
          if (++r == p.kernel_h) r = 0, d++;
        }
      }
      at.next();
    }
  }
}

// Stands behind the staging buffer of one consumer.
template <class K>
__device__ __forceinline__ void store_tiles(const K& k, const Sm90Params& p, int consumer,
                                            const void* residual, const void* y) {
  hopper::prefetch(y);
  if (p.has_residual) hopper::prefetch(residual);
  for (Tiles t(p); t.more(); t.next()) {
    const int channel =
        t.at.channel * K::tile.channels + (K::layout.slices == 1 ? consumer * 64 * K::kBlocks : 0);
    const int pixel = first_pixel<K>(p, t.at.pixel, K::layout.slices == 1 ? 0 : consumer);
    const int stored = K::tile.taps > 1 ? p.rows * p.out_w : K::kN;
    if (p.has_residual) {
      hopper::mbarrier_arrive_expect(k.open + consumer, K::kBlocks * stored * K::kRow);
#pragma unroll
      for (int m = 0; m < K::kBlocks; m++)
        hopper::load_tile(k.block(consumer, m), residual, k.open + consumer, channel + m * 64, pixel);
    } else {
      hopper::mbarrier_arrive(k.open + consumer);
    }
    hopper::mbarrier_wait(k.done + consumer, t.number & 1);
    if (p.split > 1 && !k.last[consumer]) continue;
#pragma unroll
    for (int m = 0; m < K::kBlocks; m++) hopper::store_tile(y, k.block(consumer, m), channel + m * 64, pixel);
    hopper::commit_stores();
    hopper::wait_for_stores();
  }
}

// acc += kParts parts, one after the other; all of them are asked for first.
template <int kParts, int kBlocks, int kEach>
__device__ __forceinline__ void add_parts(const float* from, float (&acc)[kBlocks][kEach]) {
  float v[kParts][kBlocks][kEach];
#pragma unroll
  for (int j = 0; j < kParts * kBlocks * kEach; j++) (&v[0][0][0])[j] = from[j * 128];
#pragma unroll
  for (int part = 0; part < kParts; part++)
#pragma unroll
    for (int m = 0; m < kBlocks; m++)
#pragma unroll
      for (int i = 0; i < kEach; i++) acc[m][i] += v[part][m][i];
}

// Adds up the parts of a split sum in their order, whichever block comes last; false for the others.
template <class K>
__device__ __forceinline__ bool join(const K& k, const Sm90Params& p, const Tiles& t, int consumer,
                                     int thread, float (&acc)[K::kBlocks][K::kN / 2]) {
  constexpr int kEach = K::kN / 2, kPart = K::kBlocks * kEach * 128;
  const int64_t place = (int64_t(t.at.pixel) * p.channel_tiles + t.at.channel) * kSm90Consumers + consumer;
  float* all = p.partial + place * p.split * kPart + thread;
#pragma unroll
  for (int m = 0; m < K::kBlocks; m++)
#pragma unroll
    for (int i = 0; i < kEach; i++) all[t.at.part * kPart + (m * kEach + i) * 128] = acc[m][i];
  hopper::named_barrier(kConsumerBarrier + consumer, 128);
  if (thread == 0) {
    const bool last = hopper::take_ticket<128>(p.tickets + place) == unsigned(p.split - 1);
    if (last) p.tickets[place] = 0;  // for the next launch
    k.last[consumer] = last;
  }
  hopper::named_barrier(kConsumerBarrier + consumer, 128);
  if (!k.last[consumer]) return false;
#pragma unroll
  for (int m = 0; m < K::kBlocks; m++)
#pragma unroll
    for (int i = 0; i < kEach; i++) acc[m][i] = 0;
  // Small tiles have registers for several parts on their way at once: a part is a trip to L2.
  constexpr int kAtOnce = K::kBlocks * kEach <= 32 ? 4 : 1;
  int part = 0;
  for (; part + kAtOnce <= p.split; part += kAtOnce) add_parts<kAtOnce>(all + part * kPart, acc);
  for (; part < p.split; part++) add_parts<1>(all + part * kPart, acc);
  return true;
}

template <class T, class K>
__device__ __forceinline__ void multiply_tiles(const K& k, const Sm90Params& p, int consumer, int thread) {
  const int slice = K::layout.slices == 1 ? 0 : consumer;
  const int channels =
      K::layout.slices == 1 ? consumer * 64 * K::kBlocks : 0;  // first of this consumer's in the tile
  Turn<K::kStages> at;
  Turn<K::kWeightStages> weights_at;
  const bool leads = thread % 32 == 0;  // the lane that speaks for its warp
  for (Tiles t(p); t.more(); t.next()) {
    const Affine<K::kBlocks> affine(p, t.at.channel * K::tile.channels + channels, thread);
    float acc[K::kBlocks][K::kN / 2];
    int read = -1, weights_read = -1;  // stages of the products under way
    for (int step = t.begin; step < t.end; step++) {
      hopper::mbarrier_wait(k.full + at.stage, at.phase);
#pragma unroll
      for (int tap = 0; tap < K::tile.taps; tap++) {
        if constexpr (K::kApart) hopper::mbarrier_wait(k.weights_full + weights_at.stage, weights_at.phase);
        const int weights_stage = K::kApart ? weights_at.stage : at.stage;
        hopper::wgmma_fence();
#pragma unroll
        for (int depth = 0; depth < kSm90Depth / 16; depth++)
#pragma unroll
          for (int m = 0; m < K::kBlocks; m++)
            hopper::wgmma<T, K::kN>(
                acc[m], hopper::descriptor(k.weights(weights_stage, channels + m * 64) + depth * 32),
                hopper::descriptor(k.pixels(at.stage, slice) +
                                   (K::tile.taps > 1 ? tap * p.dil_w * K::kRow : 0) + depth * 32),
                step > t.begin || tap > 0 || depth > 0);
        hopper::wgmma_commit();
        hopper::wgmma_wait<1>();  // the products before have read their operands
        if (leads && tap == 0 && read >= 0) hopper::mbarrier_arrive(k.empty + read);
        if constexpr (K::kApart) {
          if (leads && weights_read >= 0) hopper::mbarrier_arrive(k.weights_empty + weights_read);
          weights_read = weights_stage;
          weights_at.next();
        }
      }
      read = at.stage;
      at.next();
    }
    hopper::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < K::kBlocks; m++) hopper::settle(acc[m]);
    if (leads) {
      hopper::mbarrier_arrive(k.empty + read);
      if constexpr (K::kApart) hopper::mbarrier_arrive(k.weights_empty + weights_read);
    }

    hopper::mbarrier_wait(k.open + consumer, t.number & 1);
    if (p.split == 1 || join(k, p, t, consumer, thread, acc)) finish<T>(k, p, affine, consumer, thread, acc);
    hopper::fence_for_copies();
    hopper::mbarrier_arrive(k.done + consumer);
  }
}

template <class T, int kTile>
__global__ void __launch_bounds__(kSm90Threads, 1)
    conv3d_sm90_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                       const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap y,
                       const __grid_constant__ Sm90Params p) {
#if defined(R3D_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using K = Sm90Kernel<kTile>;
  R3D_DYNAMIC_SHARED(shared);
  const K k(shared);
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    hopper::require_swizzle_alignment(shared);
    for (int s = 0; s < K::kStages; s++) {
      hopper::mbarrier_init(k.full + s, 1);
      hopper::mbarrier_init(k.empty + s, kSm90Consumers * 4);  // one lane of each warp
    }
    for (int s = 0; s < K::kWeightStages; s++) {
      hopper::mbarrier_init(k.weights_full + s, 1);
      hopper::mbarrier_init(k.weights_empty + s, kSm90Consumers * 4);
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
    if (warp == 0 && hopper::elect_one()) load_tiles(k, p, &x, &weight);
    if ((warp == 1 || warp == 2) && hopper::elect_one()) store_tiles(k, p, warp - 1, &residual, &y);
  } else {
    hopper::take_registers<kMultiplyRegisters>();
    multiply_tiles<T>(k, p, warp / 4 - 1, int(threadIdx.x) % 128);
  }
#endif
}

// ---- the host's side

struct Maps {
  TensorMap x, weight, residual, y;
};

const char* encode(Maps* maps, const ConvArgs& a, const Sm90Pitch& pitch, const Sm90Plan& plan) {
  const ConvGeometry& g = a.g;
  if (pitch.x < g.c || pitch.weight < g.c || pitch.y < g.k || (a.residual && pitch.residual < g.k))
    return "a pitch is shorter than its channels";
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const Sm90Layout layout = sm90_layout(tile);
  const bool rows = tile.taps > 1;

  Im2col x{};
  x.base = a.x;
  const int64_t size[5] = {g.c, g.in.w, g.in.h, g.in.d, g.n};
  int64_t stride = 2;
  for (int i = 0; i < 5; i++) {
    x.size[i] = size[i];
    x.stride[i] = stride;
    stride *= i == 0 ? pitch.x : size[i];
  }
  const int64_t pad[3] = {g.padding.w, g.padding.h, g.padding.d};
  const int64_t span[3] = {(g.kernel.w - 1) * g.dilation.w, (g.kernel.h - 1) * g.dilation.h,
                           (g.kernel.d - 1) * g.dilation.d};
  const int64_t step[3] = {g.stride.w, g.stride.h, g.stride.d};
  for (int i = 0; i < 3; i++) {
    x.lower[i] = int(-pad[i]);
    x.upper[i] = int(pad[i] - (rows && i == 0 ? 0 : span[i]));  // rows: every position of the padded width
    x.step[i] = int(step[i]);
  }
  x.channels = kSm90Depth;
  x.pixels = rows ? int(plan.rows * (g.out.w + span[0])) : layout.slice_pixels;

  const int64_t taps = g.kernel.volume();
  const Tiled weight{3,
                     a.weight,
                     {g.c, taps, g.k},
                     {2, 2 * pitch.weight, 2 * pitch.weight * taps},
                     {kSm90Depth, 1, tile.channels}};
  const int stored = rows ? int(plan.rows * g.out.w) : layout.slice_pixels;
  // Past the channels to whole 16 bytes, which TMA stores in any case; the staging buffer has zeros there.
  Tiled y{2, a.y, {sm90_pitch(g.k), g.pixels()}, {2, 2 * pitch.y}, {64, stored}};
  if (const char* error = encode(&maps->x, x)) return error;
  if (const char* error = encode(&maps->weight, weight)) return error;
  if (const char* error = encode(&maps->y, y)) return error;
  if (!a.residual) {
    maps->residual = maps->y;  // stands in
    return nullptr;
  }
  y.base = a.residual;
  y.size[0] = g.k;
  y.stride[1] = 2 * pitch.residual;
  return encode(&maps->residual, y);
}

Sm90Params parameters(const ConvArgs& a, const float* scale, const Sm90Plan& plan, void* workspace) {
  const ConvGeometry& g = a.g;
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const bool rows = tile.taps > 1;
  Sm90Params p{};
  p.channels = int(g.k);
  p.out_d = int(g.out.d), p.out_h = int(g.out.h), p.out_w = int(g.out.w);
  p.width = int(g.out.w + (rows ? (g.kernel.w - 1) * g.dilation.w : 0));
  p.per_width = (65535 + p.width) / p.width;
  p.rows = plan.rows;
  p.stride_d = int(g.stride.d), p.stride_h = int(g.stride.h), p.stride_w = int(g.stride.w);
  p.pad_d = int(g.padding.d), p.pad_h = int(g.padding.h), p.pad_w = int(g.padding.w);
  p.dil_d = int(g.dilation.d), p.dil_h = int(g.dilation.h), p.dil_w = int(g.dilation.w);
  p.kernel_h = int(g.kernel.h), p.kernel_w = rows ? 1 : int(g.kernel.w);
  p.depth_steps = int(ceil_div(g.c, kSm90Depth));
  p.steps = plan.steps, p.split = plan.split;
  p.pixel_tiles = plan.pixel_tiles, p.channel_tiles = plan.channel_tiles;
  p.load_pixels = rows ? plan.rows * p.width : sm90_layout(tile).slice_pixels;
  p.relu = a.activation == Activation::kRelu;
  p.has_residual = a.residual != nullptr;
  p.scale = scale;
  p.bias = a.bias;
  p.partial = static_cast<float*>(workspace);
  p.tickets = reinterpret_cast<unsigned*>(p.partial + plan.partial);
  return p;
}

template <class T, int kTile>
const char* launch(const Maps& m, const Sm90Params& p, int grid, void* stream) {
  constexpr int bytes = sm90_layout(kSm90Tiles[kTile]).shared_bytes;
  static Devices ready;
  if (const char* error = prepare(ready, conv3d_sm90_kernel<T, kTile>, bytes)) return error;
  R3D_LAUNCH_SHARED((conv3d_sm90_kernel<T, kTile>), dim3(unsigned(grid)), dim3(kSm90Threads), bytes, stream,
                    m.x, m.weight, m.residual, m.y, p);
  return launch_error();
}

template <class T, int... kTile>
const char* launch(int tile, const Maps& m, const Sm90Params& p, int grid, void* stream,
                   std::integer_sequence<int, kTile...>) {
  using Launch = const char* (*)(const Maps&, const Sm90Params&, int, void*);
  constexpr Launch all[] = {launch<T, kTile>...};
  return all[tile](m, p, grid, stream);
}

// The sentence with the geometry behind it; holds until the thread's next error.
const char* describe(const char* error, const ConvGeometry& g, const Sm90Plan& plan) {
  static thread_local char text[1024];
  std::snprintf(text, sizeof text,
                "%s (x [%lld, %lld, %lld, %lld, %lld], %lld channels, kernel %lldx%lldx%lld, stride "
                "%lldx%lldx%lld, padding "
                "%lldx%lldx%lld, dilation %lldx%lldx%lld, tile %d, split %d)",
                error, (long long)g.n, (long long)g.c, (long long)g.in.d, (long long)g.in.h,
                (long long)g.in.w, (long long)g.k, (long long)g.kernel.d, (long long)g.kernel.h,
                (long long)g.kernel.w, (long long)g.stride.d, (long long)g.stride.h, (long long)g.stride.w,
                (long long)g.padding.d, (long long)g.padding.h, (long long)g.padding.w,
                (long long)g.dilation.d, (long long)g.dilation.h, (long long)g.dilation.w, plan.tile,
                plan.split);
  return text;
}

}  // namespace sm90

const char* conv3d_sm90(const ConvArgs& args, const Sm90Pitch& pitch, const float* scale,
                        const Sm90Plan& plan, void* workspace, unsigned* tickets, void* stream) {
  using namespace sm90;
  if (args.g.pixels() == 0) return nullptr;
  const char* error = conv3d_sm90_refuses(args.g, args.dtype);
  if (!error && (plan.tile < 0 || plan.tile >= kSm90TileCount)) error = "no tile for this convolution";
  if (!error && plan.split > 1 && !workspace) error = "a split sum needs its workspace";
  Maps maps;
  if (!error) error = encode(&maps, args, pitch, plan);
  if (!error) {
    Sm90Params p = parameters(args, scale, plan, workspace);
    if (tickets)
      p.tickets = tickets;
    else if (plan.split > 1)
      error = sm90_clear(p.tickets, plan.tickets, stream);
    constexpr auto tiles = std::make_integer_sequence<int, kSm90TileCount>();
    if (!error)
      error = args.dtype == DType::kBFloat16 ? launch<BFloat16>(plan.tile, maps, p, plan.grid, stream, tiles)
                                             : launch<Float16>(plan.tile, maps, p, plan.grid, stream, tiles);
  }
  return error ? describe(error, args.g, plan) : nullptr;
}

const char* sm90_clear(unsigned* tickets, int64_t count, void* stream) {
  return clear(tickets, size_t(count) * sizeof(unsigned), stream);
}

bool sm90_captures(void* stream) { return captures(stream); }

Sm90Plan conv3d_sm90_plan(const ConvGeometry& g, unsigned tiles, int split) {
  const int sms = multiprocessors();
  if (sms == 0) {
    Sm90Plan none{};
    none.tile = -1;
    return none;
  }
  // A hundred estimates take microseconds, at every call the same ones: a network has some tens of
  // geometries. By thread: no lock. Of more than kWays that share their places the later ones stay.
  struct Entry {
    ConvGeometry g;
    unsigned tiles;
    int split, sms;  // 0: empty
    Sm90Plan plan;
  };
  constexpr int kSets = 32, kWays = 4;
  static thread_local Entry entries[kSets][kWays];
  static thread_local unsigned replaced;
  static_assert(std::has_unique_object_representations_v<ConvGeometry>, "compared and hashed as bytes");
  uint64_t words[sizeof g / 8], hash = uint64_t(tiles) << 32 | unsigned(sms * 32 + split);
  std::memcpy(words, &g, sizeof g);
  for (uint64_t word : words) hash = (hash ^ word) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
  Entry *e = entries[hash % kSets], *end = e + kWays;
  for (; e < end && e->sms; e++)
    if (e->sms == sms && e->tiles == tiles && e->split == split && !std::memcmp(&e->g, &g, sizeof g))
      return e->plan;
  if (e == end) e -= 1 + replaced++ % kWays;
  *e = {g, tiles, split, sms, sm90_plan(g, sms, tiles, split)};
  return e->plan;
}

}  // namespace r3d::cuda
