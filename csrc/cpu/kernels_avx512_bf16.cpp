// AVX-512 BF16: products of bfloat16 pairs with float32 accumulation (vdpbf16ps).
#include "kernels.h"

#if R3D_X86
#include <immintrin.h>

#include "parallel.h"

R3D_TARGET_PUSH("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace r3d::cpu::avx512_bf16 {
#include "isa_avx512.inl"

// on the policy V
#include "conv3d_kernel.inl"

struct MathDot {
  using A = uint16_t;
  static constexpr int kStep = 2;
  // n pairs of weights: neighbours in memory, or from two rows.
  static inline __attribute__((always_inline)) V::Reg words(const A* p, int n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(V::first(n), p));
  }
  static inline __attribute__((always_inline)) V::Reg pairs(const A* even, const A* odd, int n) {
    const __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(V::first(n), even));
    const __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(V::first(n), odd));
    return _mm512_castsi512_ps(_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
  // Pairs of the low halves, and of the high halves, of two vectors of words.
  static inline __attribute__((always_inline)) V::Reg low_halves(V::Reg a, V::Reg b) {
    const __m512i lo = _mm512_castps_si512(a), hi = _mm512_slli_epi32(_mm512_castps_si512(b), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, lo, hi));
  }
  static inline __attribute__((always_inline)) V::Reg high_halves(V::Reg a, V::Reg b) {
    const __m512i lo = _mm512_srli_epi32(_mm512_castps_si512(a), 16), hi = _mm512_castps_si512(b);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, lo, hi));
  }
  // Taps [t0, t1) of `channels` input channels for 16 output channels that lie `row` elements apart: pairs of
  // channels, `tap_stride` from tap to tap and `width` from pair to pair. False where there are too few, too
  // many or an even number of taps. Words of two neighbouring taps are turned; as the number of taps is odd,
  // a tap of the next channel lies in the other half of its word.
  static bool turn_pairs(const A* from, int64_t row, int64_t channels, int64_t taps, int64_t t0, int64_t t1,
                         float* out, int64_t width, int64_t tap_stride) {
    const int64_t first = t0 / 2, first_end = (t1 - 1) / 2 + 1, second = (taps + t0) / 2,
                  second_end = (taps + t1 - 1) / 2 + 1;
    if (taps % 2 == 0 || t1 - t0 < 8 || t1 - t0 > 31) return false;
    alignas(64) float turned[2][16][16];
    for (int64_t c = 0; c < channels; c += 2, from += 2 * taps, out += width) {
      const float* p = reinterpret_cast<const float*>(from);
      for (int i = 0; i < 16; ++i) {  // what follows in each row
        const char* next = reinterpret_cast<const char*>(from + i * row + 2 * taps) + 512;
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + 64, 0, 2);
      }
      for (int h = 0; h < 2; ++h) {
        const int64_t begin = h ? second : first, n = (h ? second_end : first_end) - begin;
        for (int64_t w = 0; w < n; w += 4) {
          const int64_t at = w + 4 <= n ? w : n - 4;  // the last ones overlap
          V::Reg r[4];
          V::four_columns(p + begin + at, row / 2, r);
          for (int j = 0; j < 4; ++j) V::store(turned[h][at + j], r[j]);
        }
      }
      float* to = out;
      for (int64_t t = t0; t < t1; ++t, to += tap_stride) {
        const __m512i a = _mm512_load_si512(turned[0][t / 2 - first]),
                      b = _mm512_load_si512(turned[1][(taps + t) / 2 - second]);
        if (t % 2 == 0)
          _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaau, a, b));
        else
          _mm512_storeu_si512(to, _mm512_rol_epi32(_mm512_mask_blend_epi16(0xaaaaaaaau, b, a), 16));
      }
    }
    return true;
  }

  template <int LO, int HI, int MR, int NV>
  static inline __attribute__((always_inline)) void run(V::Reg (&acc)[MR][NV], const A* const* rows,
                                                        int64_t offset, const char* weights, int begin,
                                                        int end) {
    constexpr bool kMemory = V::last_in_memory(HI - LO, NV);
    constexpr int kHeld = kMemory ? NV - 1 : NV;
    const A* a[MR];
    for (int i = LO; i < HI; ++i) a[i] = rows[i] + offset;
    weights += static_cast<int64_t>(begin) * NV * 64;
#pragma GCC unroll 2
    for (int e = begin; e < end; ++e) {
      __m512bh w[NV];
      for (int j = 0; j < kHeld; ++j) w[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights + j * 64));
      const char* last = weights + kHeld * 64;
      for (int i = LO; i < HI; ++i) {
        int pair;
        __builtin_memcpy(&pair, a[i] + 2 * e, 4);
        const __m512bh v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        for (int j = 0; j < kHeld; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], v, w[j]);
        if constexpr (kMemory) {
          forget(last);
          acc[i][kHeld] =
              _mm512_dpbf16_ps(acc[i][kHeld], v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(last)));
        }
      }
      weights += NV * 64;
    }
  }

  // vcvtneps2bf16 rounds as V::narrow does, but for subnormals, which it flushes: those are rare.
  template <int NV>
  static inline __attribute__((always_inline)) void store_row(uint16_t* y, const V::Reg (&v)[NV]) {
    constexpr int kSubnormal = 0x20;
    __mmask16 tiny = 0;
    for (int j = 0; j < NV; ++j) tiny |= _mm512_fpclass_ps_mask(v[j], kSubnormal);
    if (__builtin_expect(tiny != 0, 0)) {
      for (int j = 0; j < NV; ++j) V::store_bf16(y + j * V::kLanes, v[j]);
      return;
    }
    for (int j = 0; j + 1 < NV; j += 2)
      _mm512_storeu_si512(y + j * V::kLanes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[j + 1], v[j])));
    if constexpr (NV % 2 == 1)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + (NV - 1) * V::kLanes),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v[NV - 1])));
  }
};

void conv3d_dot(const ConvArgs& args, const Chunk* chunks, int count, int64_t steps, int max_chunk) {
  run_packed<V, MathDot, uint16_t>(args, chunks, count, steps, max_chunk);
}
void direct_dot(const DirectArgs& args, const Chunk* chunks, int count, int64_t steps, int max_chunk) {
  run_parameter<V, MathDot, uint16_t>(args, chunks, count, steps, max_chunk);
}
int64_t keep_dot(const DirectArgs& args, const Chunk* chunks, int count, int64_t steps, int max_chunk,
                 void* out) {
  return keep_parameter<V, MathDot, uint16_t>(args, chunks, count, steps, max_chunk, out);
}
}  // namespace r3d::cpu::avx512_bf16
R3D_TARGET_POP

namespace r3d::cpu {
void conv3d_dot_avx512_bf16(const ConvArgs& args, const Chunk* chunks, int count, int64_t steps,
                            int max_chunk) {
  avx512_bf16::conv3d_dot(args, chunks, count, steps, max_chunk);
}
void direct_dot_avx512_bf16(const DirectArgs& args, const Chunk* chunks, int count, int64_t steps,
                            int max_chunk) {
  avx512_bf16::direct_dot(args, chunks, count, steps, max_chunk);
}
int64_t keep_dot_avx512_bf16(const DirectArgs& args, const Chunk* chunks, int count, int64_t steps,
                             int max_chunk, void* out) {
  return avx512_bf16::keep_dot(args, chunks, count, steps, max_chunk, out);
}
}  // namespace r3d::cpu
#endif
