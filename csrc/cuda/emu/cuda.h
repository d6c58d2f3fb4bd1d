// CUDA's names, as far as the kernels use them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (::r3d::emu::Machine::get().thread_index())
#define blockIdx (::r3d::emu::Machine::get().block_index)
#define blockDim (::r3d::emu::Machine::get().block_size)
#define gridDim (::r3d::emu::Machine::get().grid_size)

using dim3 = r3d::emu::Dim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline void __syncthreads() { r3d::emu::Machine::get().sync_block(); }

inline void __syncwarp(unsigned mask = ~0u) {
  const uint64_t nothing = 0;
  r3d::emu::Machine::get().exchange(mask, &nothing, 1);
}

namespace r3d::emu {

// The value that lane `source` gave. A lane outside of the segment of `width` lanes gets its own.
template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>,
                "a lane gives at most eight bytes in one shuffle");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  auto all = Machine::get().exchange(mask, &word, 1);
  const int lane = Machine::get().lane();
  if (source / width != lane / width || source < 0) source = lane;
  if (!(mask >> source & 1)) throw std::runtime_error("a shuffle reads a lane that its mask leaves out");
  std::memcpy(&value, &all[source][0], sizeof value);
  return value;
}

}  // namespace r3d::emu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = r3d::emu::Machine::get().lane();
  return r3d::emu::shuffle(mask, value, lane / width * width + source % width, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  return r3d::emu::shuffle(mask, value, r3d::emu::Machine::get().lane() ^ flip, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return r3d::emu::shuffle(mask, value, r3d::emu::Machine::get().lane() + int(by), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return r3d::emu::shuffle(mask, value, r3d::emu::Machine::get().lane() - int(by), width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t word = predicate != 0;
  auto all = r3d::emu::Machine::get().exchange(mask, &word, 1);
  unsigned votes = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) votes |= unsigned(all[i][0]) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

#define R3D_SHARED(type, name, extents)     \
  static const char name##_site = 0;        \
  using name##_t = type extents;            \
  name##_t& name = *static_cast<name##_t*>( \
      ::r3d::emu::Machine::get().shared(&name##_site, sizeof(name##_t), alignof(name##_t)))

#define R3D_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), ::r3d::emu::launch((grid), (block), [&] { (kernel)(__VA_ARGS__); }))

namespace r3d::emu {

inline std::string& last_error() {
  static thread_local std::string text;
  return text;
}

// As on the GPU, a launch reports what went wrong through launch_error().
inline void launch(Dim grid, Dim block, const std::function<void()>& body) {
  try {
    Machine::get().launch(grid, block, body);
  } catch (const std::exception& e) {
    last_error() = e.what();
  }
}

}  // namespace r3d::emu

namespace r3d::cuda {

// The text of the last launch's error, or null. It holds until the next error.
inline const char* launch_error() {
  static thread_local std::string text;
  text = std::exchange(emu::last_error(), {});
  return text.empty() ? nullptr : text.c_str();
}

inline int multiprocessors() { return emu::settings().multiprocessors; }

}  // namespace r3d::cuda
