// Batch norm in inference, folded into one multiply-add per channel, with residual and activation: plain
// structs shared by the CPU kernels, the CUDA kernels, the emulator and the tests. Knows neither torch nor
// Python.
//
//   y[row, c] = act( x[row, c] * scale[c] + shift[c] + residual[row, c] )
//
// A row is one pixel of a channels-last tensor: rows = N*D*H*W. Computed in float32, rounded once when
// stored.
#pragma once

#include <cstdint>

#include "conv3d.h"

namespace r3d {

struct BnActArgs {
  int64_t rows, channels;
  DType dtype;  // of x, residual and y
  Activation activation;
  const void* x;         // [rows, C]
  const float* scale;    // [C]
  const float* shift;    // [C]
  const void* residual;  // [rows, C] or null
  void* y;               // [rows, C]; may be x or residual itself
};

namespace cuda {

// Enqueues the kernel on `stream` (a cudaStream_t) of the current device. Returns null, or what went wrong.
const char* bn_act(const BnActArgs& args, void* stream);

}  // namespace cuda
}  // namespace r3d
