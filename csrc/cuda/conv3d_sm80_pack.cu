// What conv3d_sm80.h wants its operands to look like: weights packed once, activations that do not lie well,
// clips.
#include "conv3d_sm80.h"
#include "element.cuh"
#include "ptx/sm80.cuh"

namespace r3d::cuda::sm80 {
namespace {

constexpr int kThreads = 256;
enum Source : int { kFromFloat32 = 0, kFromBFloat16 = 1, kFromFloat16 = 2, kFromUInt8 = 3 };

__device__ __forceinline__ float load_as_float(const void* p, int64_t at, int source) {
  switch (source) {
    case kFromFloat32:
      return static_cast<const float*>(p)[at];
    case kFromBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(p)[at]);
    case kFromFloat16:
      return f16_to_float(static_cast<const uint16_t*>(p)[at]);
    default:
      return float(static_cast<const uint8_t*>(p)[at]);
  }
}

struct PackParams {
  const void* weight;  // [K, C, T, R, S]
  void* packed;        // [K, row]
  int64_t k, c, t, r, s;
  int64_t row, tap, taps, pixel;
  int source;
  bool rows, tf32;
};

template <class Out>
__global__ void __launch_bounds__(kThreads) conv3d_sm80_pack_kernel(PackParams p) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < p.k * p.row; at += step) {
    const int64_t k = at / p.row, element = at % p.row, inside = element % p.tap;
    int64_t tap = element / p.tap, c = inside;
    bool real = tap < p.taps;
    if (p.rows) {  // the tap is a filter row, and holds S pixels
      real = real && inside / p.pixel < p.s;
      tap = tap * p.s + inside / p.pixel;
      c = inside % p.pixel;
    }
    float v[1] = {0.f};
    if (real && c < p.c) v[0] = load_as_float(p.weight, (k * p.c + c) * p.t * p.r * p.s + tap, p.source);
    if (p.tf32) v[0] = round_tf32(v[0]);
    Pack<Out, 1> out;
    out.set(v);
    static_cast<Pack<Out, 1>*>(p.packed)[at] = out;
  }
}

struct RowsParams {
  Rows a;
  int64_t units;  // threads' worth of work
  int64_t units_a_row;
  int source;
  const float* scale;
  const float* shift;
};

template <class Out>
__device__ __forceinline__ void store(Out* to, const float (&v)[1]) {
  reinterpret_cast<Pack<Out, 1>*>(to)->set(v);
}
__device__ __forceinline__ void store(float* to, const float (&v)[4]) {
  reinterpret_cast<Pack<float, 4>*>(to)->set(v);
}
template <class Out>
__device__ __forceinline__ void store(Out* to, const float (&v)[4]) {  // four of 16 bits
  struct alignas(8) Words {
    uint32_t low, high;
  };
  *reinterpret_cast<Words*>(to) = {Out::pack(v[0], v[1]), Out::pack(v[2], v[3])};
}

// A thread writes N neighbouring elements of a row.
template <class Out, int N>
__global__ void __launch_bounds__(kThreads) conv3d_sm80_rows_kernel(RowsParams p) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x; unit < p.units; unit += step) {
    const int64_t row = unit / p.units_a_row;
    const int first = int(unit - row * p.units_a_row) * N;
    const int64_t h = row % p.a.in.h, d = row / p.a.in.h % p.a.in.d, n = row / (p.a.in.h * p.a.in.d);
    const int64_t from = n * p.a.x_strides.n + d * p.a.x_strides.d + h * p.a.x_strides.h;
    float values[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int pixel = (first + i) / int(p.a.pixel), c = (first + i) % int(p.a.pixel);
      const int64_t w = pixel - p.a.left;
      float v = 0.f;
      if (c < p.a.c && w >= 0 && w < p.a.in.w) {
        v = load_as_float(p.a.x, from + w * p.a.x_strides.w + c * p.a.x_strides.c, p.source);
        if (p.scale) v *= p.scale[c];
        if (p.shift) v += p.shift[c];
      }
      values[i] = v;
    }
    store(static_cast<Out*>(p.a.y) + unit * N, values);
  }
}

unsigned grid_for(int64_t units) {
  const int64_t blocks = ceil_div(units, kThreads);
  return unsigned(blocks < 1 << 20 ? blocks : 1 << 20);
}

template <class Out>
const char* launch_rows(RowsParams p, void* stream) {
  const int64_t row = p.a.width * p.a.pixel;
  const bool wide = row % 4 == 0 && reinterpret_cast<uintptr_t>(p.a.y) % 16 == 0;
  p.units_a_row = wide ? row / 4 : row;
  p.units = p.units_a_row * p.a.n * p.a.in.volume() / p.a.in.w;
  if (p.units == 0) return nullptr;
  if (wide)
    R3D_LAUNCH((conv3d_sm80_rows_kernel<Out, 4>), dim3(grid_for(p.units)), dim3(kThreads), stream, p);
  else
    R3D_LAUNCH((conv3d_sm80_rows_kernel<Out, 1>), dim3(grid_for(p.units)), dim3(kThreads), stream, p);
  return launch_error();
}

}  // namespace

const char* pack(const ConvGeometry& g, DType from, const void* weight, DType to, void* packed,
                 void* stream) {
  const Layout l = layout_of(g, to);
  const PackParams p{weight,     packed,
                     g.k,        g.c,
                     g.kernel.d, g.kernel.h,
                     g.kernel.w, l.row_elements,
                     l.tap,      l.taps.volume(),
                     l.pixel,    int(from),
                     l.rows,     to == DType::kFloat32};
  const dim3 grid(grid_for(p.k * p.row)), block(kThreads);
  switch (to) {
    case DType::kFloat32:
      R3D_LAUNCH(conv3d_sm80_pack_kernel<float>, grid, block, stream, p);
      break;
    case DType::kBFloat16:
      R3D_LAUNCH(conv3d_sm80_pack_kernel<BFloat16>, grid, block, stream, p);
      break;
    case DType::kFloat16:
      R3D_LAUNCH(conv3d_sm80_pack_kernel<Float16>, grid, block, stream, p);
      break;
  }
  return launch_error();
}

const char* clip(const ClipArgs& args, void* stream) {
  if (args.rows.width * args.rows.pixel > INT32_MAX) return "clip: a row has more than 2^31 elements";
  const RowsParams p{args.rows, 0, 0, args.from, args.scale, args.shift};
  switch (args.to) {
    case DType::kFloat32:
      return launch_rows<float>(p, stream);
    case DType::kBFloat16:
      return launch_rows<BFloat16>(p, stream);
    case DType::kFloat16:
      return launch_rows<Float16>(p, stream);
  }
  return "clip: unknown dtype";
}

const char* to_rows(const Rows& rows, DType dtype, void* stream) {
  return clip({rows, int(dtype), dtype, nullptr, nullptr}, stream);
}

}  // namespace r3d::cuda::sm80
