// How the three storage types become float32 and back, alone and 16 bytes at a time.
#pragma once

#include "device.cuh"

namespace r3d::cuda {

struct BFloat16 {
  uint16_t bits;
  static __device__ __forceinline__ float load(uint16_t v) { return bf16_to_float(v); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bf16x2(low, high); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return max_bf16x2(a, b); }
  static constexpr uint32_t kLowest = 0xff80ff80;  // twice minus infinity
};

struct Float16 {
  uint16_t bits;
  static __device__ __forceinline__ float load(uint16_t v) { return f16_to_float(v); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_f16x2(low, high); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return max_f16x2(a, b); }
  static constexpr uint32_t kLowest = 0xfc00fc00;
};

// N neighbouring elements, as they lie in memory: one load, one store.
template <class T, int N>
struct Pack;

template <>
struct Pack<float, 1> {
  float raw;
  __device__ __forceinline__ float get(int) const { return raw; }
  __device__ __forceinline__ void set(const float (&v)[1]) { raw = v[0]; }
};

template <>
struct Pack<float, 4> {
  float4 raw;
  __device__ __forceinline__ float get(int i) const {
    return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
  }
  __device__ __forceinline__ void set(const float (&v)[4]) { raw = make_float4(v[0], v[1], v[2], v[3]); }
};

template <class T>
struct Pack<T, 1> {
  uint16_t raw;
  __device__ __forceinline__ float get(int) const { return T::load(raw); }
  __device__ __forceinline__ void set(const float (&v)[1]) { raw = uint16_t(T::pack(v[0], 0.f)); }
};

template <class T>
struct Pack<T, 8> {
  uint4 raw;
  __device__ __forceinline__ float get(int i) const {
    const uint32_t word = i < 2   ? raw.x
                          : i < 4 ? raw.y
                          : i < 6 ? raw.z
                                  : raw.w;  // i is a constant after unrolling
    return T::load(uint16_t(i % 2 ? word >> 16 : word));
  }
  __device__ __forceinline__ void set(const float (&v)[8]) {
    raw = make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7]));
  }
};

}  // namespace r3d::cuda
