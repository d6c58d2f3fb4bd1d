// Vector policy: sixteen float32 lanes. Included inside the namespace and target options of its user.

struct V {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kPanelVectors = 4, kDirectVectors = 4;
  // 32 registers: MR*NV accumulators, NV weights, one activation
  static constexpr int max_rows(int nv) { return nv == 4 ? 6 : nv == 3 ? 8 : 12; }
  // The direct kernel takes seven rows, because planes of these networks are 7 * 2^n pixels wide; the last
  // vector of weights then stays in memory.
  static constexpr int direct_rows(int nv) { return nv == 4 ? 7 : nv == 3 ? 9 : 14; }
  static constexpr bool last_in_memory(int mr, int nv) { return mr * nv + nv + 1 > 32; }
  // A tile of so many accumulators leaves room for turning weights; panels have so many vectors then.
  static constexpr int kTurnTile = 21, kTurnVectors = 3;

  static inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static inline Reg zero() { return _mm512_setzero_ps(); }
  static inline Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static inline Reg load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static inline void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static inline void store_part(float* p, Reg v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static inline Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static inline Reg set(float v) { return _mm512_set1_ps(v); }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  // the second operand of max is returned for NaN: keep the value there
  static inline Reg relu(Reg v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
  // the second operand is returned for NaN
  static inline Reg max_number(Reg v, Reg m) { return _mm512_max_ps(v, m); }
  using Flags = __mmask16;
  static inline Flags no_flags() { return 0; }
  static inline Flags nan_flags(Reg v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
  static inline Flags either(Flags a, Flags b) { return static_cast<Flags>(a | b); }
  static inline Reg nan_where(Flags f, Reg v) { return _mm512_mask_mov_ps(v, f, set(__builtin_nanf(""))); }
  static inline float sum(Reg v) {
    alignas(64) float t[16];
    _mm512_store_ps(t, v);
    float s[8];
    for (int i = 0; i < 8; ++i) s[i] = t[i] + t[i + 8];
    for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
  }

  static inline Reg widen(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static inline Reg load_bf16(const uint16_t* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Reg load_bf16_part(const uint16_t* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  // round to nearest even; integer arithmetic, because vcvtneps2bf16 flushes subnormals
  static inline __m256i narrow(Reg v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
  }
  static inline void store_bf16(uint16_t* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
  }
  static inline void store_bf16_part(uint16_t* p, Reg v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(v));
  }
  static inline void copy16(uint16_t* to, const uint16_t* from, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    if (i < n) {
      const __mmask32 m = static_cast<__mmask32>((1ull << (n - i)) - 1ull);
      _mm512_mask_storeu_epi16(to + i, m, _mm512_maskz_loadu_epi16(m, from + i));
    }
  }

  static inline __attribute__((always_inline)) void transpose(__m512 (&r)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    for (int i = 0; i < 4; ++i) {  // rows i, i+4, i+8, i+12 hold columns i, i+4, ... of four rows each
      const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88),
                   b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88),
                   d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
      t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }

  // Four floats of each of four rows that lie `row` floats apart, lane by lane.
  static inline __attribute__((always_inline)) Reg four_rows(const float* p, int64_t row) {
    Reg t = _mm512_castps128_ps512(_mm_loadu_ps(p));
    t = _mm512_insertf32x4(t, _mm_loadu_ps(p + 4 * row), 1);
    t = _mm512_insertf32x4(t, _mm_loadu_ps(p + 8 * row), 2);
    return _mm512_insertf32x4(t, _mm_loadu_ps(p + 12 * row), 3);
  }
  // transposes 4x4 blocks of the lanes
  static inline __attribute__((always_inline)) void transpose_lanes(Reg* r) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])),
                  b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1])),
                  c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3])),
                  d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // Columns 0 .. 3 of 16 rows that lie `row` floats apart, with half of the shuffles of a whole transpose.
  static inline __attribute__((always_inline)) void four_columns(const float* p, int64_t row, Reg* r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = four_rows(p + i * row, row);
    transpose_lanes(r);
  }
};
