// The kernel of tiles.h over a policy P: eight tiles of 16 rows x 64 bytes, and a vector policy P::V (float32
// lanes). Included inside the namespace and target options of its user.

// Where an output row of a tile goes: the first of up to 2x2 output pixels, and how many of them exist.
struct TileRow {
  int64_t pixel;  // -1: no output
  int32_t d, h;
};

struct TilesGeometry {
  int64_t n0, n1, d0, d1, h0, h1;                       // samples and units of the block
  int64_t span_d, span_h;                               // positions of one phase
  int64_t row;                                          // elements of a scratch row
  int64_t sample, phase_h, phase_d, point, slice, end;  // strides in elements, and the end of all of it
};

template <class P>
struct TilesTask {
  using V = typename P::V;
  static constexpr int kMaxPoints =
      24;  // rows that one scratch row is made of: points, or a group of kernel rows

  const TilesArgs& args;
  const ConvGeometry& g;
  const TilesView& p;
  const int points;

  TilesTask(const TilesArgs& a, const TilesView& view)
      : args(a), g(a.conv.g), p(view), points(view.d.points * view.h.points) {}

  // ---- pixels ----

  // Splits n float32 or bfloat16 values into SL slices.
  template <int SL, class T>
  static void split_run(const T* from, int64_t n, uint16_t* to, int64_t slice) {
    if constexpr (sizeof(T) == 2) {
      V::copy16(to, from, n);
    } else {
      int64_t i = 0;
      for (; i + V::kLanes <= n; i += V::kLanes) P::template split<SL>(V::load(from + i), to + i, slice);
      if (i < n) {
        const int rest = static_cast<int>(n - i);
        P::template split_part<SL>(V::load_part(from + i, rest), to + i, slice, rest);
      }
    }
  }

  template <int SL>
  static void zero_run(uint16_t* to, int64_t n, int64_t slice) {
    for (int s = 0; s < SL; ++s) __builtin_memset(to + s * slice, 0, static_cast<std::size_t>(n) * 2);
  }

  // BT d of F(2, 3) and F(4, 3), with the points of winograd.h
  static inline __attribute__((always_inline)) void forward(const typename V::Reg (&d)[4],
                                                            typename V::Reg (&m)[4]) {
    m[0] = V::sub(d[0], d[2]);
    m[1] = V::add(d[1], d[2]);
    m[2] = V::sub(d[2], d[1]);
    m[3] = V::sub(d[3], d[1]);
  }
  static inline __attribute__((always_inline)) void forward(const typename V::Reg (&d)[6],
                                                            typename V::Reg (&m)[6]) {
    const auto c = [](float v) { return V::set(v); };
    const auto a = V::sub(d[3], d[1]);  // shared: 1.5 (d3 - d1)
    m[0] = V::fma(c(1.5f), a, V::fma(c(-2.f), d[2], V::add(d[0], d[4])));
    m[5] = V::fma(c(1.5f), V::sub(d[4], d[2]), V::fma(c(-2.f), d[3], V::add(d[1], d[5])));
    m[1] = V::fma(c(.5f), d[2], V::fma(c(2.5f), d[3], V::sub(d[4], d[1])));
    m[2] = V::fma(c(-2.5f), d[2], V::fma(c(.5f), d[3], V::add(d[1], d[4])));
    m[3] = V::fma(c(2.f), a, V::sub(d[4], d[2]));
    m[4] = V::fma(c(-.5f), a, V::sub(d[4], d[2]));
  }
  static inline __attribute__((always_inline)) void forward(const typename V::Reg (&d)[1],
                                                            typename V::Reg (&m)[1]) {
    m[0] = d[0];
  }

  template <class T>
  static typename V::Reg load_or_zero(const T* row, int64_t i, int n) {
    return row ? load_lanes(row + i, n) : V::zero();
  }

  // Transforms AD x AH rows (null: outside the input) of n elements into as many points.
  template <int SL, int AD, int AH, class T>
  static void transform_run(const T* const* rows, int64_t n, uint16_t* to, int64_t point, int64_t slice) {
    using Reg = typename V::Reg;
    for (int64_t i = 0; i < n; i += V::kLanes) {
      const int lanes = n - i < V::kLanes ? static_cast<int>(n - i) : V::kLanes;
      Reg v[AD][AH];
      for (int a = 0; a < AD; ++a) {
        Reg d[AH];
        for (int b = 0; b < AH; ++b) d[b] = load_or_zero(rows[a * AH + b], i, lanes);
        forward(d, v[a]);
      }
      for (int b = 0; b < AH; ++b) {
        Reg d[AD], m[AD];
        for (int a = 0; a < AD; ++a) d[a] = v[a][b];
        forward(d, m);
        for (int a = 0; a < AD; ++a) {
          uint16_t* o = to + (a * AH + b) * point + i;
          if (lanes == V::kLanes)
            P::template split<SL>(m[a], o, slice);
          else
            P::template split_part<SL>(m[a], o, slice, lanes);
        }
      }
    }
  }

  // One scratch row of every point and slice, from the AD x AH (or, in groups, p.group) input rows that it
  // needs.
  template <int SL, class T>
  void scratch_row(const T* const* rows, uint16_t* to, const TilesGeometry& b, const TilesChunk& chunk,
                   uint16_t* line) const {
    const int ad = p.d.points, ah = p.h.points;
    const int64_t c = g.c, row = b.row;
    if (p.group > 1) {  // [w][row of the group][c]
      const int64_t left = g.padding.w, width = row / p.pixel;
      const int64_t count = width - left < g.in.w ? width - left : g.in.w;
      zero_run<SL>(to, row, b.slice);
      if (count <= 0) return;
      const int64_t n = count * c;
      for (int j = 0; j < p.group; ++j) {
        if (!rows[j]) continue;
        split_run<SL>(rows[j], n, line, n);
        for (int s = 0; s < SL; ++s) {
          const uint16_t* from = line + s * n;
          uint16_t* o = to + s * b.slice + left * p.pixel + j * c;
          if (c == 3) {
            for (int64_t w = 0; w < count; ++w, from += 3, o += p.pixel) {
              o[0] = from[0];
              o[1] = from[1];
              o[2] = from[2];
            }
          } else {
            for (int64_t w = 0; w < count; ++w, from += c, o += p.pixel)
              for (int64_t e = 0; e < c; ++e) o[e] = from[e];
          }
        }
      }
      return;
    }
    if (p.picks || p.width < c) {  // pixel by pixel
      const int64_t stride = p.picks ? g.stride.w : 1, n = chunk.c1 - chunk.c0, pixels = row / p.width;
      for (int64_t w = 0; w < pixels; ++w) {
        const int64_t iw = w * stride - g.padding.w;
        const bool inside = iw >= 0 && iw < g.in.w;
        const T* at[kMaxPoints];
        for (int i = 0; i < ad * ah; ++i) at[i] = inside && rows[i] ? rows[i] + iw * c + chunk.c0 : nullptr;
        run<SL>(at, n, to + w * p.width, b);
        if (n < p.width)
          for (int i = 0; i < points; ++i)
            zero_run<SL>(to + i * b.point + w * p.width + n, p.width - n, b.slice);
      }
      return;
    }
    const int64_t left = g.padding.w * c < row ? g.padding.w * c : row;
    const int64_t n = g.in.w * c < row - left ? g.in.w * c : row - left;
    for (int i = 0; i < points; ++i) {
      zero_run<SL>(to + i * b.point, left, b.slice);
      zero_run<SL>(to + i * b.point + left + n, row - left - n, b.slice);
    }
    run<SL>(rows, n, to + left, b);
  }

  template <int SL, class T>
  void run(const T* const* rows, int64_t n, uint16_t* to, const TilesGeometry& b) const {
    const int ad = p.d.points, ah = p.h.points;
    if (ad == 6 && ah == 4)
      transform_run<SL, 6, 4>(rows, n, to, b.point, b.slice);
    else if (ad == 6)
      transform_run<SL, 6, 1>(rows, n, to, b.point, b.slice);
    else if (ad == 4 && ah == 4)
      transform_run<SL, 4, 4>(rows, n, to, b.point, b.slice);
    else if (ad == 4)
      transform_run<SL, 4, 1>(rows, n, to, b.point, b.slice);
    else if (ah == 6)
      transform_run<SL, 1, 6>(rows, n, to, b.point, b.slice);
    else if (ah == 4)
      transform_run<SL, 1, 4>(rows, n, to, b.point, b.slice);
    else if (rows[0])
      split_run<SL>(rows[0], n, to, b.slice);
    else
      zero_run<SL>(to, n, b.slice);
  }

  template <int SL, class T>
  void fill(uint16_t* scratch_pixels, const TilesGeometry& b, const TilesChunk& chunk, uint16_t* line) const {
    const T* x = static_cast<const T*>(args.conv.x);
    const int64_t line_elements = g.in.w * g.c;
    for (int pd = 0; pd < p.d.phases; ++pd)
      for (int ph = 0; ph < p.h.phases; ++ph)
        for (int64_t n = b.n0; n < b.n1; ++n)
          for (int64_t i = 0; i < b.span_d; ++i)
            for (int64_t j = 0; j < b.span_h; ++j) {
              const T* rows[kMaxPoints];
              // a tile reads `points` neighbours, a group its kernel rows, anything else one row
              const int ad = p.d.points, ah = p.group > 1 ? p.group : p.h.points;
              const int64_t step = p.group > 1 ? g.dilation.h : 1;
              const int64_t id0 = (b.d0 + i) * p.d.outputs * g.stride.d + p.d.phase[pd] - g.padding.d;
              const int64_t ih0 = (b.h0 + j) * p.h.outputs * g.stride.h + p.h.phase[ph] - g.padding.h;
              for (int a = 0; a < ad; ++a)
                for (int r = 0; r < ah; ++r) {
                  const int64_t id = id0 + a, ih = ih0 + r * step;
                  const bool inside = id >= 0 && id < g.in.d && ih >= 0 && ih < g.in.h;
                  rows[a * ah + r] = inside ? x + ((n * g.in.d + id) * g.in.h + ih) * line_elements : nullptr;
                }
              uint16_t* to = scratch_pixels + pd * b.phase_d + ph * b.phase_h + (n - b.n0) * b.sample +
                             (i * b.span_h + j) * b.row;
              scratch_row<SL>(rows, to, b, chunk, line);
            }
    // read by the last rows' steps, times zero weights or for outputs that do not exist
    __builtin_memset(scratch_pixels + SL * b.slice, 0, static_cast<std::size_t>(b.end - SL * b.slice) * 2);
  }

  // ---- weights ----

  // G g of F(2, 3) or F(4, 3), 16 values each; out: N vectors, `stride` floats apart.
  template <int N>
  static inline __attribute__((always_inline)) void spread(const float* g, int64_t next, float* out,
                                                           int64_t stride) {
    for (int i = 0; i < 16; i += V::kLanes) {
      const auto a = V::load(g + i), b = V::load(g + next + i), c = V::load(g + 2 * next + i);
      auto put = [&](int j, typename V::Reg v) { V::store(out + j * stride + i, v); };
      put(0, a);
      put(N - 1, c);
      if constexpr (N == 4) {
        const auto even = V::mul(V::add(a, c), V::set(.5f)), odd = V::mul(b, V::set(.5f));
        put(1, V::add(even, odd));
        put(2, V::sub(even, odd));
      } else {
        const auto even = V::mul(V::add(a, c), V::set(1.f / 3)), odd = V::mul(b, V::set(1.f / 3));
        put(1, V::add(even, odd));
        put(2, V::sub(odd, even));
        // (4 a + 2 b + c) * -4/15 and (a - 2 b + 4 c) / 15
        put(3, V::mul(V::fma(V::set(4.f), a, V::fma(V::set(2.f), b, c)), V::set(-4.f / 15)));
        put(4, V::mul(V::fma(V::set(4.f), c, V::fma(V::set(-2.f), b, a)), V::set(1.f / 15)));
      }
    }
  }

  // The points of one (channel, s) from its taps [T*R*S][16], at one tap `other` of the axis that stays as it
  // is: out[point][16].
  template <int PD, int PH>
  static inline __attribute__((always_inline)) void spread_taps(const float* at, int64_t row, int64_t plane,
                                                                int64_t other, float* out) {
    if constexpr (PD == 1) {
      spread<PH>(at + other * plane, row, out, 16);
    } else if constexpr (PH == 1) {
      spread<PD>(at + other * row, plane, out, 16);
    } else {
      alignas(64) float half_way[PD * 48];
      for (int r = 0; r < 3; ++r) spread<PD>(at + r * row, plane, half_way + r * 16, 48);
      for (int i = 0; i < PD; ++i) spread<PH>(half_way + i * 48, 16, out + i * PH * 16, 16);
    }
  }

  // Tiles of a chunk for nt*16 output channels from k: [point][step][slice][nt][16 pairs][16 channels][2].
  template <int SL, class W>
  void panel(int64_t k, int nt, const TilesChunk& chunk, uint16_t* out, float* columns) const {
    const int64_t taps = g.kernel.volume(), filter = g.c * taps;
    const int64_t slice = nt * 512, step_size = SL * slice, point_size = chunk.count * step_size;
    const W* weight = static_cast<const W*>(args.conv.weight) + k * filter;
    const int pd = p.d.points, ph = p.h.points;
    const auto channels =
        pd == 6   ? ph == 4 ? &TilesTask::channel_tiles<SL, 6, 4, W> : &TilesTask::channel_tiles<SL, 6, 1, W>
        : pd == 4 ? ph == 4 ? &TilesTask::channel_tiles<SL, 4, 4, W> : &TilesTask::channel_tiles<SL, 4, 1, W>
        : ph == 6 ? &TilesTask::channel_tiles<SL, 1, 6, W>
        : ph == 4 ? &TilesTask::channel_tiles<SL, 1, 4, W>
                  : &TilesTask::channel_tiles<SL, 1, 1, W>;
    if (p.merged || (chunk.c1 - chunk.c0) % 32 != 0)
      __builtin_memset(out, 0, static_cast<std::size_t>(points * point_size) * 2);
    for (int kt = 0; kt < nt; ++kt) {
      const W* w = weight + kt * 16 * filter;
      const int valid = g.k - k - kt * 16 < 16 ? static_cast<int>(g.k - k - kt * 16) : 16;
      uint16_t* tile = out + kt * 512;
      if (p.merged)
        merged_tiles<SL>(w, valid, tile, slice, step_size);
      else
        (this->*channels)(w, valid, chunk, tile, slice, step_size, point_size, columns);
    }
  }

  template <int SL, class W>
  void merged_tiles(const W* w, int valid, uint16_t* tile, int64_t slice, int64_t step_size) const {
    const int64_t taps = g.kernel.volume(), filter = g.c * taps, len = g.kernel.w * p.pixel;
    const int64_t steps = p.padded / 32;
    alignas(64) float pair[2][16];
    for (int64_t td = 0; td < p.d.taps; ++td)
      for (int64_t th = 0; th < p.h.taps; ++th)
        for (int64_t e = 0; e < len; e += 2) {
          const int64_t t = p.d.tap[td].index, rg = p.h.tap[th].index;
          for (int q = 0; q < 2; ++q) {
            const int64_t s = (e + q) / p.pixel, j = (e + q) / g.c % p.group, c = (e + q) % g.c;
            const int64_t r = rg * p.group + j;
            const bool real = e + q < len && r < g.kernel.h;
            const int64_t tap = (t * g.kernel.h + r) * g.kernel.w + s;
            const int64_t at = args.weight_channels_last ? tap * g.c + c : c * taps + tap;
            for (int i = 0; i < 16; ++i) pair[q][i] = real && i < valid ? P::widen(w[i * filter + at]) : 0.f;
          }
          uint16_t* step = tile + ((td * p.h.taps + th) * steps + e / 32) * step_size;
          P::template pairs<SL, sizeof(W) == 2>(pair[0], pair[1], step + e % 32 / 2 * 32, slice);
        }
  }

  template <int SL, int PD, int PH, class W>
  void channel_tiles(const W* w, int valid, const TilesChunk& chunk, uint16_t* tile, int64_t slice,
                     int64_t step_size, int64_t point_size, float* columns) const {
    const int64_t taps = g.kernel.volume(), filter = g.c * taps;
    const int64_t blocks = (chunk.c1 - chunk.c0 + 31) / 32, ks = g.kernel.w;
    const int64_t together = channels_together();
    alignas(64) static constexpr float kNone[16] = {};
    if (PD == 1 && PH == 1 && args.weight_channels_last) {  // tap by tap, channels as they lie
      const int64_t width = chunk.c1 - chunk.c0;
      for (int64_t td = 0; td < p.d.taps; ++td)
        for (int64_t th = 0; th < p.h.taps; ++th)
          for (int64_t s = 0; s < ks; ++s) {
            const int64_t tap = (p.d.tap[td].index * g.kernel.h + p.h.tap[th].index) * ks + s;
            const W* from = w + tap * g.c + chunk.c0;
            for (int64_t block = 0; block < blocks; ++block) {
              const int64_t n = width - block * 32 < 32 ? width - block * 32 : 32;
              uint16_t* o = tile + (((td * p.h.taps + th) * blocks + block) * ks + s) * step_size;
              if (SL == 1 && sizeof(W) == 2 && n == 32) {
                P::transpose_pairs(from + block * 32, filter, valid, o);
                continue;
              }
              P::columns(from + block * 32, filter, valid, n, columns, 16);
              for (int64_t c = 0; c < n; c += 2)
                P::template pairs<SL, sizeof(W) == 2>(
                    columns + c * 16, c + 1 < n ? columns + c * 16 + 16 : kNone, o + c * 16, slice);
            }
          }
      return;
    }
    for (int64_t c0 = chunk.c0; c0 < chunk.c1; c0 += together) {
      const int64_t count = chunk.c1 - c0 < together ? chunk.c1 - c0 : together;
      if (args.weight_channels_last) {
        for (int64_t tap = 0; tap < taps; ++tap)
          P::columns(w + tap * g.c + c0, filter, valid, count, columns + tap * 16, taps * 16);
      } else {
        for (int i = 0; i < valid;
             ++i)  // the next channels: sixteen places at once are too many for the hardware
          for (int64_t e = 0; e < count * taps; e += 64 / static_cast<int64_t>(sizeof(W)))
            __builtin_prefetch(w + (c0 + count) * taps + i * filter + e, 0, 2);
        P::columns(w + c0 * taps, filter, valid, count * taps, columns, 16);
      }
      for (int64_t c = 0; c < count; c += 2) {
        const float* even = columns + c * taps * 16;
        const float* odd = c + 1 < count ? even + taps * 16 : nullptr;
        const int64_t at = c0 + c - chunk.c0, block = at / 32, pair = at % 32 / 2 * 32;
        if constexpr (PD == 1 && PH == 1) {
          for (int64_t td = 0; td < p.d.taps; ++td)
            for (int64_t th = 0; th < p.h.taps; ++th) {
              uint16_t* o = tile + ((td * p.h.taps + th) * blocks + block) * ks * step_size + pair;
              const int64_t tap = (p.d.tap[td].index * g.kernel.h + p.h.tap[th].index) * ks;
              for (int64_t s = 0; s < ks; ++s, o += step_size)
                P::template pairs<SL, sizeof(W) == 2>(even + (tap + s) * 16,
                                                      odd ? odd + (tap + s) * 16 : kNone, o, slice);
            }
        } else {
          constexpr int kPoints = PD * PH;
          alignas(64) float spread_even[kPoints * 16], spread_odd[kPoints * 16] = {};
          const int64_t others = p.d.taps * p.h.taps, row = ks * 16, plane = g.kernel.h * row;
          for (int64_t other = 0; other < others; ++other) {
            const int64_t tap = (PD == 1 ? p.d : p.h).tap[other].index;
            for (int64_t s = 0; s < ks; ++s) {
              spread_taps<PD, PH>(even + s * 16, row, plane, tap, spread_even);
              if (odd) spread_taps<PD, PH>(odd + s * 16, row, plane, tap, spread_odd);
              uint16_t* o = tile + ((other * blocks + block) * ks + s) * step_size + pair;
              for (int i = 0; i < kPoints; ++i, o += point_size)
                P::template pairs<SL, false>(spread_even + i * 16, spread_odd + i * 16, o, slice);
            }
          }
        }
      }
    }
  }

  // Channels whose taps are transposed at once: an even number, about 28 KiB of columns.
  int64_t channels_together() const {
    const int64_t fit = 448 / g.kernel.volume() / 2 * 2;
    return fit < 2 ? 2 : fit > 16 ? 16 : fit;
  }

  // ---- products ----

  // Where MT tiles of pixels start; stride from row to row and distance between slices.
  struct Pixels {
    const uint16_t* at[3];
    int64_t stride, slice;  // bytes, elements
  };

  // sums[i][j] (tile 2*i + j) += pixels[i] * weights[j] for up to two tiles of pixels, all operands held at
  // once: pixels in 4 and 5, weights in 6 and 7.
  template <int MT, int NT>
  static inline __attribute__((always_inline)) void load_pixels(const Pixels& a, int64_t at) {
    P::template load<4>(a.at[0] + at, a.stride);
    if constexpr (MT == 2) P::template load<5>(a.at[1] + at, a.stride);
  }
  template <int NT>
  static inline __attribute__((always_inline)) void load_weights(const uint16_t* b) {
    P::template load<6>(b, 64);
    if constexpr (NT == 2) P::template load<7>(b + 512, 64);
  }
  template <int MT, int NT>
  static inline __attribute__((always_inline)) void products_held() {
    P::template dot<0, 4, 6>();
    if constexpr (NT == 2) P::template dot<1, 4, 7>();
    if constexpr (MT == 2) P::template dot<2, 5, 6>();
    if constexpr (MT == 2 && NT == 2) P::template dot<3, 5, 7>();
  }

  // The same for three tiles of pixels: one tile of each operand at a time. Sweeps back so that one tile of
  // each operand is still there for the next product: kHavePixels, kHaveWeights and kBack say what the
  // product before has left.
  template <int NT, bool kBack, bool kHavePixels, bool kHaveWeights>
  static inline __attribute__((always_inline)) void product_of_three(const Pixels& a, int64_t at,
                                                                     const uint16_t* b) {
    constexpr int kFirst = NT == 2 && kBack ? 1 : 0, kSecond = 1 - kFirst;
    if constexpr (!kHaveWeights) P::template load<7>(b + kFirst * 512, 64);
    if constexpr (!kHavePixels || NT == 1) P::template load<6>(a.at[0] + at, a.stride);
    P::template dot<kFirst, 6, 7>();
    P::template load<6>(a.at[1] + at, a.stride);
    P::template dot<2 + kFirst, 6, 7>();
    P::template load<6>(a.at[2] + at, a.stride);
    P::template dot<4 + kFirst, 6, 7>();
    if constexpr (NT == 2) {
      P::template load<7>(b + kSecond * 512, 64);
      P::template dot<4 + kSecond, 6, 7>();
      P::template load<6>(a.at[1] + at, a.stride);
      P::template dot<2 + kSecond, 6, 7>();
      P::template load<6>(a.at[0] + at, a.stride);
      P::template dot<kSecond, 6, 7>();
    }
  }

  // The products of one step but the largest one's (x0 * w0), smallest first. kSlice: elements of a slice of
  // weights.
  template <int SL, int MT, int NT>
  static inline __attribute__((always_inline)) void small_products(const Pixels& a, int64_t at,
                                                                   const uint16_t* b) {
    constexpr int64_t kSlice = NT * 512;
    const int64_t middle = at + a.slice, low = at + 2 * a.slice;
    if constexpr (MT == 3) {
      if constexpr (SL == 3) {
        product_of_three<NT, false, false, false>(a, low, b);
        product_of_three<NT, true, false, true>(a, middle, b);
        product_of_three<NT, false, true, false>(a, middle, b + kSlice);
        product_of_three<NT, true, false, true>(a, at, b + kSlice);
        product_of_three<NT, false, true, false>(a, at, b + 2 * kSlice);
      } else {
        product_of_three<NT, false, false, false>(a, middle, b);
        product_of_three<NT, false, false, false>(a, at, b + kSlice);
      }
      return;
    }
    load_weights<NT>(b);
    if constexpr (SL == 3) {
      load_pixels<MT, NT>(a, low);
      products_held<MT, NT>();
    }
    load_pixels<MT, NT>(a, middle);
    products_held<MT, NT>();
    if constexpr (SL == 3) {
      load_weights<NT>(b + kSlice);
      products_held<MT, NT>();
      load_pixels<MT, NT>(a, at);
      products_held<MT, NT>();
      load_weights<NT>(b + 2 * kSlice);
      products_held<MT, NT>();
    } else {
      load_pixels<MT, NT>(a, at);
      load_weights<NT>(b + kSlice);
      products_held<MT, NT>();
    }
  }

  template <int MT, int NT, int I = 0>
  static inline __attribute__((always_inline)) void clear() {
    P::template zero<2 * I>();
    if constexpr (NT == 2) P::template zero<2 * I + 1>();
    if constexpr (I + 1 < MT) clear<MT, NT, I + 1>();
  }
  template <int MT, int NT, int I = 0>
  static inline __attribute__((always_inline)) void write(float* out) {
    P::template store<2 * I>(out + I * 512, 128);
    if constexpr (NT == 2) P::template store<2 * I + 1>(out + I * 512 + 16, 128);
    if constexpr (I + 1 < MT) write<MT, NT, I + 1>(out);
  }

  // MT x NT tiles of sums over `steps` steps into out [MT*16][32].
  template <int SL, int MT, int NT>
  static void multiply(const Pixels& pixels, const int64_t* offsets, int steps, const uint16_t* b,
                       float* out) {
    constexpr int64_t kSlice = NT * 512, kStep = SL * kSlice;
    const Pixels a = pixels;
    clear<MT, NT>();
    // While the sums are small, so is the rounding: the small products come first.
    if constexpr (SL > 1)
      for (int i = 0; i < steps; ++i) small_products<SL, MT, NT>(a, offsets[i], b + i * kStep);
    for (int i = 0; i < steps; ++i) {
      if constexpr (MT == 3) {
        product_of_three<NT, false, false, false>(a, offsets[i], b + i * kStep);
      } else {
        load_weights<NT>(b + i * kStep);
        load_pixels<MT, NT>(a, offsets[i]);
        products_held<MT, NT>();
      }
    }
    write<MT, NT>(out);
  }

  template <int SL, int NT>
  static void multiply_rows(int mt, const Pixels& a, const int64_t* offsets, int steps, const uint16_t* b,
                            float* out) {
    if (mt == 3)
      multiply<SL, 3, NT>(a, offsets, steps, b, out);
    else if (mt == 2)
      multiply<SL, 2, NT>(a, offsets, steps, b, out);
    else
      multiply<SL, 1, NT>(a, offsets, steps, b, out);
  }

  // ---- results ----

  // act(v * scale + bias + residual) for one output pixel, `count` channels from k.
  template <class T>
  void finish(typename V::Reg v, int64_t pixel, int64_t k, int lane, int count, const float* scale,
              const float* bias) const {
    const int n = count - lane < V::kLanes ? count - lane : V::kLanes;
    const int64_t at = pixel * g.k + k + lane;
    v = V::fma(v, V::load(scale + lane), V::load(bias + lane));
    if (args.conv.residual) v = V::add(v, load_lanes(static_cast<const T*>(args.conv.residual) + at, n));
    if (args.conv.activation == Activation::kRelu) v = V::relu(v);
    store_lanes(static_cast<T*>(args.conv.y) + at, v, n);
  }

  template <class T>
  void finish_rows(const TileRow* rows, int count, const float* sums, int64_t k, const float* scale,
                   const float* bias) const {
    const int channels = g.k - k < 32 ? static_cast<int>(g.k - k) : 32;
    for (int i = 0; i < count; ++i) {
      if (rows[i].pixel < 0) continue;
      for (int lane = 0; lane < channels; lane += V::kLanes)
        finish<T>(V::load(sums + i * 32 + lane), rows[i].pixel, k, lane, channels, scale, bias);
    }
  }

  // AT m of F(2, 3) and F(4, 3)
  static inline __attribute__((always_inline)) void backward(const typename V::Reg (&m)[4],
                                                             typename V::Reg (&y)[2]) {
    y[0] = V::add(V::add(m[0], m[1]), m[2]);
    y[1] = V::add(V::sub(m[1], m[2]), m[3]);
  }
  static inline __attribute__((always_inline)) void backward(const typename V::Reg (&m)[6],
                                                             typename V::Reg (&y)[4]) {
    const auto c = [](float v) { return V::set(v); };
    const auto sum = V::add(m[1], m[2]), difference = V::sub(m[1], m[2]);
    y[0] = V::add(V::add(m[0], sum), V::add(m[3], m[4]));
    y[1] = V::fma(c(.5f), m[3], V::fma(c(-2.f), m[4], difference));
    y[2] = V::fma(c(.25f), m[3], V::fma(c(4.f), m[4], sum));
    y[3] = V::fma(c(.125f), m[3], V::fma(c(-8.f), m[4], V::add(difference, m[5])));
  }
  static inline __attribute__((always_inline)) void backward(const typename V::Reg (&m)[1],
                                                             typename V::Reg (&y)[1]) {
    y[0] = m[0];
  }

  template <class T, int AD, int AH>
  void finish_tiles(const TileRow* rows, int count, const float* sums, int64_t k, const float* scale,
                    const float* bias) const {
    using Reg = typename V::Reg;
    constexpr int kMd = AD == 1 ? 1 : AD - 2, kMh = AH == 1 ? 1 : AH - 2;
    const int channels = g.k - k < 32 ? static_cast<int>(g.k - k) : 32;
    for (int i = 0; i < count; ++i) {
      if (rows[i].pixel < 0) continue;
      for (int lane = 0; lane < channels; lane += V::kLanes) {
        Reg half[AD][kMh];
        for (int a = 0; a < AD; ++a) {
          Reg m[AH];
          for (int b = 0; b < AH; ++b) m[b] = V::load(sums + ((a * AH + b) * count + i) * 32 + lane);
          backward(m, half[a]);
        }
        for (int b = 0; b < kMh; ++b) {
          Reg m[AD], y[kMd];
          for (int a = 0; a < AD; ++a) m[a] = half[a][b];
          backward(m, y);
          for (int a = 0; a < kMd; ++a)
            if (a < rows[i].d && b < rows[i].h)
              finish<T>(y[a], rows[i].pixel + (a * g.out.h + b) * g.out.w, k, lane, channels, scale, bias);
        }
      }
    }
  }

  template <class T>
  void finish_block(const TileRow* rows, int count, const float* sums, int64_t k, const float* scale,
                    const float* bias) const {
    const int ad = p.d.points, ah = p.h.points;
    if (ad == 6 && ah == 4)
      finish_tiles<T, 6, 4>(rows, count, sums, k, scale, bias);
    else if (ad == 6)
      finish_tiles<T, 6, 1>(rows, count, sums, k, scale, bias);
    else if (ad == 4 && ah == 4)
      finish_tiles<T, 4, 4>(rows, count, sums, k, scale, bias);
    else if (ad == 4)
      finish_tiles<T, 4, 1>(rows, count, sums, k, scale, bias);
    else if (ah == 6)
      finish_tiles<T, 1, 6>(rows, count, sums, k, scale, bias);
    else if (ah == 4)
      finish_tiles<T, 1, 4>(rows, count, sums, k, scale, bias);
    else
      finish_rows<T>(rows, count, sums, k, scale, bias);
  }

  // ---- a task ----

  TilesGeometry place(int64_t n0, int64_t n1, int64_t d0, int64_t d1, int64_t h0, int64_t h1) const {
    TilesGeometry b{n0, n1, d0, d1, h0, h1, d1 - d0 + p.d.halo, h1 - h0 + p.h.halo, p.pitch * p.unit,
                    0,  0,  0,  0,  0,  0};
    b.sample = b.span_d * b.span_h * b.row;
    b.phase_h = (n1 - n0) * b.sample;
    b.phase_d = p.h.phases * b.phase_h;
    b.point = p.d.phases * b.phase_d;
    b.slice = points * b.point;
    b.end = args.slices * b.slice + 32 * p.unit + 64 + p.padded;
    return b;
  }

  // Covers the outputs of a block by tiles of 16 consecutive scratch positions: returns their number.
  int64_t cover(const TilesGeometry& b, int64_t* starts, TileRow* rows) const {
    int64_t count = 0;
    for (int64_t n = b.n0; n < b.n1; ++n)
      for (int64_t d = b.d0; d < b.d1; ++d)
        for (int64_t h = b.h0; h < b.h1; ++h)
          for (int64_t w = 0; w < g.out.w; ++w) {
            const int64_t flat = (((n - b.n0) * b.span_d + d - b.d0) * b.span_h + h - b.h0) * p.pitch + w;
            if (count == 0 || flat >= starts[count - 1] + 16) {
              starts[count] = flat;
              for (int i = 0; i < 16; ++i) rows[count * 16 + i] = {-1, 0, 0};
              ++count;
            }
            const int64_t od = d * p.d.outputs, oh = h * p.h.outputs;
            rows[(count - 1) * 16 + flat - starts[count - 1]] = {
                ((n * g.out.d + od) * g.out.h + oh) * g.out.w + w, static_cast<int32_t>(g.out.d - od),
                static_cast<int32_t>(g.out.h - oh)};
          }
    return count;
  }

  // Of the tiles that are left, how many share each load of weights: three save loads where a step has many
  // products, two keep the unit busier where rows lie across cache lines or products are few.
  template <int SL>
  int64_t tiles_together(int64_t left) const {
    if (SL == 1 || p.merged) return left < 2 ? 1 : 2;
    return left >= 6 || left == 3 ? 3 : left > 3 ? (left + 1) / 2 : left;
  }

  template <int SL, class T, class W>
  void task(const TilesGeometry& b, int64_t k0, int64_t k1) const {
    int most = 0;
    for (int i = 0; i < p.chunk_count; ++i) most = p.chunks[i].count > most ? p.chunks[i].count : most;
    const int64_t line = p.group > 1 ? g.in.w * g.c * SL + 64 : 0;
    auto* pixels = static_cast<uint16_t*>(scratch(0, (b.end + line) * 2));
    const int64_t most_tiles = (b.n1 - b.n0) * (b.d1 - b.d0) * (b.h1 - b.h0) * ((g.out.w + 15) / 16);
    const bool waits = p.chunk_count > 1;  // sums wait for the next chunk of channels
    const int64_t column_count = (channels_together() * g.kernel.volume() + 16) * 16;
    const int64_t sum_floats = waits ? most_tiles * points * 512 * ((k1 - k0 + 31) / 32) : 0;
    char* rest = static_cast<char*>(
        scratch(2, 4 * (sum_floats + points * 1536 + column_count + 64) +
                       most_tiles * (8 + 16 * static_cast<int64_t>(sizeof(TileRow))) + p.step_count * 8));
    auto* sums = reinterpret_cast<float*>(rest);
    float* products = sums + sum_floats;
    float* columns = products + points * 1536;
    float* scale = columns + column_count;
    float* bias = scale + 32;
    auto* rows = reinterpret_cast<TileRow*>(bias + 32);
    auto* starts = reinterpret_cast<int64_t*>(rows + most_tiles * 16);
    int64_t* offsets = starts + most_tiles;
    const int64_t tiles = cover(b, starts, rows);
    for (int i = 0; i < p.step_count; ++i) {
      const TilesStep& s = p.steps[i];
      const auto &td = p.d.tap[s.d], &th = p.h.tap[s.h];
      offsets[i] =
          td.phase * b.phase_d + th.phase * b.phase_h + (td.shift * b.span_h + th.shift) * b.row + s.element;
    }
    auto* weights = static_cast<uint16_t*>(scratch(1, points * most * SL * 2048));

    P::configure();
    for (int ci = 0; ci < p.chunk_count; ++ci) {
      const TilesChunk& chunk = p.chunks[ci];
      fill<SL, T>(pixels, b, chunk, pixels + b.end);
      for (int64_t k = k0; k < k1; k += 32) {
        const int nt = g.k - k > 16 ? 2 : 1;
        for (int i = 0; i < 32; ++i) {
          const bool real = k + i < g.k;
          scale[i] = real ? args.scale ? args.scale[k + i] : 1.f : 0.f;
          bias[i] = real ? args.conv.bias[k + i] : 0.f;
        }
        panel<SL, W>(k, nt, chunk, weights, columns);
        float* waiting = sums + (k - k0) / 32 * tiles * points * 512;
        for (int64_t tile = 0, mt = 0; tile < tiles; tile += mt) {
          mt = tiles_together<SL>(tiles - tile);
          Pixels a{{}, p.unit * 2, b.slice};
          float* mine = waiting + tile * points * 512;
          float* out = waits && ci == 0 ? mine : products;
          for (int i = 0; i < points; ++i) {
            for (int64_t j = 0; j < mt; ++j) a.at[j] = pixels + starts[tile + j] * p.unit + i * b.point;
            const uint16_t* w = weights + i * chunk.count * SL * nt * 512;
            const int64_t* at = offsets + chunk.first;
            if (nt == 2)
              multiply_rows<SL, 2>(static_cast<int>(mt), a, at, chunk.count, w, out + i * mt * 512);
            else
              multiply_rows<SL, 1>(static_cast<int>(mt), a, at, chunk.count, w, out + i * mt * 512);
          }
          if (ci > 0)
            for (int64_t i = 0; i < points * mt * 512; i += V::kLanes)
              V::store(mine + i, V::add(V::load(mine + i), V::load(products + i)));
          if (ci + 1 == p.chunk_count)
            finish_block<T>(rows + tile * 16, static_cast<int>(mt) * 16, waits ? mine : products, k, scale,
                            bias);
        }
      }
    }
    P::release();
  }

  template <int SL, class T, class W>
  void all(const TilesBlock& block) const {
    auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t bn = ceil_div(g.n, block.n), bd = ceil_div(p.d.units, block.d);
    const int64_t bh = ceil_div(p.h.units, block.h), panels = ceil_div(g.k, 32);
    const int64_t share = ceil_div(panels, block.splits), splits = ceil_div(panels, share);
    auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    parallel_for(bn * bd * bh * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t split = i / (bn * bd * bh), j = i % (bn * bd * bh);
        const int64_t n = j / (bd * bh) * block.n, d = j / bh % bd * block.d, h = j % bh * block.h;
        const TilesGeometry b = place(n, least(n + block.n, g.n), d, least(d + block.d, p.d.units), h,
                                      least(h + block.h, p.h.units));
        task<SL, T, W>(b, split * share * 32, least((split + 1) * share * 32, g.k));
      }
    });
  }
};

template <class P>
void run_tiles(const TilesArgs& args, const TilesView& view, const TilesBlock& block) {
  const TilesTask<P> t(args, view);
  const bool narrow = args.weight_dtype == DType::kBFloat16;
  if (args.conv.dtype == DType::kBFloat16)
    narrow ? t.template all<1, uint16_t, uint16_t>(block) : t.template all<1, uint16_t, float>(block);
  else if (args.slices == 3)
    t.template all<3, float, float>(block);
  else if (args.slices == 2)
    t.template all<2, float, float>(block);
  else
    t.template all<1, float, float>(block);
}
