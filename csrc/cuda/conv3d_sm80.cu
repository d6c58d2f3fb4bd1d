// The main kernel of conv3d_sm80.h: a pipeline of cp.async into swizzled shared memory, ldmatrix, mma.sync,
// and one pass over the output.
#include "conv3d_sm80.h"

#include "element.cuh"
#include "ptx/sm80.cuh"

namespace r3d::cuda::sm80 {
namespace {

// What the kernels know of a call. Pitches are bytes.
struct Params {
  const char* x;  // [N, D, H, W, C] as Layout says
  const char* w;  // [K, row_elements]
  const float* scale;
  const float* bias;
  const void* residual;
  void* y;
  float* partial;  // [splits, M, partial_pitch] or null
  int64_t m;       // output pixels
  int64_t sample_pitch, plane_pitch, row_pitch, pixel_pitch, w_pitch;
  int k;
  int y_pitch, residual_pitch, partial_pitch;  // elements from a pixel to the next
  int t, r, s;
  int stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w;
  int d, h, w_in, out_h, out_w, out_volume;
  int tap_chunks;            // chunks of a tap
  int tail;                  // bytes of the last one that belong to the pixel
  int next_tap, next_chunk;  // a step further in the sum: 8 = next_tap * tap_chunks + next_chunk
  int steps, splits;
  unsigned m_tiles, n_tiles;
  bool relu, wide;  // wide: y and residual take 16 bytes at a time
};

// Where a tap's element lies from that of the first tap, and which bits a pixel must have for it to be
// inside.
struct alignas(kTapBytes) Tap {
  int64_t offset;
  uint32_t needs;
  uint32_t unused;
};

// The three kinds of operand; a word of ldmatrix holds two 16-bit numbers or one TF32 number.
struct MulBFloat16 {
  using Out = BFloat16;
  static constexpr int kVector = 8;
  static __device__ __forceinline__ void prepare(uint32_t (&)[4]) {}
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_bf16(c, a, b);
  }
};
struct MulFloat16 {
  using Out = Float16;
  static constexpr int kVector = 8;
  static __device__ __forceinline__ void prepare(uint32_t (&)[4]) {}
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_f16(c, a, b);
  }
};
struct MulTf32 {
  using Out = float;
  static constexpr int kVector = 4;
  // Activations are float32: rounded here, or the hardware would cut them off. Weights are rounded already.
  static __device__ __forceinline__ void prepare(uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = round_tf32_bits(a[i]);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_tf32(c, a, b);
  }
};

template <int kIndex, int kWarpRows>
struct Tile {
  static constexpr TileShape kShape = kTiles[kIndex];
  static constexpr int kM = kShape.m, kN = kShape.n, kStages = kShape.stages, kThreads = kShape.threads;
  static constexpr int kWarpM = kWarpRows, kWarpN = 32;
  static constexpr int kFragM = kWarpM / 16, kFragN = kWarpN / 8;
  static constexpr int kRowStep = kThreads / kStepChunks;  // rows that the block copies at once
  static constexpr int kRowsA = kM / kRowStep, kRowsB = kN / kRowStep;
  static constexpr int kBytesA = kM * kStepBytes, kStage = kShape.stage_bytes();
  static constexpr int kPitch = kN + 8;  // floats of a row in the epilogue: quarter warps hit different banks
  static_assert(kRowStep % 8 == 0, "a thread's rows have one swizzle");
  static_assert((kM / kWarpM) * (kN / kWarpN) * 32 == kThreads, "the warps cover the tile");
  static_assert(kM * kPitch * 4 <= kStages * kStage, "the epilogue's tile takes the pipeline's memory");
};

// Which tile and which part of the sum a block computes. Eight tiles of pixels share their weights before the
// next channels come, so that both stay in L2.
struct Place {
  int64_t m0;
  int n0, split, first_step, last_step;

  template <class T>
  static __device__ __forceinline__ Place of(const Params& p, unsigned block) {
    constexpr unsigned kGroup = 8;
    const unsigned tile = block / unsigned(p.splits), per_group = kGroup * p.n_tiles;
    const unsigned first = tile / per_group * kGroup, inside = tile % per_group;
    const unsigned rows = p.m_tiles - first < kGroup ? p.m_tiles - first : kGroup;
    Place at;
    at.m0 = int64_t(first + inside % rows) * T::kM;
    at.n0 = int(inside / rows) * T::kN;
    at.split = int(block % unsigned(p.splits));
    // The first parts take the remainder.
    const int each = p.steps / p.splits, more = p.steps % p.splits;
    at.first_step = at.split * each + (at.split < more ? at.split : more);
    at.last_step = at.first_step + each + (at.split < more);
    return at;
  }
};

template <class T>
__device__ __forceinline__ void write_taps(const Params& p, Tap* taps) {
  const int count = p.t * p.r * p.s;
  for (int i = int(threadIdx.x); i < count + kStepChunks; i += T::kThreads) {
    const int s = i % p.s, r = i / p.s % p.r, t = i / (p.s * p.r);
    Tap tap;
    tap.offset = t * int64_t(p.dil_d) * p.plane_pitch + r * int64_t(p.dil_h) * p.row_pitch +
                 s * int64_t(p.dil_w) * p.pixel_pitch;
    tap.needs = 1u << t | 1u << (p.t + r) | 1u << (p.t + p.r + s);
    tap.unused = 0;
    if (i >= count) tap.offset = 0, tap.needs = ~0u;  // past the end of the sum: never inside
    taps[i] = tap;
  }
}

// One bit for each of `count` positions first, first + step, ... that lies in [0, size).
__device__ __forceinline__ uint32_t inside_bits(int first, int step, int count, int size) {
  uint32_t bits = 0;
  for (int i = 0; i < count; i++) bits |= uint32_t(unsigned(first + i * step) < unsigned(size)) << i;
  return bits;
}

// A thread copies one column of chunks, from every kRowStep-th row of A and of B. All that depends on the row
// is computed here, once; a step adds one offset from the table.
template <class T>
struct Loader {
  const char* x[T::kRowsA];
  uint32_t inside[T::kRowsA];
  const char* w;
  int64_t w_step;
  int w_rows, tap, chunk, to;

  __device__ __forceinline__ Loader(const Params& p, const Place& at) {
    const int row = int(threadIdx.x) / kStepChunks, column = int(threadIdx.x) % kStepChunks;
    const int64_t first_sample = at.m0 / p.out_volume;
    const unsigned rest = unsigned(at.m0 - first_sample * p.out_volume);
    const unsigned plane = unsigned(p.out_h) * unsigned(p.out_w);
#pragma unroll
    for (int i = 0; i < T::kRowsA; i++) {
      const int in_tile = row + i * T::kRowStep;
      const unsigned pixel = rest + unsigned(in_tile);
      const unsigned sample = pixel / unsigned(p.out_volume), q = pixel - sample * unsigned(p.out_volume);
      const int od = int(q / plane), oh = int(q % plane / unsigned(p.out_w)), ow = int(q % unsigned(p.out_w));
      const int d0 = od * p.stride_d - p.pad_d, h0 = oh * p.stride_h - p.pad_h,
                w0 = ow * p.stride_w - p.pad_w;
      x[i] = p.x + (first_sample + sample) * p.sample_pitch + d0 * p.plane_pitch + h0 * p.row_pitch +
             w0 * p.pixel_pitch;
      inside[i] = inside_bits(d0, p.dil_d, p.t, p.d) | inside_bits(h0, p.dil_h, p.r, p.h) << p.t |
                  inside_bits(w0, p.dil_w, p.s, p.w_in) << (p.t + p.r);
      if (at.m0 + in_tile >= p.m) inside[i] = 0;
    }
    const int64_t position = int64_t(at.first_step) * kStepChunks + column;
    tap = int(position / p.tap_chunks);
    chunk = int(position % p.tap_chunks);
    w = p.w + (at.n0 + row) * p.w_pitch + position * kChunk;
    w_step = T::kRowStep * p.w_pitch;
    w_rows = p.k - at.n0 - row;
    to = row * kStepBytes + (column ^ row % 8) * kChunk;  // swizzled: eight rows of a column in eight banks
  }

  __device__ __forceinline__ void copy(const Params& p, const Tap* taps, unsigned char* stage) {
    const Tap at = taps[tap];
    const int64_t offset = at.offset + chunk * kChunk;
    const int real = chunk + 1 == p.tap_chunks ? p.tail : kChunk;
#pragma unroll
    for (int i = 0; i < T::kRowsA; i++)
      cp_async_16(stage + to + i * T::kRowStep * kStepBytes, x[i] + offset,
                  (inside[i] & at.needs) == at.needs ? real : 0);
#pragma unroll
    for (int i = 0; i < T::kRowsB; i++)
      cp_async_16(stage + T::kBytesA + to + i * T::kRowStep * kStepBytes, w + i * w_step,
                  i * T::kRowStep < w_rows ? kChunk : 0);
    w += kStepBytes;
    tap += p.next_tap;
    chunk += p.next_chunk;
    if (chunk >= p.tap_chunks) chunk -= p.tap_chunks, tap++;
  }
};

// The operands of a warp's products over 32 bytes of the sum.
template <class M, class T>
struct Fragments {
  uint32_t a[T::kFragM][4], b[T::kFragN / 2][4];

  // `quarter` of the step's 128 bytes
  __device__ __forceinline__ void load(const unsigned char* stage, int row_a, int row_b, int quarter) {
    const int lane = int(threadIdx.x) % 32;
    const int chunk_a = (quarter * 2 + lane / 16) ^ lane % 8,
              chunk_b = (quarter * 2 + lane / 8 % 2) ^ lane % 8;
    const unsigned char* from_a = stage + (row_a + lane % 16) * kStepBytes + chunk_a * kChunk;
    const unsigned char* from_b =
        stage + T::kBytesA + (row_b + lane / 16 * 8 + lane % 8) * kStepBytes + chunk_b * kChunk;
#pragma unroll
    for (int i = 0; i < T::kFragM; i++) {
      ldmatrix_x4(a[i], from_a + i * 16 * kStepBytes);
      M::prepare(a[i]);
    }
#pragma unroll
    for (int j = 0; j < T::kFragN / 2; j++) ldmatrix_x4(b[j], from_b + j * 16 * kStepBytes);
  }

  __device__ __forceinline__ void multiply(float (&c)[T::kFragM][T::kFragN][4]) const {
#pragma unroll
    for (int i = 0; i < T::kFragM; i++)
#pragma unroll
      for (int j = 0; j < T::kFragN; j++) M::mma(c[i][j], a[i], &b[j / 2][j % 2 * 2]);
  }
};

// scale and bias of the accumulators, to [kM, kPitch] floats in shared memory.
template <class T>
__device__ __forceinline__ void stage_output(const Params& p, const Place& at, int row, int column,
                                             const float (&c)[T::kFragM][T::kFragN][4], float* out) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < T::kFragN; j++) {
    const int n = column + j * 8 + lane % 4 * 2;
    float scale[2] = {1.f, 1.f}, bias[2] = {0.f, 0.f};
    if (!p.partial) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (at.n0 + n + e >= p.k) continue;
        if (p.scale) scale[e] = p.scale[at.n0 + n + e];
        bias[e] = p.bias[at.n0 + n + e];
      }
    }
#pragma unroll
    for (int i = 0; i < T::kFragM; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float* to = out + (row + i * 16 + half * 8 + lane / 4) * T::kPitch + n;
        to[0] = fmaf(c[i][j][half * 2], scale[0], bias[0]);
        to[1] = fmaf(c[i][j][half * 2 + 1], scale[1], bias[1]);
      }
  }
}

// N neighbouring outputs of a pixel from a channel on: residual, activation, conversion, store.
template <class Out, int N>
__device__ __forceinline__ void finish(const Params& p, int64_t pixel, int channel, float (&v)[N]) {
  using P = Pack<Out, N>;
  constexpr int64_t kBytes = sizeof(P) / N;
  if (p.residual) {
    const P add = *reinterpret_cast<const P*>(static_cast<const char*>(p.residual) +
                                              (pixel * p.residual_pitch + channel) * kBytes);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += add.get(i);
  }
  if (p.relu) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = v[i] < 0.f ? 0.f : v[i];  // lets NaN through, as torch does
  }
  if (N > 1 && channel + N > p.k) {  // behind the last channel
#pragma unroll
    for (int i = 0; i < N; i++)
      if (channel + i >= p.k) v[i] = 0.f;
  }
  P out;
  out.set(v);
  *reinterpret_cast<P*>(static_cast<char*>(p.y) + (pixel * p.y_pitch + channel) * kBytes) = out;
}

// N floats from a multiple of N floats on, 16 bytes at a time where they are four or more.
template <int N>
__device__ __forceinline__ void load_floats(const float* from, float (&v)[N]) {
  constexpr int kWide = N == 1 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < N; i += kWide) {
    const Pack<float, kWide> in = *reinterpret_cast<const Pack<float, kWide>*>(from + i);
#pragma unroll
    for (int e = 0; e < kWide; e++) v[i + e] = in.get(e);
  }
}

// The tile from shared memory to y, neighbouring threads at neighbouring addresses.
template <class Out, class T, int N>
__device__ __forceinline__ void write_tile(const Params& p, const Place& at, const float* tile) {
  for (int i = int(threadIdx.x); i < T::kM * T::kN / N; i += T::kThreads) {
    const int row = i / (T::kN / N), column = i % (T::kN / N) * N;
    if (at.m0 + row >= p.m || at.n0 + column >= p.k) continue;
    float v[N];
    load_floats(tile + row * T::kPitch + column, v);
    finish<Out, N>(p, at.m0 + row, at.n0 + column, v);
  }
}

// The sums of this part to p.partial, N at a time.
template <class T, int N>
__device__ __forceinline__ void write_partial(const Params& p, const Place& at, const float* tile) {
  float* to = p.partial + at.split * p.m * p.partial_pitch;
  for (int i = int(threadIdx.x); i < T::kM * T::kN / N; i += T::kThreads) {
    const int row = i / (T::kN / N), column = i % (T::kN / N) * N;
    if (at.m0 + row >= p.m || at.n0 + column >= p.k) continue;
    float v[N];
    load_floats(tile + row * T::kPitch + column, v);
    reinterpret_cast<Pack<float, N>*>(to + (at.m0 + row) * p.partial_pitch + at.n0 + column)->set(v);
  }
}

template <class M, class T>
__global__ void __launch_bounds__(T::kThreads, T::kShape.blocks) conv3d_sm80_kernel(Params p) {
  R3D_DYNAMIC_SHARED(memory);
  Tap* taps = reinterpret_cast<Tap*>(memory + T::kStages * T::kStage);
  const Place at = Place::of<T>(p, blockIdx.x);
  write_taps<T>(p, taps);
  Loader<T> loader(p, at);
  __syncthreads();

  int ahead = at.first_step;  // the step that is copied next
#pragma unroll
  for (int i = 0; i < T::kStages - 1; i++, ahead++) {
    if (ahead < at.last_step) loader.copy(p, taps, memory + i * T::kStage);
    cp_async_commit();
  }
  const int warp = int(threadIdx.x) / 32, across = T::kN / T::kWarpN;
  const int row = warp / across * T::kWarpM, column = warp % across * T::kWarpN;
  float c[T::kFragM][T::kFragN][4] = {};
  Fragments<M, T> operands[2];
  cp_async_wait<T::kStages - 2>();
  __syncthreads();
  operands[0].load(memory, row, column, 0);

  int here = 0, free = (T::kStages - 1) * T::kStage;  // stages: the one multiplied, the one to be filled
  for (int step = at.first_step; step < at.last_step; step++, ahead++) {
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      if (quarter == 3) {
        // The next step has landed, and all warps have read this one: its stage is free from here on.
        cp_async_wait<T::kStages - 2>();
        __syncthreads();
        free = here;
        here = here + T::kStage == T::kStages * T::kStage ? 0 : here + T::kStage;
      }
      // one quarter ahead, the first of the next step at last; behind the last step it is read in vain
      operands[(quarter + 1) % 2].load(memory + here, row, column, (quarter + 1) % 4);
      if (quarter == 0) {
        if (ahead < at.last_step) loader.copy(p, taps, memory + free);
        cp_async_commit();
      }
      operands[quarter % 2].multiply(c);
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  float* tile = reinterpret_cast<float*>(memory);
  stage_output<T>(p, at, row, column, c, tile);
  __syncthreads();
  if (p.partial && p.wide)
    write_partial<T, 4>(p, at, tile);
  else if (p.partial)
    write_partial<T, 1>(p, at, tile);
  else if (p.wide)
    write_tile<typename M::Out, T, M::kVector>(p, at, tile);
  else
    write_tile<typename M::Out, T, 1>(p, at, tile);
}

constexpr int kReduceThreads = 256;  // five blocks a multiprocessor: 48 registers, fewer spill

// Adds the parts of the sum in their order, then what the main kernel does behind its sum.
template <class Out, int N>
__global__ void __launch_bounds__(kReduceThreads, 5) conv3d_sm80_reduce_kernel(Params p) {
  const int groups = (p.k + N - 1) / N;  // of a pixel
  const unsigned step = gridDim.x * kReduceThreads, first = blockIdx.x * kReduceThreads + threadIdx.x;
  const int pixels_on = int(step / unsigned(groups)), groups_on = int(step % unsigned(groups));
  int group = int(first % unsigned(groups));
  int64_t pixel = first / unsigned(groups);
  while (pixel < p.m) {
    const int channel = group * N;
    const float* from = p.partial + pixel * p.partial_pitch + channel;
    float v[N] = {}, part[N];
    for (int split = 0; split < p.splits; split++, from += p.m * p.partial_pitch) {
      load_floats(from, part);
#pragma unroll
      for (int i = 0; i < N; i++) v[i] += part[i];
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (N > 1 && channel + i >= p.k) continue;
      v[i] = fmaf(v[i], p.scale ? p.scale[channel + i] : 1.f, p.bias[channel + i]);
    }
    finish<Out, N>(p, pixel, channel, v);
    pixel += pixels_on, group += groups_on;
    if (group >= groups) group -= groups, pixel++;
  }
}

template <class M, class T>
const char* launch_tile(const Params& p, int64_t taps, void* stream) {
  const unsigned blocks = p.m_tiles * p.n_tiles * unsigned(p.splits);
  return launch_dynamic(conv3d_sm80_kernel<M, T>, dim3(blocks), dim3(T::kThreads),
                        shared_bytes(T::kShape, taps), stream, p);
}

template <class M>
const char* launch(const Params& p, const Choice& choice, int multiprocessors, void* stream) {
  const int64_t taps = int64_t(p.t) * p.r * p.s;
  const char* error = choice.tile == 0   ? launch_tile<M, Tile<0, 64>>(p, taps, stream)
                      : choice.tile == 1 ? launch_tile<M, Tile<1, 64>>(p, taps, stream)
                                         : launch_tile<M, Tile<2, 32>>(p, taps, stream);
  if (error || !p.partial) return error;
  const int64_t blocks = ceil_div(p.m * ceil_div(p.k, p.wide ? M::kVector : 1), kReduceThreads);
  const dim3 grid(unsigned(blocks < 8 * multiprocessors ? blocks : 8 * multiprocessors));
  if (p.wide)
    R3D_LAUNCH((conv3d_sm80_reduce_kernel<typename M::Out, M::kVector>), grid, dim3(kReduceThreads), stream,
               p);
  else
    R3D_LAUNCH((conv3d_sm80_reduce_kernel<typename M::Out, 1>), grid, dim3(kReduceThreads), stream, p);
  return launch_error();
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kChunk == 0; }

// x already lies as the kernel wants it: channels innermost, every pixel at a multiple of 16 bytes. What lies
// behind its channels is not read.
bool lies_well(const Call& call, const Layout& l) {
  const ConvGeometry& g = call.conv.g;
  const int64_t per_chunk = kChunk / element_size(call.conv.dtype);
  if (call.clip.from >= 0 || l.rows) return false;
  if (!aligned(call.conv.x) || (call.x.c != 1 && g.c > 1)) return false;
  for (int64_t s : {call.x.n, call.x.d, call.x.h, call.x.w})
    if (s % per_chunk) return false;
  return true;
}

// The rows that x is copied to where it does not lie well.
Rows rows_of(const Call& call, const Layout& l) {
  const ConvGeometry& g = call.conv.g;
  Rows rows{g.n, g.c, g.in, call.x, call.conv.x, 0, g.in.w, l.pixel, nullptr};
  if (l.rows) {
    // The windows of all outputs of a row, with the padding written out; the last one is read in whole
    // chunks.
    rows.left = g.padding.w;
    rows.width = (g.out.w - 1) * g.stride.w + ceil_div(l.tap, l.pixel);
    if (rows.width < g.padding.w + g.in.w) rows.width = g.padding.w + g.in.w;
    const int64_t per_chunk = kChunk / element_size(call.conv.dtype);
    while (rows.width * l.pixel % per_chunk) rows.width++;
  }
  return rows;
}

// Floats from a pixel to the next in the parts of a split sum: whole vectors of every kind.
int64_t partial_pitch(const ConvGeometry& g) { return ceil_div(g.k, 8) * 8; }

int64_t rows_bytes(const Rows& r, DType t) {
  return ceil_div(r.n * r.in.d * r.in.h * r.width * r.pixel * element_size(t), 256) * 256;
}

Params params_of(const Call& call, const Layout& l, const char* x, const Strides& x_strides, float* partial) {
  const ConvArgs& a = call.conv;
  const ConvGeometry& g = a.g;
  const TileShape& tile = kTiles[call.choice.tile];
  const int64_t bytes = element_size(a.dtype);
  Params p{};
  p.x = x;
  p.w = static_cast<const char*>(a.weight);
  p.scale = call.scale;
  p.bias = a.bias;
  p.residual = a.residual;
  p.y = a.y;
  p.partial = partial;
  p.m = g.pixels();
  p.sample_pitch = x_strides.n * bytes;
  p.plane_pitch = x_strides.d * bytes;
  p.row_pitch = x_strides.h * bytes;
  p.pixel_pitch = x_strides.w * bytes;
  p.w_pitch = l.row_elements * bytes;
  p.k = int(g.k);
  p.y_pitch = int(call.y_pitch), p.residual_pitch = int(call.residual_pitch);
  p.partial_pitch = int(partial_pitch(g));
  p.t = int(l.taps.d), p.r = int(l.taps.h), p.s = int(l.taps.w);
  p.stride_d = int(g.stride.d), p.stride_h = int(g.stride.h), p.stride_w = int(g.stride.w);
  p.pad_d = int(g.padding.d), p.pad_h = int(g.padding.h), p.pad_w = int(g.padding.w);
  p.dil_d = int(g.dilation.d), p.dil_h = int(g.dilation.h), p.dil_w = int(g.dilation.w);
  p.d = int(g.in.d), p.h = int(g.in.h), p.w_in = int(g.in.w);
  if (l.rows) {  // a window is one tap, and always inside: the padding lies in memory
    p.pixel_pitch *= g.stride.w;
    p.stride_w = 1, p.pad_w = 0, p.w_in = int(g.out.w);
  }
  p.out_h = int(g.out.h), p.out_w = int(g.out.w), p.out_volume = int(g.out.volume());
  p.tap_chunks = int(l.tap * bytes / kChunk);
  // Rows are written whole: what lies behind a window of them are zeros, or meets weights that are.
  p.tail = l.rows ? kChunk : int(g.c * bytes - (p.tap_chunks - 1) * kChunk);
  p.next_tap = kStepChunks / p.tap_chunks, p.next_chunk = kStepChunks % p.tap_chunks;
  p.steps = int(l.steps), p.splits = call.choice.splits;
  p.m_tiles = unsigned(ceil_div(p.m, tile.m)), p.n_tiles = unsigned(ceil_div(g.k, tile.n));
  p.relu = a.activation == Activation::kRelu;
  const int64_t per_chunk = kChunk / bytes;
  p.wide = aligned(a.y) && call.y_pitch % per_chunk == 0 && call.y_pitch >= pitch_of(g.k, a.dtype);
  if (a.residual)
    p.wide = p.wide && aligned(a.residual) && call.residual_pitch % per_chunk == 0 &&
             call.residual_pitch >= pitch_of(g.k, a.dtype);
  return p;
}

}  // namespace

int device_multiprocessors() {
  const int count = multiprocessors();
  if (!count) launch_error();  // the next launch must not be told of it
  return count;
}

int64_t workspace_bytes(const Call& call) {
  const Layout l = layout_of(call.conv.g, call.conv.dtype);
  int64_t bytes = lies_well(call, l) ? 0 : rows_bytes(rows_of(call, l), call.conv.dtype);
  if (call.choice.splits > 1)
    bytes += call.choice.splits * call.conv.g.pixels() * partial_pitch(call.conv.g) * 4;
  return bytes;
}

const char* run(const Call& call, void* workspace, void* stream) {
  const Layout l = layout_of(call.conv.g, call.conv.dtype);
  const char* x = static_cast<const char*>(call.conv.x);
  Strides strides = call.x;
  char* scratch = static_cast<char*>(workspace);
  if (!lies_well(call, l)) {
    Rows rows = rows_of(call, l);
    rows.y = scratch;
    const ClipSource& s = call.clip;
    const int from = s.from < 0 ? int(call.conv.dtype) : s.from;
    if (const char* error = clip({rows, from, call.conv.dtype, s.scale, s.shift}, stream)) return error;
    x = scratch;
    scratch += rows_bytes(rows, call.conv.dtype);
    const int64_t row = rows.width * rows.pixel;
    strides = {row * rows.in.h * rows.in.d, 1, row * rows.in.h, row, rows.pixel};
  }
  float* partial = call.choice.splits > 1 ? reinterpret_cast<float*>(scratch) : nullptr;
  const Params p = params_of(call, l, x, strides, partial);
  switch (call.conv.dtype) {
    case DType::kFloat32:
      return launch<MulTf32>(p, call.choice, call.multiprocessors, stream);
    case DType::kBFloat16:
      return launch<MulBFloat16>(p, call.choice, call.multiprocessors, stream);
    case DType::kFloat16:
      return launch<MulFloat16>(p, call.choice, call.multiprocessors, stream);
  }
  return "conv3d_sm80: unknown dtype";
}

}  // namespace r3d::cuda::sm80
