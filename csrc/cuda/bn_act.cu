// Batch norm + residual + activation over a channels-last tensor: reads and writes every element once, so its
// speed is that of memory.
#include "../norm.h"

#include "element.cuh"

namespace r3d::cuda {

constexpr int kThreads = 256;
constexpr int kRowsInFlight = 2;  // loads issued before the first is used
constexpr int kBlocksPerSm = 8;   // 2048 resident threads: a full multiprocessor
constexpr int64_t kWide = 16;     // bytes of the widest load

// The grid is a wide sheet over [rows, C / N]: a thread keeps its channels, and with them its scale and shift
// in registers, and steps down the rows. Neighbouring threads read neighbouring memory.
template <class T, int N, bool kResidual>
__global__ void __launch_bounds__(kThreads) bn_act_kernel(BnActArgs args) {
  const int64_t columns = args.channels / N;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kThreads / columns;  // rows that the grid covers at once
  const int64_t first = thread / columns;
  if (first >= step) return;  // the remainder that does not fill a row

  using P = Pack<T, N>;
  const int64_t column = thread - first * columns;
  const P* x = static_cast<const P*>(args.x) + column;                // [rows, columns]
  const P* residual = static_cast<const P*>(args.residual) + column;  // [rows, columns]
  P* y = static_cast<P*>(args.y) + column;                            // [rows, columns]
  // Nothing is below -inf. The comparison below lets NaN through, as torch does; fmaxf would drop it.
  const float floor = args.activation == Activation::kRelu ? 0.f : -INFINITY;

  float scale[N], shift[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    scale[i] = args.scale[column * N + i];
    shift[i] = args.shift[column * N + i];
  }

  for (int64_t row = first; row < args.rows; row += step * kRowsInFlight) {
    P in[kRowsInFlight], add[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) {
      const int64_t at = row + r * step;
      if (at >= args.rows) continue;
      in[r] = x[at * columns];
      if constexpr (kResidual) add[r] = residual[at * columns];
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; r++) {
      const int64_t at = row + r * step;
      if (at >= args.rows) continue;
      float v[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        v[i] = fmaf(in[r].get(i), scale[i], shift[i]);
        if constexpr (kResidual) v[i] += add[r].get(i);
        v[i] = v[i] < floor ? floor : v[i];
      }
      P out;
      out.set(v);
      y[at * columns] = out;
    }
  }
}

template <class T, int N>
static const char* launch(const BnActArgs& args, void* stream) {
  const int sms = multiprocessors();
  if (sms == 0) return launch_error();
  const int64_t columns = args.channels / N;
  const int64_t all = (args.rows * columns + kThreads - 1) / kThreads;  // blocks with one element a thread
  const int64_t one_row = (columns + kThreads - 1) / kThreads;          // the grid covers a row at least
  int64_t blocks = all < int64_t(sms) * kBlocksPerSm ? all : int64_t(sms) * kBlocksPerSm;
  if (blocks < one_row) blocks = one_row;
  if (blocks > INT32_MAX) return "bn_act: too many channels";
  if (args.residual)
    R3D_LAUNCH((bn_act_kernel<T, N, true>), dim3(unsigned(blocks)), dim3(kThreads), stream, args);
  else
    R3D_LAUNCH((bn_act_kernel<T, N, false>), dim3(unsigned(blocks)), dim3(kThreads), stream, args);
  return launch_error();
}

template <class T, int kWideElements>
static const char* dispatch(const BnActArgs& args, void* stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kWide == 0; };
  const bool wide =
      args.channels % kWideElements == 0 && aligned(args.x) && aligned(args.residual) && aligned(args.y);
  return wide ? launch<T, kWideElements>(args, stream) : launch<T, 1>(args, stream);
}

const char* bn_act(const BnActArgs& args, void* stream) {
  if (args.rows == 0 || args.channels == 0) return nullptr;
  switch (args.dtype) {
    case DType::kFloat32:
      return dispatch<float, 4>(args, stream);
    case DType::kBFloat16:
      return dispatch<BFloat16, 8>(args, stream);
    case DType::kFloat16:
      return dispatch<Float16, 8>(args, stream);
  }
  return "bn_act: unknown dtype";
}

}  // namespace r3d::cuda
