// Tensor maps, the descriptors that TMA copies by: checked and encoded here and nowhere else. The driver's
// encoders are fetched at run time, so that nothing links against libcuda and the library loads where there
// is no driver.
#pragma once

#include <cstdint>

#ifdef R3D_EMU
#include "emu/hopper.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace r3d::cuda {

#ifdef R3D_EMU
using TensorMap = emu::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Two-byte elements, 128-byte swizzle, zeros outside of the bounds. The innermost axis comes first.
struct Tiled {
  int rank;
  const void* base;
  int64_t size[5];
  int64_t stride[5];  // bytes; [0] is the element's own
  int box[5];
};

struct Im2col {
  const void* base;
  int64_t size[5];         // C, W, H, D, N
  int64_t stride[5];       // bytes
  int lower[3], upper[3];  // corners of the box of pixels, W, H, D; the order that CUTLASS uses
  int step[3];             // the convolution's stride, W, H, D
  int channels, pixels;    // of one load
};

namespace detail {

// What the driver would answer with CUDA_ERROR_INVALID_VALUE alone.
inline const char* check(int rank, const void* base, const int64_t* size, const int64_t* stride) {
  if (reinterpret_cast<uintptr_t>(base) % 16)
    return "a tensor map wants an address of a multiple of 16 bytes";
  for (int i = 0; i < rank; i++) {
    if (size[i] < 1 || size[i] > int64_t(1) << 32) return "a tensor map wants sizes from 1 to 2^32";
    if (i && (stride[i] % 16 || stride[i] >= int64_t(1) << 40))
      return "a tensor map wants strides of a multiple of 16 bytes below 2^40";
  }
  return nullptr;
}

inline const char* check(const Tiled& t) {
  if (const char* error = check(t.rank, t.base, t.size, t.stride)) return error;
  for (int i = 0; i < t.rank; i++)
    if (t.box[i] < 1 || t.box[i] > 256) return "a tensor map wants boxes from 1 to 256";
  return t.box[0] * 2 > 128 ? "a tensor map with 128-byte swizzle wants at most 128 bytes in a row" : nullptr;
}

inline const char* check(const Im2col& t) {
  if (const char* error = check(5, t.base, t.size, t.stride)) return error;
  for (int i = 0; i < 3; i++) {
    if (t.lower[i] < -16 || t.lower[i] > 15 || t.upper[i] < -16 || t.upper[i] > 15)
      return "a tensor map of rank 5 wants corners from -16 to 15";
    if (t.step[i] < 1 || t.step[i] > 8) return "a tensor map wants steps from 1 to 8";
  }
  if (t.pixels < 1 || t.pixels > 1024) return "a tensor map wants 1 to 1024 pixels";
  return t.channels * 2 > 128 ? "a tensor map with 128-byte swizzle wants at most 128 bytes a pixel"
                              : nullptr;
}

#ifndef R3D_EMU
template <class Function>
const char* entry_point(const char* name, Function** function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult state{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &state);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &state);
#endif
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  if (state != cudaDriverEntryPointSuccess || !found)
    return "the driver is too old for tensor maps: CUDA 12.0 at least";
  *function = reinterpret_cast<Function*>(found);
  return nullptr;
}

struct Driver {
  decltype(cuTensorMapEncodeTiled)* tiled = nullptr;
  decltype(cuTensorMapEncodeIm2col)* im2col = nullptr;
  int version = 0;
  const char* error = nullptr;

  Driver() {
    error = entry_point("cuTensorMapEncodeTiled", &tiled);
    if (!error) error = entry_point("cuTensorMapEncodeIm2col", &im2col);
    if (!error && cudaDriverGetVersion(&version) != cudaSuccess)
      error = "the driver does not tell its version";
  }

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }
};

// Drivers up to 13.1 set a bit that makes GPUs after Hopper, which ignores it, fill what is out of bounds
// wrongly in tensors below 128 KiB. CUTLASS and Triton clear it too.
inline void clear_wrong_bit(TensorMap* map, int64_t bytes, int driver_version) {
  if (driver_version <= 13010 && bytes < 128 << 10)
    reinterpret_cast<uint64_t*>(map)[1] &= ~(uint64_t(1) << 21);
}

// Sizes and strides as the driver takes them.
struct Extents {
  cuuint64_t size[5], stride[4];
  Extents(int rank, const int64_t* sizes, const int64_t* strides) {
    for (int i = 0; i < rank; i++) size[i] = cuuint64_t(sizes[i]);
    for (int i = 1; i < rank; i++) stride[i - 1] = cuuint64_t(strides[i]);
  }
};
#endif

}  // namespace detail

inline const char* encode(TensorMap* map, const Tiled& t) {
  if (const char* error = detail::check(t)) return error;
#ifdef R3D_EMU
  *map = emu::TensorMap{};
  map->rank = t.rank;
  map->base = static_cast<char*>(const_cast<void*>(t.base));
  for (int i = 0; i < t.rank; i++)
    map->size[i] = t.size[i], map->stride[i] = t.stride[i], map->box[i] = t.box[i];
#else
  const detail::Driver& driver = detail::Driver::get();
  if (driver.error) return driver.error;
  const detail::Extents e(t.rank, t.size, t.stride);
  cuuint32_t box[5], one[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < t.rank; i++) box[i] = cuuint32_t(t.box[i]);
  // The copies do not look at the elements: bfloat16 stands for float16 too.
  const CUresult result =
      driver.tiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(t.rank), const_cast<void*>(t.base),
                   e.size, e.stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "cuTensorMapEncodeTiled refuses";
  detail::clear_wrong_bit(map, t.stride[t.rank - 1] * t.size[t.rank - 1], driver.version);
#endif
  return nullptr;
}

inline const char* encode(TensorMap* map, const Im2col& t) {
  if (const char* error = detail::check(t)) return error;
#ifdef R3D_EMU
  *map = emu::TensorMap{};
  map->rank = 5;
  map->im2col = true;
  map->base = static_cast<char*>(const_cast<void*>(t.base));
  for (int i = 0; i < 5; i++) map->size[i] = t.size[i], map->stride[i] = t.stride[i];
  for (int i = 0; i < 3; i++)
    map->lower[i] = t.lower[i], map->upper[i] = t.upper[i], map->step[i] = t.step[i];
  map->box[0] = t.channels;
  map->box[1] = t.pixels;
#else
  const detail::Driver& driver = detail::Driver::get();
  if (driver.error) return driver.error;
  const detail::Extents e(5, t.size, t.stride);
  const cuuint32_t step[5] = {1, cuuint32_t(t.step[0]), cuuint32_t(t.step[1]), cuuint32_t(t.step[2]), 1};
  const CUresult result = driver.im2col(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, const_cast<void*>(t.base), e.size, e.stride, t.lower, t.upper,
      cuuint32_t(t.channels), cuuint32_t(t.pixels), step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "cuTensorMapEncodeIm2col refuses";
  detail::clear_wrong_bit(map, t.stride[4] * t.size[4], driver.version);
#endif
  return nullptr;
}

}  // namespace r3d::cuda
