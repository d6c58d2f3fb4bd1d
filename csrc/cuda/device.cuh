// What every kernel file includes first. With R3D_EMU the same source is plain C++ and runs on the CPU
// (emu/README.md).
#pragma once

#include <cstdint>

#ifdef R3D_EMU
#include "emu/cuda.h"
#include "emu/ptx.h"
#else
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>

#include "ptx.cuh"

// Memory shared by the threads of a block: R3D_SHARED(float, tile, [16][33]);
#define R3D_SHARED(type, name, extents) __shared__ type name extents

#define R3D_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel)<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace r3d::cuda {

// What a kernel raises while it runs, so that no launch can be refused with it: the call that finds it may be
// another kernel's, and every later one finds it too.
inline bool raised_while_running(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

// The text of the launch's error, or null; holds until the thread's next one. Takes the error off the
// runtime's hands, so that it is not reported twice.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return nullptr;
  if (!raised_while_running(error)) return cudaGetErrorString(error);
  static thread_local char text[256];
  std::snprintf(
      text, sizeof text,
      "%s, in this kernel or in one before it (CUDA_LAUNCH_BLOCKING=1 tells which); this process cannot use "
      "the GPU any more",
      cudaGetErrorString(error));
  return text;
}

// Multiprocessors of the current device; 0 with the error still set where there is none.
inline int multiprocessors() {
  static std::atomic<int> known[64];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < 64 && (count = known[device].load(std::memory_order_relaxed))) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  if (device < 64) known[device].store(count, std::memory_order_relaxed);
  return count;
}

}  // namespace r3d::cuda
#endif
