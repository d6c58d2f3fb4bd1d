// Scalar conversions between the storage types; bfloat16 is its bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace r3d::cpu {

inline double widen(float v) { return v; }
inline double widen(double v) { return v; }
inline double widen(uint16_t bf16) {
  const uint32_t u = static_cast<uint32_t>(bf16) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace r3d::cpu
