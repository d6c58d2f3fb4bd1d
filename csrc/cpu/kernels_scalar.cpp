// Plain C++ for every processor: vectors of four floats, which compilers map to SSE2, NEON, ... or plain
// code.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
// What -O3 adds costs these kernels a tenth of their speed, and the compiler half as much time again. Not
// where sanitizers ask for less than this.
#pragma GCC optimize("O2")
#endif
#include "kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace r3d::cpu::scalar {

struct V {
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kPanelVectors = 2, kDirectVectors = 2;
  static constexpr int max_rows(int nv) { return nv == 2 ? 4 : 6; }
  static constexpr int direct_rows(int nv) { return max_rows(nv); }
  static constexpr bool last_in_memory(int, int) { return false; }
  static constexpr int kTurnTile = 0, kTurnVectors = 0;  // too few registers to turn weights beside products

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
  static inline Reg max_number(Reg v, Reg m) {
    for (int i = 0; i < 4; ++i) m[i] = v[i] > m[i] ? v[i] : m[i];
    return m;
  }
  typedef int Flags __attribute__((vector_size(16)));
  static inline Flags no_flags() { return Flags{}; }
  static inline Flags nan_flags(Reg v) { return v != v; }
  static inline Flags either(Flags a, Flags b) { return a | b; }
  static inline Reg nan_where(Flags f, Reg v) {
    for (int i = 0; i < 4; ++i) v[i] = f[i] ? __builtin_nanf("") : v[i];
    return v;
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
  static inline void transpose(Reg (&r)[4]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const float v = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = v;
      }
  }
};

#include "conv3d_kernel.inl"
#include "lanes.inl"
#include "pool_kernel.inl"
#include "stem_kernel.inl"
#include "tiles_kernel.inl"
#include "winograd_kernel.inl"

// The tile unit in plain loops: slow, and there so that its kernel can be tested on any processor.
struct PlainTiles {
  using V = scalar::V;

  struct File {
    alignas(64) unsigned char tile[8][16][64];
  };
  static File& file() {
    static thread_local File f;
    return f;
  }
  static void configure() {}
  static void release() {}

  template <int T>
  static void zero() {
    __builtin_memset(file().tile[T], 0, 1024);
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i)
      __builtin_memcpy(file().tile[T][i], static_cast<const char*>(from) + i * stride, 64);
  }
  template <int T>
  static void store(float* to, int64_t stride) {
    for (int i = 0; i < 16; ++i)
      __builtin_memcpy(reinterpret_cast<char*>(to) + i * stride, file().tile[T][i], 64);
  }
  // Even and odd products are summed apart and join the accumulator once, as the hardware does.
  template <int C, int A, int B>
  static void dot() {
    uint16_t a[16][32], b[16][32];
    float c[16][16];
    __builtin_memcpy(a, file().tile[A], 1024);
    __builtin_memcpy(b, file().tile[B], 1024);
    __builtin_memcpy(c, file().tile[C], 1024);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float even = 0, odd = 0;
        for (int k = 0; k < 16; ++k) {
          even += widen(a[i][2 * k]) * widen(b[k][2 * j]);
          odd += widen(a[i][2 * k + 1]) * widen(b[k][2 * j + 1]);
        }
        c[i][j] += even + odd;
      }
    __builtin_memcpy(file().tile[C], c, 1024);
  }

  static float widen(float v) { return v; }
  static float widen(uint16_t v) { return V::from_bits(static_cast<uint32_t>(v) << 16); }

  // The last slice holds what is left of the others.
  template <int SL>
  static void split_part(V::Reg v, uint16_t* to, int64_t slice, int n) {
    for (int i = 0; i < n; ++i) {
      float rest = v[i];
      for (int s = 0; s < SL; ++s) {
        const uint16_t h = V::to_bf16(rest);
        to[s * slice + i] = h;
        rest -= widen(h);
      }
    }
  }
  template <int SL>
  static void split(V::Reg v, uint16_t* to, int64_t slice) {
    split_part<SL>(v, to, slice, V::kLanes);
  }
  template <int SL, bool kExact>
  static void pairs(const float* even, const float* odd, uint16_t* to, int64_t slice) {
    for (int i = 0; i < 16; ++i) {
      split_part<SL>(V::set(even[i]), to + 2 * i, slice, 1);
      split_part<SL>(V::set(odd[i]), to + 2 * i + 1, slice, 1);
    }
  }
  static void transpose_pairs(const void* from, int64_t stride, int rows, uint16_t* out) {
    for (int p = 0; p < 16; ++p)
      for (int i = 0; i < 16; ++i)
        for (int q = 0; q < 2; ++q)
          out[p * 32 + 2 * i + q] = i < rows ? static_cast<const uint16_t*>(from)[i * stride + 2 * p + q] : 0;
  }
  template <class W>
  static void columns(const W* from, int64_t stride, int rows, int64_t count, float* out, int64_t next) {
    for (int64_t c = 0; c < count; ++c)
      for (int i = 0; i < 16; ++i) out[c * next + i] = i < rows ? widen(from[i * stride + c]) : 0.f;
  }
};
}  // namespace r3d::cpu::scalar

R3D_DEFINE_KERNELS(scalar)

namespace r3d::cpu {
void conv3d_tiles_plain(const TilesArgs& args, const TilesView& view, const TilesBlock& block) {
  scalar::run_tiles<scalar::PlainTiles>(args, view, block);
}
}  // namespace r3d::cpu
