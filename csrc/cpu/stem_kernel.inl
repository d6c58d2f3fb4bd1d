// Stems (stem.h), float32 arithmetic. Included like conv3d_kernel.inl, after it and after lanes.inl.
//
// A task takes a tile of output frames and some output rows through three steps in scratch memory that fits
// L2:
//   xt[point][line]         = input transform along depth, padding included
//   sums[point][pixel][k]   = direct convolution of xt with the transformed weights, a group of pixels at a
//   time y                       = output transform of sums, with scale, bias, residual and activation

struct StemRuns {
  int64_t runs, steps, pitch, chunk;
};

// runs * weights for MR pixels and NV vectors of output channels. Every loop over them is unrolled by force:
// one that is not keeps the accumulators in memory.
template <int MR, int NV>
static void stem_tile(const float* const* at, const float* b, const StemRuns& r, float* sums) {
  V::Reg acc[MR][NV];
  const float* a[MR];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) a[i] = at[i];
  const int64_t steps = r.steps, pitch = r.pitch;
  for (int64_t run = 0; run < r.runs;) {
    const int64_t first = run, end = r.runs - run < r.chunk ? r.runs : run + r.chunk;
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = V::zero();
    for (; run < end; ++run) {
      for (int64_t e = 0; e < steps; ++e) {
        V::Reg w[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) w[j] = V::load(b + j * V::kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < MR; ++i) {
          const V::Reg v = V::broadcast(a[i] + e);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i][j] = V::fma(v, w[j], acc[i][j]);
        }
        b += NV * V::kLanes;
      }
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) a[i] += pitch;
    }
    if (first)
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = V::add(V::load(sums + (i * NV + j) * V::kLanes), acc[i][j]);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) V::store(sums + (i * NV + j) * V::kLanes, acc[i][j]);
  }
}

// stem_tile for 1 .. MAX pixels
template <int NV, int MAX>
struct StemTiles {
  void (*fn[MAX + 1])(const float* const*, const float*, const StemRuns&, float*);
  constexpr StemTiles() : fn{} { fill<MAX>(); }
  template <int MR>
  constexpr void fill() {
    fn[MR] = &stem_tile<MR, NV>;
    if constexpr (MR > 1) fill<MR - 1>();
  }
};

// The transforms of tile F for a vector of pixels or channels.
template <class F>
static inline __attribute__((always_inline)) void stem_input(const V::Reg* d, V::Reg* out) {
  if constexpr (F::a == 1) {
    out[0] = d[0];
  } else {
    constexpr int a = F::a, pairs = F::mats.pairs;
    V::Reg zero = V::mul(V::set(float(F::mats.all[0])), d[0]), last = V::zero();
    if constexpr (a % 2 == 0) last = V::mul(V::set(float(F::mats.all[0])), d[1]);
#pragma GCC unroll 6
    for (int i = 1; i <= pairs; ++i) {
      const V::Reg c = V::set(float(F::mats.all[i]));
      zero = V::fma(c, d[2 * i], zero);
      if constexpr (a % 2 == 0) last = V::fma(c, d[2 * i + 1], last);
    }
    out[0] = zero;
    if constexpr (a % 2 == 0) out[a - 1] = last;
#pragma GCC unroll 6
    for (int q = 0; q < pairs; ++q) {
      V::Reg even = V::mul(V::set(float(F::mats.but[q][0])), d[2]),
             odd = V::mul(V::set(float(F::mats.but[q][0])), d[1]);
#pragma GCC unroll 6
      for (int i = 1; i < pairs; ++i) {
        const V::Reg c = V::set(float(F::mats.but[q][i]));
        even = V::fma(c, d[2 * i + 2], even);
        odd = V::fma(c, d[2 * i + 1], odd);
      }
      out[1 + 2 * q] = V::fma(V::set(float(F::mats.p[q])), odd, even);
      out[2 + 2 * q] = V::fma(V::set(float(-F::mats.p[q])), odd, even);
    }
  }
}

template <class F>
static inline __attribute__((always_inline)) void stem_output(const V::Reg* in, V::Reg* out) {
  if constexpr (F::a == 1) {
    out[0] = in[0];
  } else {
    constexpr int a = F::a, m = F::m, pairs = F::mats.pairs;
    V::Reg sum[pairs], difference[pairs];
#pragma GCC unroll 6
    for (int q = 0; q < pairs; ++q) {
      sum[q] = V::add(in[1 + 2 * q], in[2 + 2 * q]);
      difference[q] = V::sub(in[1 + 2 * q], in[2 + 2 * q]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      V::Reg v = i == 0 ? in[0] : i == m - 1 && a % 2 == 0 ? in[a - 1] : V::zero();
#pragma GCC unroll 6
      for (int q = 0; q < pairs; ++q) {
        const V::Reg& t = i % 2 ? difference[q] : sum[q];
        v = i == 0 ? V::add(v, t) : V::fma(V::set(float(F::mats.power[i][q])), t, v);
      }
      out[i] = v;
    }
  }
}

// Height in tiles of M output rows: with a stride of 2, seven rows are four taps on the even input rows and
// three on the odd ones. Products are in the order of the even tile, then of the odd one.
template <int M>
struct StemRows {
  using Even = StemTile<M, 4>;
  using Odd = StemTile<M, 3>;
  static constexpr int points = StemRowTile<M>::points;
  static_assert(points == Even::a + Odd::a);

  // `floats` of each product to `to`, `step` apart, from input rows `row` apart.
  static void input(const float* x, int64_t row, float* to, int64_t step, int64_t floats) {
    for_vectors(floats, [&](int64_t i, int lanes) {
      V::Reg d[Even::a], out[Even::a];
      for (int j = 0; j < Even::a; ++j) d[j] = load_lanes(x + 2 * j * row + i, lanes);
      stem_input<Even>(d, out);
      for (int p = 0; p < Even::a; ++p) store_lanes(to + p * step + i, out[p], lanes);
      for (int j = 0; j < Odd::a; ++j) d[j] = load_lanes(x + (2 * j + 1) * row + i, lanes);
      stem_input<Odd>(d, out);
      for (int p = 0; p < Odd::a; ++p) store_lanes(to + (Even::a + p) * step + i, out[p], lanes);
    });
  }

  // `floats` (whole vectors) of M rows, `next_row` apart, from sums of products `next` apart.
  static void output(const float* sums, int64_t next, int64_t floats, float* rows, int64_t next_row) {
    for (int64_t i = 0; i < floats; i += V::kLanes) {
      V::Reg in[Even::a], even[M], odd[M];
      for (int p = 0; p < Even::a; ++p) in[p] = V::load(sums + p * next + i);
      stem_output<Even>(in, even);
      for (int p = 0; p < Odd::a; ++p) in[p] = V::load(sums + (Even::a + p) * next + i);
      stem_output<Odd>(in, odd);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) V::store(rows + r * next_row + i, V::add(even[r], odd[r]));
    }
  }
};

template <class F, class T>
struct Stem {
  static constexpr int a = F::a, m = F::m;
  static constexpr int64_t kGroup = 48;     // pixels whose sums wait for the output transform
  static constexpr int64_t kRowGroup = 28;  // those of a row of tiles
  static constexpr int64_t kPanel = V::kPanelVectors * V::kLanes;
  const StemArgs& args;
  const ConvGeometry& g;
  const StemPlan& plan;
  const float* weights;

  static int64_t odd_lines(int64_t floats) {
    return (floats + 15) / 16 % 2 ? (floats + 15) / 16 * 16 : (floats + 31) / 16 * 16;
  }

  // xt of input rows [row0, row0 + rows) for the outputs from frame d0.
  void input(int64_t n, int64_t d0, int64_t row0, int64_t rows, float* xt, int64_t next,
             const T* zeros) const {
    const int64_t line = ((g.out.w - 1) * g.stride.w + g.kernel.w) * plan.inner, width = g.in.w * plan.inner;
    const int64_t pad = g.padding.w * plan.inner, left = pad < line ? pad : line;
    const int64_t count = width < line - left ? width : line - left;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < plan.lines; ++l) {
        float* to = xt + (r * plan.lines + l) * plan.pitch;
        const int64_t ih = row0 + r;
        if (ih < 0 || ih >= g.in.h) {
          for (int p = 0; p < a; ++p) fill_zero(to + p * next, plan.pitch);
          continue;
        }
        const int64_t phase = args.planes ? l / g.c : l, c = args.planes ? l % g.c : 0;
        const T* x = static_cast<const T*>(args.conv.x) + n * args.x_n + c * args.x_c + ih * args.x_h;
        const T* frames[a];
        for (int j = 0; j < a; ++j) {
          const int64_t id = (d0 + j) * g.stride.d + phase - g.padding.d;
          frames[j] = id >= 0 && id < g.in.d ? x + id * args.x_d : zeros;
        }
        for (int p = 0; p < a; ++p) {
          fill_zero(to + p * next, left);
          fill_zero(to + p * next + left + count, plan.pitch - left - count);
        }
        float* inside = to + left;
        for_vectors(count, [&](int64_t i, int lanes) {
          V::Reg d[a], out[a];
          for (int j = 0; j < a; ++j) d[j] = load_lanes(frames[j] + i, lanes);
          stem_input<F>(d, out);
          for (int p = 0; p < a; ++p) store_lanes(inside + p * next + i, out[p], lanes);
        });
      }
  }

  template <int NV>
  static void multiply_by(const StemRuns& r, int points, const float* const* at, int64_t count,
                          const float* u, float* sums, int64_t next_x, int64_t next_sums) {
    constexpr int kMax = V::max_rows(NV);
    static constexpr StemTiles<NV, kMax> tiles{};
    const float* pixels[kGroup];
    for (int p = 0; p < points; ++p, u += r.runs * r.steps * NV * V::kLanes) {
      for (int64_t i = 0; i < count; ++i) pixels[i] = at[i] + p * next_x;
      for (int64_t i = 0; i < count;) {
        const int64_t rest = count - i;
        const int64_t mr = rest >= 2 * kMax ? kMax : rest > kMax ? (rest + 1) / 2 : rest;
        tiles.fn[mr](pixels + i, u, r, sums + p * next_sums + i * NV * V::kLanes);
        i += mr;
      }
    }
  }

  // sums[p] of `vectors` vectors of channels = at[p] * u[p], for each of `points`.
  static void multiply(int vectors, const StemRuns& r, int points, const float* const* at, int64_t count,
                       const float* u, float* sums, int64_t next_x, int64_t next_sums) {
    if (V::kPanelVectors == 4 && vectors == 4)
      multiply_by<V::kPanelVectors == 4 ? 4 : 1>(r, points, at, count, u, sums, next_x, next_sums);
    else if (V::kPanelVectors == 4 && vectors == 3)
      multiply_by<V::kPanelVectors == 4 ? 3 : 1>(r, points, at, count, u, sums, next_x, next_sums);
    else if (vectors == 2)
      multiply_by<2>(r, points, at, count, u, sums, next_x, next_sums);
    else
      multiply_by<1>(r, points, at, count, u, sums, next_x, next_sums);
  }

  // y of pixels [pixel, pixel + count) of `frames` frames from d0 on; output channels k to k + valid.
  void output(int64_t n, int64_t d0, int frames, int64_t pixel, int64_t count, int64_t k, int64_t valid,
              const float* sums, int64_t width, int64_t next) const {
    const int64_t frame = g.out.h * g.out.w * g.k;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (n * g.out.d + d0) * frame + (pixel + i) * g.k + k;
      for_vectors(valid, [&](int64_t j, int lanes) {
        V::Reg in[a], out[m];
        const float* from = sums + i * width + j;
        for (int p = 0; p < a; ++p) in[p] = V::load(from + p * next);
        stem_output<F>(in, out);
        const V::Reg bias = load_lanes(args.conv.bias + k + j, lanes);
        const V::Reg scale = args.scale ? load_lanes(args.scale + k + j, lanes) : V::set(1.f);
#pragma GCC unroll 8
        for (int f = 0; f < m; ++f) {
          if (f >= frames) break;
          const int64_t o = at + f * frame + j;
          V::Reg v = V::fma(out[f], scale, bias);
          if (args.conv.residual)
            v = V::add(v, load_lanes(static_cast<const T*>(args.conv.residual) + o, lanes));
          if (args.conv.activation == Activation::kRelu) v = V::relu(v);
          store_lanes(static_cast<T*>(args.conv.y) + o, v, lanes);
        }
      });
    }
  }

  void block(int64_t n, int64_t d0, int64_t h0, int64_t rows) const {
    const int64_t most_rows = (plan.rows - 1) * g.stride.h + g.kernel.h;
    const int64_t next_x = odd_lines(most_rows * plan.lines * plan.pitch),
                  next_sums = odd_lines(kGroup * kPanel);
    float* xt = static_cast<float*>(
        scratch(1, a * next_x * 4 + g.in.w * plan.inner * static_cast<int64_t>(sizeof(T))));
    T* zeros = reinterpret_cast<T*>(xt + a * next_x);
    fill_zero(zeros, g.in.w * plan.inner);
    float* sums = static_cast<float*>(scratch(2, a * next_sums * 4));
    input(n, d0, h0 * g.stride.h - g.padding.h, (rows - 1) * g.stride.h + g.kernel.h, xt, next_x, zeros);
    const int frames = static_cast<int>(g.out.d - d0 < m ? g.out.d - d0 : m);
    const StemRuns r{plan.runs, plan.steps, plan.pitch, plan.chunk};
    for (int64_t k = 0; k < g.k; k += kPanel) {
      const int64_t left = g.k - k, valid = left < kPanel ? left : kPanel;
      const int vectors = static_cast<int>((valid + V::kLanes - 1) / V::kLanes);
      const float* u = weights + k * a * plan.runs * plan.steps;
      for (int64_t i0 = 0; i0 < rows * g.out.w; i0 += kGroup) {
        const int64_t rest = rows * g.out.w - i0, count = rest < kGroup ? rest : kGroup;
        const float* at[kGroup];
        for (int64_t i = 0; i < count; ++i)
          at[i] = xt + (i0 + i) / g.out.w * g.stride.h * plan.lines * plan.pitch +
                  (i0 + i) % g.out.w * g.stride.w * plan.inner;
        multiply(vectors, r, a, at, count, u, sums, next_x, next_sums);
        output(n, d0, frames, h0 * g.out.w + i0, count, k, valid, sums, vectors * V::kLanes, next_sums);
      }
    }
  }

  // As block, with fewer multiplications along height too. Of each group of pixels in a row of tiles, product
  // after product along depth: rows[product][line], sums[product][pixel][k], and both transforms of height.
  template <int M>
  void row_block(int64_t n, int64_t d0, int64_t h0, int64_t rows) const {
    using Rows = StemRows<M>;
    const int64_t tiles = (rows + M - 1) / M, most_tiles = (plan.rows + M - 1) / M,
                  line = plan.lines * plan.pitch;
    const int64_t next_x = odd_lines((2 * M * most_tiles + 5) * line);
    float* xt = static_cast<float*>(
        scratch(1, a * next_x * 4 + g.in.w * plan.inner * static_cast<int64_t>(sizeof(T))));
    T* zeros = reinterpret_cast<T*>(xt + a * next_x);
    fill_zero(zeros, g.in.w * plan.inner);
    const int64_t groups = (g.out.w + kRowGroup - 1) / kRowGroup, most = (g.out.w + groups - 1) / groups;
    const int64_t pixel = g.stride.w * plan.inner, pitch = ((most - 1) * pixel + plan.steps + 15) / 16 * 16;
    const int64_t next_row = plan.lines * pitch, next_product = odd_lines(most * kPanel);
    float* in_rows = static_cast<float*>(
        scratch(2, 4 * (Rows::points * (next_row + next_product) + a * M * next_product)));
    float *products = in_rows + Rows::points * next_row, *sums = products + Rows::points * next_product;
    input(n, d0, h0 * 2 - g.padding.h, 2 * M * tiles + 5, xt, next_x, zeros);
    const int frames = static_cast<int>(g.out.d - d0 < m ? g.out.d - d0 : m);
    const StemRuns r{plan.lines, plan.steps, pitch, plan.lines};
    const int64_t u_product = plan.lines * plan.steps;
    for (int64_t k = 0; k < g.k; k += kPanel) {
      const int64_t left = g.k - k, valid = left < kPanel ? left : kPanel;
      const int vectors = static_cast<int>((valid + V::kLanes - 1) / V::kLanes);
      const int64_t width = vectors * V::kLanes;
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t i0 = 0; i0 < g.out.w; i0 += most) {
          const int64_t count = g.out.w - i0 < most ? g.out.w - i0 : most;
          const float* at[kGroup];
          for (int64_t i = 0; i < count; ++i) at[i] = in_rows + i * pixel;
          for (int p = 0; p < a; ++p) {
            const float* x = xt + p * next_x + t * 2 * M * line + i0 * pixel;
            for (int64_t l = 0; l < plan.lines; ++l)
              Rows::input(x + l * plan.pitch, line, in_rows + l * pitch, next_row,
                          (count - 1) * pixel + plan.steps);
            multiply(vectors, r, Rows::points, at, count,
                     weights + (k * a + p * width) * Rows::points * u_product, products, next_row,
                     next_product);
            Rows::output(products, next_product, count * width, sums + p * M * next_product, next_product);
          }
          for (int i = 0; i < M; ++i) {
            const int64_t oh = h0 + t * M + i;
            if (oh < g.out.h)
              output(n, d0, frames, oh * g.out.w + i0, count, k, valid, sums + i * next_product, width,
                     M * next_product);
          }
        }
    }
  }

  void run() const {
    const int64_t tiles = (g.out.d + m - 1) / m, blocks = (g.out.h + plan.rows - 1) / plan.rows;
    parallel_for(g.n * tiles * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t h0 = task % blocks * plan.rows, d0 = task / blocks % tiles * m;
        const int64_t left = g.out.h - h0;
        const int64_t n = task / blocks / tiles, rows = left < plan.rows ? left : plan.rows;
        if (args.row_tile == 4)
          row_block<4>(n, d0, h0, rows);
        else if (args.row_tile == 2)
          row_block<2>(n, d0, h0, rows);
        else
          block(n, d0, h0, rows);
      }
    });
  }
};

template <class T>
static void stem_typed(const StemArgs& args) {
  const StemPlan plan = plan_stem(args, thread_pool().threads());
  constexpr int kPanel = V::kPanelVectors * V::kLanes;
  float* weights = static_cast<float*>(scratch(0, stem_weights_bytes(args, plan, V::kLanes)));
  stem_weights(args, plan, V::kLanes, kPanel, weights);
  const int64_t taps = stem_taps(args.conv.g);
#define R3D_STEM_TILE(M, R) \
  if (args.tile == M && taps == R) return Stem<StemTile<M, R>, T>{args, args.conv.g, plan, weights}.run();
  R3D_STEM_TILES(R3D_STEM_TILE)
#undef R3D_STEM_TILE
}

static void stem_any(const StemArgs& args) {
  args.conv.dtype == DType::kBFloat16 ? stem_typed<uint16_t>(args) : stem_typed<float>(args);
}
