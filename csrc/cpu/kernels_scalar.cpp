// Plain C++ for every processor: vectors of four floats, which compilers map to SSE2, NEON, ... or plain
// code.
#include "kernels.h"
#include "parallel.h"

namespace r3d::cpu::scalar {

struct V {
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kPanelVectors = 2;
  static constexpr int max_rows(int nv) { return nv == 2 ? 4 : 6; }

  static inline float from_bits(uint32_t u) {
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  static inline uint16_t to_bf16(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }

  static inline Reg zero() { return Reg{0, 0, 0, 0}; }
  static inline Reg load(const float* p) {
    Reg v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static inline Reg load_part(const float* p, int n) {
    Reg v = zero();
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static inline void store(float* p, Reg v) { __builtin_memcpy(p, &v, 16); }
  static inline void store_part(float* p, Reg v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  static inline Reg broadcast(const float* p) { return Reg{*p, *p, *p, *p}; }
  static inline Reg set(float v) { return Reg{v, v, v, v}; }
  static inline Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static inline Reg add(Reg a, Reg b) { return a + b; }
  static inline Reg sub(Reg a, Reg b) { return a - b; }
  static inline Reg mul(Reg a, Reg b) { return a * b; }
  static inline Reg relu(Reg v) {
    for (int i = 0; i < 4; ++i) v[i] = v[i] < 0.f ? 0.f : v[i];  // NaN stays
    return v;
  }
  static inline Reg pool_max(Reg m, Reg v) {
    for (int i = 0; i < 4; ++i) m[i] = v[i] > m[i] || v[i] != v[i] ? v[i] : m[i];
    return m;
  }
  static inline float sum(Reg v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static inline Reg load_bf16(const uint16_t* p) { return load_bf16_part(p, 4); }
  static inline Reg load_bf16_part(const uint16_t* p, int n) {
    Reg v = zero();
    for (int i = 0; i < n; ++i) v[i] = from_bits(static_cast<uint32_t>(p[i]) << 16);
    return v;
  }
  static inline void store_bf16(uint16_t* p, Reg v) { store_bf16_part(p, v, 4); }
  static inline void store_bf16_part(uint16_t* p, Reg v, int n) {
    for (int i = 0; i < n; ++i) p[i] = to_bf16(v[i]);
  }
  static inline void copy16(uint16_t* to, const uint16_t* from, int64_t n) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(n) * 2);
  }
};

#include "conv3d_kernel.inl"
#include "lanes.inl"
#include "pool_kernel.inl"
#include "winograd_kernel.inl"
}  // namespace r3d::cpu::scalar

R3D_DEFINE_KERNELS(scalar)
