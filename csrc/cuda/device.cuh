// What every kernel file includes first. With R3D_EMU the same source is plain C++ and runs on the CPU
// (emu/README.md).
#pragma once

#include <cstdint>

#ifdef R3D_EMU
#include "emu/cuda.h"
#include "emu/ptx.h"
#else
#include <cuda_runtime.h>

#include "ptx.cuh"

// Memory shared by the threads of a block: R3D_SHARED(float, tile, [16][33]);
#define R3D_SHARED(type, name, extents) __shared__ type name extents

#define R3D_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel)<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace r3d::cuda {

// The text of the launch's error, or null. Takes the error off the runtime's hands, so that it is not
// reported twice.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Multiprocessors of the current device; 0 with the error still set where there is none.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return count;
}

}  // namespace r3d::cuda
#endif
