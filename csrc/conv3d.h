// What a fused 3-D convolution is, in plain structs: shared by the CPU kernels, the CUDA kernels, the
// emulator and the tests. Knows neither torch nor Python.
//
//   y[n, od, oh, ow, k] = act( bias[k] + residual[n, od, oh, ow, k] + sum_{t,r,s,c} x[n, id, ih, iw, c] *
//   w[k, c, t, r, s] ) id = od*stride.d - padding.d + t*dilation.d, likewise ih (r) and iw (s); x is zero
//   outside its bounds.
//
// Activations are channels-last in memory: [N, D, H, W, C].
#pragma once

#include <cstdint>

namespace r3d {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Activation : int { kNone = 0, kRelu = 1 };

constexpr int64_t element_size(DType t) { return t == DType::kFloat32 ? 4 : 2; }

struct Dim3 {
  int64_t d, h, w;
  constexpr int64_t volume() const { return d * h * w; }
};

struct ConvGeometry {
  int64_t n, c;  // samples, input channels
  Dim3 in;       // input D, H, W
  int64_t k;     // output channels
  Dim3 kernel;   // T, R, S
  Dim3 stride;
  Dim3 padding;
  Dim3 dilation;
  Dim3 out;  // output D', H', W'

  int64_t pixels() const { return n * out.volume(); }        // rows of the implicit GEMM
  int64_t reduction() const { return kernel.volume() * c; }  // its inner dimension
};

// Outputs along one axis; may be <= 0 when the kernel does not fit into the padded input.
constexpr int64_t conv_out_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                                int64_t dilation) {
  const int64_t span = in + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

struct ConvArgs {
  ConvGeometry g;
  DType dtype;           // of x, residual and y
  const void* x;         // [N, D, H, W, C]
  const void* weight;    // packed for the kernel that runs
  const float* bias;     // [K]
  const void* residual;  // [N, D', H', W', K] or null
  void* y;               // [N, D', H', W', K]
  Activation activation;
};

struct PoolArgs {
  int64_t n, c;
  Dim3 in, kernel, stride, padding, out;
  DType dtype;
  const void* x;  // [N, D, H, W, C]
  void* y;        // [N, D', H', W', C]
};

struct HeadArgs {
  int64_t n, c, pixels, classes;
  DType dtype;         // of x, weight, bias and y
  const void* x;       // [N, pixels, C]
  const void* weight;  // [classes, C]
  const void* bias;    // [classes] or null
  void* y;             // [N, classes]
};

}  // namespace r3d
