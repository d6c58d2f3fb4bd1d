// Max-pooling, and global average pool + linear layer, over channels-last tensors.
#include "pool.h"

#include "element.cuh"

namespace r3d::cuda {
namespace {

constexpr int kPoolThreads = 256;
constexpr int kWarp = 32;

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned pool_grid(int64_t work) {
  const int64_t blocks = ceil_of(work, kPoolThreads);
  return unsigned(blocks < 1 << 20 ? blocks : 1 << 20);
}

// A thread makes N neighbouring channels of one output pixel. Every pixel's neighbours read the same rows: L1
// and L2 have them.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads) max_pool3d_kernel(PoolArgs a) {
  using P = Pack<T, N>;
  const int64_t columns = a.c / N, all = a.n * a.out.volume() * columns;
  const int64_t step = int64_t(gridDim.x) * kPoolThreads;
  const P* x = static_cast<const P*>(a.x);
  for (int64_t at = int64_t(blockIdx.x) * kPoolThreads + threadIdx.x; at < all; at += step) {
    const int64_t column = at % columns, pixel = at / columns;
    const int ow = int(pixel % a.out.w), oh = int(pixel / a.out.w % a.out.h);
    const int64_t frame = pixel / (a.out.w * a.out.h);  // n * D' + d
    const int64_t n = frame / a.out.d, od = frame % a.out.d;
    const int64_t d0 = od * a.stride.d - a.padding.d, h0 = oh * a.stride.h - a.padding.h,
                  w0 = ow * a.stride.w - a.padding.w;
    const int64_t d1 = d0 + a.kernel.d < a.in.d ? d0 + a.kernel.d : a.in.d;
    const int64_t h1 = h0 + a.kernel.h < a.in.h ? h0 + a.kernel.h : a.in.h;
    const int64_t w1 = w0 + a.kernel.w < a.in.w ? w0 + a.kernel.w : a.in.w;
    float best[N];
#pragma unroll
    for (int i = 0; i < N; i++) best[i] = -INFINITY;
    for (int64_t d = d0 < 0 ? 0 : d0; d < d1; d++)
      for (int64_t h = h0 < 0 ? 0 : h0; h < h1; h++)
        for (int64_t w = w0 < 0 ? 0 : w0; w < w1; w++) {
          const P in = x[(((n * a.in.d + d) * a.in.h + h) * a.in.w + w) * columns + column];
#pragma unroll
          for (int i = 0; i < N; i++) {
            const float v = in.get(i);
            best[i] = v > best[i] || v != v ? v : best[i];  // NaN wins and stays, as in torch
          }
        }
    P out;
    out.set(best);
    static_cast<P*>(a.y)[at] = out;
  }
}

constexpr int kPoolRows = 7;  // of outputs that a thread makes

// The windows of the networks' stems: 3 x 3 positions of kDepth frames, every second row. A thread makes 16
// bytes of channels of one output column, row after row, and keeps what two windows share: a row of inputs is
// read once by a block and reduced once.
template <class T, int N, int kDepth>
__global__ void __launch_bounds__(kPoolThreads) max_pool3d_rows_kernel(PoolArgs a) {
  using P = Pack<T, N>;
  const int columns = int(a.c / N), item = int(blockIdx.z * kPoolThreads + threadIdx.x);
  const int ow = item / columns, column = item - ow * columns;
  if (ow >= a.out.w) return;
  const int64_t n = blockIdx.x / a.out.d, d0 = blockIdx.x % a.out.d * a.stride.d - a.padding.d;
  const int w0 = int(ow * a.stride.w - a.padding.w), h_end = int(a.in.h);
  const int64_t row_step = a.in.w * columns;
  const P* x = static_cast<const P*>(a.x) + ((n * a.in.d + d0) * a.in.h * a.in.w + w0) * columns + column;
  bool depth_in[kDepth], width_in[3];
#pragma unroll
  for (int i = 0; i < kDepth; i++) depth_in[i] = d0 + i >= 0 && d0 + i < a.in.d;
#pragma unroll
  for (int i = 0; i < 3; i++) width_in[i] = w0 + i >= 0 && w0 + i < a.in.w;

  const auto row = [&](int h) {
    P v[kDepth][3];
    const bool inside = h >= 0 && h < h_end;
#pragma unroll
    for (int i = 0; i < kDepth; i++) {
      const P* at = x + (i * a.in.h + h) * row_step;
#pragma unroll
      for (int j = 0; j < 3; j++) {
        v[i][j].raw = lowest(P());
        if (inside && depth_in[i] && width_in[j]) v[i][j] = at[j * columns];
      }
    }
#pragma unroll
    for (int i = 0; i < kDepth; i++)
#pragma unroll
      for (int j = 0; j < 3; j++)
        if (i + j > 0) raise(v[0][0], v[i][j]);
    return v[0][0];
  };
  const int first = int(blockIdx.y) * kPoolRows, h0 = int(first * 2 - a.padding.h);
  const int end = first + kPoolRows < a.out.h ? first + kPoolRows : int(a.out.h);
  P* y = static_cast<P*>(a.y) + ((blockIdx.x * a.out.h + first) * a.out.w + ow) * columns + column;
  P shared = row(h0);
  for (int oh = first; oh < end; oh++) {
    const int h = h0 + 2 * (oh - first);
    P best = row(h + 1);
    raise(best, shared);
    shared = row(h + 2);
    raise(best, shared);
    *y = best;
    y += a.out.w * columns;
  }
}

// A warp's lanes sum N channels each over every kWarps-th pixel; the block adds the warps in their order.
constexpr int kMeanWarps = 8;

template <class T, int N>
__global__ void __launch_bounds__(kWarp* kMeanWarps) mean_kernel(HeadArgs a, float* means) {
  R3D_SHARED(float, part, [kMeanWarps][kWarp * N]);
  using P = Pack<T, N>;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t columns = a.c / N, groups = (columns + kWarp - 1) / kWarp;
  const int64_t n = blockIdx.x / groups, column = blockIdx.x % groups * kWarp + lane;
  float sum[N] = {};
  if (column < columns) {
    const P* x = static_cast<const P*>(a.x) + n * a.pixels * columns + column;  // [pixels, columns]
    for (int64_t pixel = warp; pixel < a.pixels; pixel += kMeanWarps) {
      const P in = x[pixel * columns];
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += in.get(i);
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) part[warp][lane * N + i] = sum[i];
  __syncthreads();
  for (int i = int(threadIdx.x); i < kWarp * N; i += kWarp * kMeanWarps) {
    const int64_t c = int64_t(blockIdx.x % groups) * kWarp * N + i;
    if (c >= a.c) continue;
    float total = 0.f;
    for (int w = 0; w < kMeanWarps; w++) total += part[w][i];
    means[n * a.c + c] = total / float(a.pixels);
  }
}

// A warp makes one class of one sample: lanes multiply every 32nd channel group, then add up in a fixed tree.
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads) linear_kernel(HeadArgs a, const float* means) {
  using P = Pack<T, N>;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t at = int64_t(blockIdx.x) * (kPoolThreads / kWarp) + threadIdx.x / kWarp;
  if (at >= a.n * a.classes) return;
  const int64_t n = at / a.classes, k = at % a.classes, columns = a.c / N;
  const P* weight = static_cast<const P*>(a.weight) + k * columns;
  const float* mean = means + n * a.c;
  float sum = 0.f;
  for (int64_t column = lane; column < columns; column += kWarp) {
    const P w = weight[column];
#pragma unroll
    for (int i = 0; i < N; i++) sum = fmaf(w.get(i), mean[column * N + i], sum);
  }
#pragma unroll
  for (int flip = kWarp / 2; flip > 0; flip /= 2) sum += __shfl_xor_sync(~0u, sum, flip);
  if (lane != 0) return;
  if (a.bias) sum += static_cast<const Pack<T, 1>*>(a.bias)[k].get(0);
  Pack<T, 1> out;
  const float one[1] = {sum};
  out.set(one);
  static_cast<Pack<T, 1>*>(a.y)[at] = out;
}

bool takes_vectors(int64_t channels, int per_vector, const void* a, const void* b) {
  return channels % per_vector == 0 && reinterpret_cast<uintptr_t>(a) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(b) % 16 == 0;
}

// Whether max_pool3d_rows_kernel has the window, and its grid the blocks.
bool pools_rows(const PoolArgs& a) {
  return a.kernel.h == 3 && a.kernel.w == 3 && a.stride.h == 2 && (a.kernel.d == 1 || a.kernel.d == 3) &&
         a.n * a.out.d <= INT32_MAX && ceil_of(a.out.h, kPoolRows) <= 65535 && a.c <= 1 << 20 &&
         a.out.w * a.c <= int64_t(1) << 24 && a.in.h <= 1 << 28;
}

template <class T, int kVector>
const char* pool_of(const PoolArgs& a, void* stream) {
  const int64_t outputs = a.n * a.out.volume() * a.c;
  const dim3 block(kPoolThreads);
  const bool vectors = takes_vectors(a.c, kVector, a.x, a.y);
  if (vectors && pools_rows(a)) {
    const dim3 grid(unsigned(a.n * a.out.d), unsigned(ceil_of(a.out.h, kPoolRows)),
                    unsigned(ceil_of(a.out.w * (a.c / kVector), kPoolThreads)));
    if (a.kernel.d == 3)
      R3D_LAUNCH((max_pool3d_rows_kernel<T, kVector, 3>), grid, block, stream, a);
    else
      R3D_LAUNCH((max_pool3d_rows_kernel<T, kVector, 1>), grid, block, stream, a);
  } else if (vectors)
    R3D_LAUNCH((max_pool3d_kernel<T, kVector>), dim3(pool_grid(outputs / kVector)), block, stream, a);
  else
    R3D_LAUNCH((max_pool3d_kernel<T, 1>), dim3(pool_grid(outputs)), block, stream, a);
  return launch_error();
}

template <class T, int N>
const char* head_of(const HeadArgs& a, float* means, void* stream) {
  const int64_t blocks = a.n * ceil_of(a.c / N, kWarp), warps = kPoolThreads / kWarp;
  const int64_t outputs = ceil_of(a.n * a.classes, warps);
  if (blocks > INT32_MAX || outputs > INT32_MAX)
    return "avg_pool_linear: more outputs than a grid has blocks";
  R3D_LAUNCH((mean_kernel<T, N>), dim3(unsigned(blocks)), dim3(kWarp * kMeanWarps), stream, a, means);
  if (const char* error = launch_error()) return error;
  R3D_LAUNCH((linear_kernel<T, N>), dim3(unsigned(outputs)), dim3(kPoolThreads), stream, a, means);
  return launch_error();
}

template <class T, int kVector>
const char* head_for(const HeadArgs& a, float* means, void* stream) {
  return takes_vectors(a.c, kVector, a.x, a.weight) ? head_of<T, kVector>(a, means, stream)
                                                    : head_of<T, 1>(a, means, stream);
}

}  // namespace

const char* max_pool3d(const PoolArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return pool_of<float, 4>(args, stream);
    case DType::kBFloat16:
      return pool_of<BFloat16, 8>(args, stream);
    case DType::kFloat16:
      return pool_of<Float16, 8>(args, stream);
  }
  return "max_pool3d: unknown dtype";
}

const char* avg_pool_linear(const HeadArgs& args, float* means, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return head_for<float, 4>(args, means, stream);
    case DType::kBFloat16:
      return head_for<BFloat16, 8>(args, means, stream);
    case DType::kFloat16:
      return head_for<Float16, 8>(args, means, stream);
  }
  return "avg_pool_linear: unknown dtype";
}

}  // namespace r3d::cuda
