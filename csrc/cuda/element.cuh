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

// 16 bytes of channels, all minus infinity, and the larger of two: NaN wins.
template <class T>
__device__ __forceinline__ uint4 lowest(Pack<T, 8>) {
  return {T::kLowest, T::kLowest, T::kLowest, T::kLowest};
}
__device__ __forceinline__ float4 lowest(Pack<float, 4>) {
  return make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
}
template <class T>
__device__ __forceinline__ void raise(Pack<T, 8>& best, const Pack<T, 8>& v) {
  best.raw = {T::max(best.raw.x, v.raw.x), T::max(best.raw.y, v.raw.y), T::max(best.raw.z, v.raw.z),
              T::max(best.raw.w, v.raw.w)};
}
__device__ __forceinline__ void raise(Pack<float, 4>& best, const Pack<float, 4>& v) {
  float larger[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float a = best.get(i), b = v.get(i);
    larger[i] = b > a || b != b ? b : a;
  }
  best.set(larger);
}

}  // namespace r3d::cuda
