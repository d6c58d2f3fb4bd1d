// The Winograd transforms of one axis, with as few operations as we could find. Included by
// winograd_kernel.inl.

static inline __attribute__((always_inline)) void filter_axis(Axis1, const V::Reg* g, V::Reg* u) {
  u[0] = g[0];
}
static inline __attribute__((always_inline)) void filter_axis(Axis2, const V::Reg* g, V::Reg* u) {
  const V::Reg ends = V::add(g[0], g[2]), half = V::set(.5f);
  u[0] = g[0];
  u[1] = V::mul(V::add(ends, g[1]), half);
  u[2] = V::mul(V::sub(ends, g[1]), half);
  u[3] = g[2];
}
static inline __attribute__((always_inline)) void filter_axis(Axis4, const V::Reg* g, V::Reg* u) {
  constexpr double p = Axis4::p, q = Axis4::q, cp = 1 / (2 * p * p * (p * p - q * q)),
                   cq = 1 / (2 * q * q * (q * q - p * p));
  const V::Reg ep = V::fma(V::set(float(cp * p * p)), g[2], V::mul(V::set(float(cp)), g[0])),
               op = V::mul(V::set(float(cp * p)), g[1]);
  const V::Reg eq = V::fma(V::set(float(cq * q * q)), g[2], V::mul(V::set(float(cq)), g[0])),
               oq = V::mul(V::set(float(cq * q)), g[1]);
  u[0] = V::mul(g[0], V::set(float(1 / (p * p * q * q))));
  u[1] = V::add(ep, op);
  u[2] = V::sub(ep, op);
  u[3] = V::add(eq, oq);
  u[4] = V::sub(eq, oq);
  u[5] = g[2];
}

static inline __attribute__((always_inline)) void filter_axis(Edge2, const V::Reg* g, V::Reg* u) {
  u[0] = g[1];
  u[1] = V::add(g[1], g[2]);
  u[2] = V::add(g[0], g[1]);
}
static inline __attribute__((always_inline)) void filter_axis(Strided2, const V::Reg* g, V::Reg* u) {
  u[0] = g[0];
  u[1] = V::add(g[0], g[2]);
  u[2] = g[2];
  u[3] = g[1];
}
static inline __attribute__((always_inline)) void filter_axis(Strided4, const V::Reg* g, V::Reg* u) {
  constexpr double p = Strided4::p, q = Strided4::q, cp = 1 / (2 * p * (p * p - q * q)),
                   cq = 1 / (2 * q * (q * q - p * p));
  const V::Reg ep = V::mul(V::set(float(cp)), g[0]), eq = V::mul(V::set(float(cq)), g[0]);
  u[0] = V::fma(V::set(float(cp * p)), g[2], ep);
  u[1] = V::sub(V::mul(V::set(float(cp * p)), g[2]), ep);
  u[2] = V::fma(V::set(float(cq * q)), g[2], eq);
  u[3] = V::sub(V::mul(V::set(float(cq * q)), g[2]), eq);
  u[4] = g[2];
  u[5] = g[1];
}

static inline __attribute__((always_inline)) void input_axis(Axis1, const V::Reg* d, V::Reg* v) {
  v[0] = d[0];
}
static inline __attribute__((always_inline)) void input_axis(Axis2, const V::Reg* d, V::Reg* v) {
  v[0] = V::sub(d[0], d[2]);
  v[1] = V::add(d[1], d[2]);
  v[2] = V::sub(d[2], d[1]);
  v[3] = V::sub(d[3], d[1]);
}
static inline __attribute__((always_inline)) void input_axis(Axis4, const V::Reg* d, V::Reg* v) {
  constexpr float p = Axis4::p, q = Axis4::q, pp = p * p, qq = q * q;
  const V::Reg ep = V::fma(V::set(-qq), d[2], d[4]), op = V::fma(V::set(-qq), d[1], d[3]);
  const V::Reg eq = V::fma(V::set(-pp), d[2], d[4]), oq = V::fma(V::set(-pp), d[1], d[3]);
  v[0] = V::fma(V::set(pp * qq), d[0], V::fma(V::set(-pp - qq), d[2], d[4]));
  v[1] = V::fma(V::set(p), op, ep);
  v[2] = V::fma(V::set(-p), op, ep);
  v[3] = V::fma(V::set(q), oq, eq);
  v[4] = V::fma(V::set(-q), oq, eq);
  v[5] = V::fma(V::set(pp * qq), d[1], V::fma(V::set(-pp - qq), d[3], d[5]));
}

static inline __attribute__((always_inline)) void input_axis(Edge2, const V::Reg* d, V::Reg* v) {
  v[0] = V::sub(d[0], d[1]);
  v[1] = d[1];
  v[2] = d[0];
}
static inline __attribute__((always_inline)) void input_axis(Strided2, const V::Reg* d, V::Reg* v) {
  v[0] = V::sub(d[0], d[2]);
  v[1] = d[2];
  v[2] = V::sub(d[4], d[2]);
  v[3] = d[1];
  v[4] = d[3];
}

static inline __attribute__((always_inline)) void input_axis(Strided4, const V::Reg* d, V::Reg* v) {
  constexpr float p = Strided4::p, q = Strided4::q, pp = p * p, qq = q * q;
  const V::Reg ep = V::fma(V::set(-qq), d[2], d[6]), op = V::fma(V::set(-qq), d[0], d[4]);
  const V::Reg eq = V::fma(V::set(-pp), d[2], d[6]), oq = V::fma(V::set(-pp), d[0], d[4]);
  v[0] = V::fma(V::set(p), op, ep);
  v[1] = V::fma(V::set(-p), op, ep);
  v[2] = V::fma(V::set(q), oq, eq);
  v[3] = V::fma(V::set(-q), oq, eq);
  v[4] = V::fma(V::set(pp * qq), d[0], V::fma(V::set(-pp - qq), d[4], d[8]));
  for (int i = 0; i < 4; ++i) v[5 + i] = d[1 + 2 * i];
}

static inline __attribute__((always_inline)) void output_axis(Axis1, const V::Reg* m, V::Reg* y) {
  y[0] = m[0];
}
static inline __attribute__((always_inline)) void output_axis(Axis2, const V::Reg* m, V::Reg* y) {
  y[0] = V::add(V::add(m[0], m[1]), m[2]);
  y[1] = V::add(V::sub(m[1], m[2]), m[3]);
}
static inline __attribute__((always_inline)) void output_axis(Axis4, const V::Reg* m, V::Reg* y) {
  constexpr float p = Axis4::p, q = Axis4::q;
  const V::Reg sp = V::add(m[1], m[2]), tp = V::sub(m[1], m[2]), sq = V::add(m[3], m[4]),
               tq = V::sub(m[3], m[4]);
  y[0] = V::add(m[0], V::add(sp, sq));
  y[1] = V::fma(V::set(p), tp, V::mul(V::set(q), tq));
  y[2] = V::fma(V::set(p * p), sp, V::mul(V::set(q * q), sq));
  y[3] = V::fma(V::set(p * p * p), tp, V::fma(V::set(q * q * q), tq, m[5]));
}

static inline __attribute__((always_inline)) void output_axis(Strided2, const V::Reg* m, V::Reg* y) {
  y[0] = V::add(V::add(m[0], m[1]), m[3]);
  y[1] = V::add(V::add(m[1], m[2]), m[4]);
}

static inline __attribute__((always_inline)) void output_axis(Strided4, const V::Reg* m, V::Reg* y) {
  constexpr float p = Strided4::p, q = Strided4::q;
  const V::Reg sp = V::add(m[0], m[1]), tp = V::sub(m[0], m[1]), sq = V::add(m[2], m[3]),
               tq = V::sub(m[2], m[3]);
  y[0] = V::add(m[5], V::add(sp, sq));
  y[1] = V::fma(V::set(p), tp, V::fma(V::set(q), tq, m[6]));
  y[2] = V::fma(V::set(p * p), sp, V::fma(V::set(q * q), sq, m[7]));
  y[3] = V::fma(V::set(p * p * p), tp, V::fma(V::set(q * q * q), tq, V::add(m[4], m[8])));
}

// A strided depth axis is transformed plane by plane: what plane `t` of the inputs is the sum of, ...
struct DepthTerms {
  int count, slice[4];
  float factor[4];  // the first is 1
};
static inline DepthTerms depth_terms(Axis1, int) { return {1, {0}, {1}}; }
static inline DepthTerms depth_terms(Strided2, int t) {
  switch (t) {
    case 0:
      return {2, {0, 2}, {1, -1}};
    case 1:
      return {1, {2}, {1}};
    case 2:
      return {2, {4, 2}, {1, -1}};
  }
  return {1, {2 * t - 5}, {1}};
}
static inline DepthTerms depth_terms(Strided4, int t) {
  constexpr float p = Strided4::p, q = Strided4::q, pp = p * p, qq = q * q;
  if (t < 4) {
    const float r = t < 2 ? p : q, ss = t < 2 ? qq : pp, sign = t % 2 ? -1.f : 1.f;
    return {4, {6, 4, 2, 0}, {1, sign * r, -ss, -sign * r * ss}};
  }
  if (t == 4) return {3, {8, 4, 0}, {1, -pp - qq, pp * qq}};
  return {1, {2 * t - 9}, {1}};
}
// ... and what it adds to slice `i` of the outputs.
static constexpr float depth_factor(Axis1, int, int) { return 1.f; }
static constexpr float depth_factor(Strided2, int i, int t) {
  return t >= 3 ? t - 3 == i : t == 1 || t == 2 * i ? 1.f : 0.f;
}
static constexpr float depth_factor(Strided4, int i, int t) {
  if (t >= 5) return t - 5 == i;
  if (t == 4) return i == 3;
  const float r = t < 2 ? Strided4::p : Strided4::q, power = i == 0   ? 1
                                                             : i == 1 ? r
                                                             : i == 2 ? r * r
                                                                      : r * r * r;
  return t % 2 && i % 2 ? -power : power;
}
