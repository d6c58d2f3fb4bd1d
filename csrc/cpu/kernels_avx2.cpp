// AVX2 + FMA: eight float32 lanes.
#include "kernels.h"

#if R3D_X86
#include <immintrin.h>

#include "parallel.h"

R3D_TARGET_PUSH("avx2,fma")
namespace r3d::cpu::avx2 {

struct V {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kPanelVectors = 2;
  static constexpr int max_rows(int nv) { return nv == 2 ? 6 : 8; }  // 16 registers
  static constexpr int kDirectVectors = 3;  // four pixels: fewer loads, and lines are 7 * 2^n pixels wide
  static constexpr int direct_rows(int nv) { return nv == 3 ? 4 : nv == 2 ? 6 : 12; }
  static constexpr bool last_in_memory(int, int) { return false; }
  static constexpr int kTurnTile = 0, kTurnVectors = 0;  // too few registers to turn weights beside products

  static inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static inline Reg zero() { return _mm256_setzero_ps(); }
  static inline Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static inline Reg load_part(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static inline void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static inline void store_part(float* p, Reg v, int n) { _mm256_maskstore_ps(p, first(n), v); }
  static inline Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static inline Reg set(float v) { return _mm256_set1_ps(v); }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static inline Reg relu(Reg v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static inline Reg max_number(Reg v, Reg m) { return _mm256_max_ps(v, m); }
  using Flags = Reg;
  static inline Flags no_flags() { return zero(); }
  static inline Flags nan_flags(Reg v) { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }
  static inline Flags either(Flags a, Flags b) { return _mm256_or_ps(a, b); }
  static inline Reg nan_where(Flags f, Reg v) { return _mm256_blendv_ps(v, set(__builtin_nanf("")), f); }
  static inline float sum(Reg v) {
    alignas(32) float t[8];
    _mm256_store_ps(t, v);
    for (int i = 0; i < 4; ++i) t[i] += t[i + 4];
    return (t[0] + t[2]) + (t[1] + t[3]);
  }

  static inline Reg widen(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static inline Reg load_bf16(const uint16_t* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Reg load_bf16_part(const uint16_t* p, int n) {
    alignas(16) uint16_t t[8] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load_bf16(t);
  }
  static inline __m128i narrow(Reg v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  }
  static inline void store_bf16(uint16_t* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v));
  }
  static inline void store_bf16_part(uint16_t* p, Reg v, int n) {
    alignas(16) uint16_t t[8];
    store_bf16(t, v);
    for (int i = 0; i < n; ++i) p[i] = t[i];
  }
  static inline void copy16(uint16_t* to, const uint16_t* from, int64_t n) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(n) * 2);
  }

  static inline __attribute__((always_inline)) void transpose(Reg (&r)[8]) {
    Reg t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
    for (int i = 0; i < 4; ++i) {  // rows i and i+4 hold columns i and i+4 of four rows each
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

#include "conv3d_kernel.inl"
#include "lanes.inl"
#include "pool_kernel.inl"
#include "stem_kernel.inl"
#include "winograd_kernel.inl"
}  // namespace r3d::cpu::avx2
R3D_TARGET_POP

R3D_DEFINE_KERNELS(avx2)
#endif
