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

template <class T, int kVector>
const char* pool_of(const PoolArgs& a, void* stream) {
  const int64_t outputs = a.n * a.out.volume() * a.c;
  const dim3 block(kPoolThreads);
  if (takes_vectors(a.c, kVector, a.x, a.y))
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
