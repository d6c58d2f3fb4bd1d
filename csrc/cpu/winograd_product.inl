// The products of one point of a Winograd convolution. Included by winograd_kernel.inl.

// m[MR][NV vectors] (+)= v[MR][steps] * u[steps][NV vectors]. Rows are tiles from `tile` on, ldv floats apart
// in v; after `count` of them the tiles' next point follows. A vector of channels follows the one before
// after `next`. kStream: the weights are fetched past L2, which they would flush; the rows that follow find
// them in L1.
template <int MR, int NV, bool kStream>
static void product(const float* v, int64_t ldv, int64_t next, const float* u, float* m, int tile, int count,
                    int steps, bool first) {
  constexpr int kAhead = 8192 / 4;
  // Whatever touches the sums is unrolled: an index that is not a constant would put them into memory.
  V::Reg acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = V::zero();
  const float* rows[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    rows[i] = v + tile * ldv;
    if (++tile == count) {
      tile = 0;
      v += V::kLanes;
    }
  }
  auto step = [&](int e) __attribute__((always_inline)) {
    V::Reg w[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      if (kStream && j * V::kLanes % 16 == 0) __builtin_prefetch(u + kAhead + j * V::kLanes, 0, 0);
      w[j] = V::load(u + j * V::kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V::Reg a = V::broadcast(rows[i] + e);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = V::fma(a, w[j], acc[i][j]);
    }
    u += NV * V::kLanes;
  };
  for (; steps >= V::kLanes; steps -= V::kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
      __builtin_prefetch(rows[i] + V::kLanes, 0, kStream ? 3 : 2);  // the next point's
#pragma GCC unroll 2
    for (int e = 0; e < V::kLanes; ++e) step(e);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) rows[i] += next;
  }
  for (int e = 0; e < steps; ++e) step(e);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = m + (i * NV + j) * V::kLanes;
      V::store(to, first ? acc[i][j] : V::add(V::load(to), acc[i][j]));
    }
}
using Product = void (*)(const float*, int64_t, int64_t, const float*, float*, int, int, int, bool);
template <int NV, bool kStream>
struct Products {  // for 1 .. max_rows
  Product fn[V::max_rows(NV) + 1];
  constexpr Products() : fn{} { fill<V::max_rows(NV)>(); }
  template <int MR>
  constexpr void fill() {
    fn[MR] = &product<MR, NV, kStream>;
    if constexpr (MR > 1) fill<MR - 1>();
  }
};

// m[point][tile][k] (+)= v[tile][point][c] * u[c][k] over `steps` channels, for `points` of `count` tiles
// each. Pieces of channels are summed one by one: as exact as a direct convolution, which sums in chunks too.
template <int NV>
static void multiply(const float* v, int64_t ldv, int64_t next, const float* u, float* m, int points,
                     int count, int steps, bool first, bool stream) {
  constexpr int kMax = V::max_rows(NV);
  static constexpr Products<NV, true> streaming{};
  static constexpr Products<NV, false> cached{};
  const int rows = points * count;
  for (int i = 0, tile = 0; i < rows;) {
    const int left = rows - i;
    const int mr = left >= 2 * kMax ? kMax : left > kMax ? (left + 1) / 2 : left;
    (stream && i == 0 ? streaming.fn : cached.fn)[mr](v, ldv, next, u, m + i * NV * V::kLanes, tile, count,
                                                      steps, first);
    i += mr;
    for (tile += mr; tile >= count; tile -= count) v += V::kLanes;
  }
}
static void multiply(int vectors, const float* v, int64_t ldv, int64_t next, const float* u, float* m,
                     int points, int count, int steps, bool first, bool stream) {
  constexpr bool kWide = V::kPanelVectors == 4;
  if (kWide && vectors == 4)
    return multiply<kWide ? 4 : 1>(v, ldv, next, u, m, points, count, steps, first, stream);
  if (kWide && vectors == 3)
    return multiply<kWide ? 3 : 1>(v, ldv, next, u, m, points, count, steps, first, stream);
  if (vectors == 2) return multiply<2>(v, ldv, next, u, m, points, count, steps, first, stream);
  multiply<1>(v, ldv, next, u, m, points, count, steps, first, stream);
}
