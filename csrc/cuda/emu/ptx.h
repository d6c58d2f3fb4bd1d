// The functions of ../ptx.cuh in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace r3d::cuda {

inline float bf16_to_float(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;  // what cvt.rn gives for every NaN
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 0) return std::copysign(std::ldexp(float(mantissa), -24), sign ? -1.f : 1.f);
  const uint32_t word = sign | (exponent == 31 ? 0xffu << 23 : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t float_to_f16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  // Below 2^-14 the step is constant. nearbyint rounds to nearest even, as the hardware does.
  if (magnitude < 6.103515625e-5f)
    return uint16_t(sign + uint16_t(std::nearbyint(std::ldexp(magnitude, 24))));
  uint32_t word;
  std::memcpy(&word, &magnitude, 4);
  word += 0xfff + (word >> 13 & 1);  // a carry runs on into the exponent
  return uint16_t(sign | ((word >> 13) - (112u << 10)));
}

inline uint32_t pack_bf16x2(float low, float high) {
  return uint32_t(float_to_bf16(high)) << 16 | float_to_bf16(low);
}
inline uint32_t pack_f16x2(float low, float high) {
  return uint32_t(float_to_f16(high)) << 16 | float_to_f16(low);
}

template <class Load>
uint32_t max_of_halves(uint32_t a, uint32_t b, Load load) {
  uint32_t larger = 0;
  for (int shift : {0, 16}) {
    const uint16_t left = uint16_t(a >> shift), right = uint16_t(b >> shift);
    const float l = load(left), r = load(right);
    const bool nan = std::isnan(l) || std::isnan(r);
    const uint16_t more = l == r ? left & right : l > r ? left : right;  // +0 is more than -0
    larger |= uint32_t(nan ? 0x7fff : more) << shift;
  }
  return larger;
}
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) { return max_of_halves(a, b, bf16_to_float); }
inline uint32_t max_f16x2(uint32_t a, uint32_t b) { return max_of_halves(a, b, f16_to_float); }

}  // namespace r3d::cuda
