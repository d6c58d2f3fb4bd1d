// AMX: tiles of bfloat16 products (tdpbf16ps), with AVX-512 around them.
#include "kernels.h"
#include "tiles.h"

#if R3D_X86
#include <immintrin.h>

#include "parallel.h"

R3D_TARGET_PUSH("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")
namespace r3d::cpu::amx {
#include "isa_avx512.inl"

// on the policy V
#include "lanes.inl"
#include "tiles_kernel.inl"

struct Tiles {
  using V = amx::V;

  // Written as instructions: compilers' intrinsics want literal tile numbers, which templates cannot give
  // them. palette 1: tiles of 16 rows of 64 bytes
  static void configure() {
    alignas(64) struct {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { asm volatile("tilerelease"); }

  template <int T>
  static inline __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" ::"n"(T));
  }
  template <int T>
  static inline __attribute__((always_inline)) void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "n"(T) : "memory");
  }
  template <int T>
  static inline __attribute__((always_inline)) void store(float* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "n"(T) : "memory");
  }
  template <int C, int A, int B>
  static inline __attribute__((always_inline)) void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(C), "n"(A), "n"(B));
  }

  static inline float widen(float v) { return v; }
  static inline float widen(uint16_t v) {
    const uint32_t u = static_cast<uint32_t>(v) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }

  // Rounded to a bfloat16 by magnitude, still as a float32: x - high(x) is exact.
  static inline __m512 high(__m512 v) {
    const __m512i u = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_epi32(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static inline __m512i shifted(__m512 v) { return _mm512_srli_epi32(_mm512_castps_si512(v), 16); }
  static inline __m256i upper(__m512 v) { return _mm512_cvtepi32_epi16(shifted(v)); }

  template <int SL>
  static inline __attribute__((always_inline)) void slices(__m512 v, __m256i (&out)[SL]) {
    if constexpr (SL == 1) {
      out[0] = V::narrow(v);
    } else {
      const __m512 a = high(v), rest = _mm512_sub_ps(v, a);
      out[0] = upper(a);
      if constexpr (SL == 2) {
        out[1] = V::narrow(rest);
      } else {
        const __m512 b = high(rest);
        out[1] = upper(b);
        out[2] = upper(_mm512_sub_ps(rest, b));  // eight bits are left: exact
      }
    }
  }
  template <int SL>
  static inline __attribute__((always_inline)) void split(__m512 v, uint16_t* to, int64_t slice) {
    __m256i out[SL];
    slices<SL>(v, out);
    for (int s = 0; s < SL; ++s) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + s * slice), out[s]);
  }
  template <int SL>
  static inline void split_part(__m512 v, uint16_t* to, int64_t slice, int n) {
    __m256i out[SL];
    slices<SL>(v, out);
    for (int s = 0; s < SL; ++s) _mm256_mask_storeu_epi16(to + s * slice, V::first(n), out[s]);
  }

  // Interleaves 16 even and 16 odd channels as the tile unit wants its second operand. kExact: all are
  // bfloat16.
  template <int SL, bool kExact>
  static inline __attribute__((always_inline)) void pairs(const float* even, const float* odd, uint16_t* to,
                                                          int64_t slice) {
    __m512 e = _mm512_loadu_ps(even), o = _mm512_loadu_ps(odd);
    auto put = [&](int s, __m512 a, __m512 b) {
      _mm512_storeu_si512(to + s * slice,
                          _mm512_mask_blend_epi16(0xaaaaaaaau, shifted(a), _mm512_castps_si512(b)));
    };
    if constexpr (SL == 1) {
      kExact ? put(0, e, o) : put(0, rounded(e), rounded(o));
    } else {
      const __m512 he = high(e), ho = high(o);
      put(0, he, ho);
      e = _mm512_sub_ps(e, he);
      o = _mm512_sub_ps(o, ho);
      if constexpr (SL == 2) {
        put(1, rounded(e), rounded(o));
      } else {
        const __m512 me = high(e), mo = high(o);
        put(1, me, mo);
        put(2, _mm512_sub_ps(e, me), _mm512_sub_ps(o, mo));
      }
    }
  }
  static inline __m512 rounded(__m512 v) { return V::widen(V::narrow(v)); }

  static inline __m512 load_row(const float* from, int n) {
    return n == 16 ? _mm512_loadu_ps(from) : V::load_part(from, n);
  }
  static inline __m512 load_row(const uint16_t* from, int n) {
    return n == 16 ? V::load_bf16(from) : V::load_bf16_part(from, n);
  }

  // out[column * next + row] = from[row * stride + column], 16 rows of which `rows` exist.
  template <class W>
  static void columns(const W* from, int64_t stride, int rows, int64_t count, float* out, int64_t next) {
    for (int64_t c = 0; c < count; c += 16) {
      const int n = count - c < 16 ? static_cast<int>(count - c) : 16;
      __m512 r[16];
      for (int i = 0; i < 16; ++i) r[i] = i < rows ? load_row(from + i * stride + c, n) : _mm512_setzero_ps();
      V::transpose(r);
      if (n == 16)
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + (c + i) * next, r[i]);
      else
        for (int i = 0; i < n; ++i) _mm512_storeu_ps(out + (c + i) * next, r[i]);
    }
  }

  // A tile of weights from 16 rows (of which `rows` exist) of 32 bfloat16 channels: pairs become rows.
  static void transpose_pairs(const void* from, int64_t stride, int rows, uint16_t* out) {
    __m512 r[16];
    for (int i = 0; i < 16; ++i)
      r[i] =
          i < rows ? _mm512_loadu_ps(static_cast<const uint16_t*>(from) + i * stride) : _mm512_setzero_ps();
    V::transpose(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * 32, r[i]);
  }
};

void conv3d(const TilesArgs& args, const TilesView& view, const TilesBlock& block) {
  run_tiles<Tiles>(args, view, block);
}
}  // namespace r3d::cpu::amx
R3D_TARGET_POP

namespace r3d::cpu {
void conv3d_tiles_amx(const TilesArgs& args, const TilesView& view, const TilesBlock& block) {
  amx::conv3d(args, view, block);
}
}  // namespace r3d::cpu
#endif
