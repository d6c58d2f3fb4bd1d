// The parameter as the micro-kernels want it: output channels innermost. Turned in registers, kLanes output
// channels by kLanes weights at a time, so that every weight is read from memory once. Included by
// conv3d_kernel.inl.

// Asks for the weights that come next while others are multiplied: `rows` rows of `segments` segments of
// `bytes`.
struct Ahead {
  const char* at;
  int64_t row, segment, bytes;  // strides, and the length of a segment
  int rows, segments, lines;    // lines to ask for at every step
  int64_t pos;
  int current;

  inline __attribute__((always_inline)) void step() {
    for (int left = lines; left > 0 && rows > 0;) {
      const char* p = at + current * segment;
      int64_t i = pos;
      for (; i < bytes + 63 && left > 0; i += 64, --left) __builtin_prefetch(p + i, 0, 2);
      pos = i;
      if (i < bytes + 63) return;
      pos = 0;
      if (++current < segments) continue;
      current = 0;
      at += row;
      --rows;
    }
  }
};

template <class V, class Math, class T>
struct Parameter {
  using Reg = typename V::Reg;
  static constexpr int kLanes = V::kLanes, kStep = Math::kStep;

  const T* at;         // [K, C, taps], or [K, taps, C] when channels_last
  int64_t k, c, taps;  // output channels, input channels, T*R*S
  bool channels_last;

  // The weights of a row follow one another: those so many further are asked for while others are turned.
  static constexpr int64_t kSoon = 512 / sizeof(T);

  // Where columns go: `step` floats apart, and `jump` from one run of `wrap` columns to the next.
  struct Place {
    float* at;
    int64_t step, wrap, jump;
  };

  // Column e of `rows` rows goes to to[e]; load(row, e, lanes) reads a row's piece.
  template <class Load>
  static inline __attribute__((always_inline)) void columns(int rows, int64_t n, Place to, const Load& load) {
    float* next = to.at;
    int64_t left = to.wrap;
    for (int64_t e = 0; e < n; e += kLanes) {
      const int lanes = n - e < kLanes ? static_cast<int>(n - e) : kLanes;
      Reg r[kLanes];
      if (rows == kLanes && lanes == kLanes) {
        for (int i = 0; i < kLanes; ++i) r[i] = load(i, e, kLanes);
      } else if (rows == kLanes) {
        for (int i = 0; i < kLanes; ++i) r[i] = load(i, e, lanes);
      } else {
        for (int i = 0; i < kLanes; ++i) r[i] = i < rows ? load(i, e, lanes) : V::zero();
      }
      V::transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {  // unrolled: r[i] must be a register
        if (i >= lanes) break;
        V::store(next, r[i]);
        next += to.step;
        if (--left == 0) {
          next += to.jump - to.wrap * to.step;
          left = to.wrap;
        }
      }
    }
  }

  // Taps [t0, t1) of input channels [c0, c1), a multiple of kStep, for the kLanes output channels from k0:
  // tap t and step (c - c0) / kStep go to out[(t - t0) * tap_stride + step * width].
  void turn(int64_t k0, int64_t c0, int64_t c1, int64_t t0, int64_t t1, float* out, int64_t tap_stride,
            int64_t width) const {
    const int rows = k - k0 < kLanes ? static_cast<int>(k - k0) : kLanes;
    const int64_t row = c * taps;
    const T* from = at + k0 * row;
    if (channels_last || taps == 1) {
      for (int64_t t = t0; t < t1; ++t) {
        const T* p = from + t * c + c0;
        columns(rows, (c1 - c0) / kStep, Place{out + (t - t0) * tap_stride, width, INT64_MAX, 0},
                [&](int i, int64_t e, int n) { return Math::words(p + i * row + e * kStep, n); });
      }
    } else if constexpr (kStep == 2) {
      if (rows == kLanes &&
          Math::turn_pairs(from + c0 * taps, row, c1 - c0, taps, t0, t1, out, width, tap_stride))
        return;
      for (int64_t ci = c0; ci < c1; ci += 2) {
        const T* p = from + ci * taps + t0;
        columns(
            rows, t1 - t0, Place{out + (ci - c0) / 2 * width, tap_stride, INT64_MAX, 0},
            [&](int i, int64_t e, int n) { return Math::pairs(p + i * row + e, p + i * row + e + taps, n); });
      }
    } else if (t1 - t0 == taps) {
      const T* p = from + c0 * taps;
      columns(rows, (c1 - c0) * taps, Place{out, tap_stride, taps, width}, [&](int i, int64_t e, int n) {
        __builtin_prefetch(p + i * row + e + kSoon, 0, 2);
        return Math::words(p + i * row + e, n);
      });
    } else {
      for (int64_t ci = c0; ci < c1; ++ci) {
        const T* p = from + ci * taps + t0;
        columns(rows, t1 - t0, Place{out + (ci - c0) * width, tap_stride, INT64_MAX, 0},
                [&](int i, int64_t e, int n) { return Math::words(p + i * row + e, n); });
      }
    }
  }

  // The same for a whole panel of `width` channels.
  void turn_panel(int64_t k0, int64_t c0, int64_t c1, int64_t t0, int64_t t1, float* out, int64_t tap_stride,
                  int64_t width) const {
    for (int64_t j = 0; j < width; j += kLanes) turn(k0 + j, c0, c1, t0, t1, out + j, tap_stride, width);
  }

  // One weight of a chunk: element e of those that its steps multiply; zero in the padding of the last step.
  T element(const Chunk& chunk, int64_t e, int64_t output, int64_t kernel_h, int64_t kernel_w) const {
    if (output >= k || e >= static_cast<int64_t>(chunk.rows) * chunk.len) return T{};
    const int64_t pos = chunk.pos + e % chunk.len, r = chunk.r + e / chunk.len, ci = pos % c;
    const int64_t tap = (chunk.t * kernel_h + r) * kernel_w + pos / c;
    return at[output * c * taps + (channels_last ? tap * c + ci : ci * taps + tap)];
  }

  Ahead ahead(int64_t k0, int64_t width, int64_t c0, int64_t c1, int64_t t0, int64_t t1) const {
    const int64_t rows = k - k0 < width ? k - k0 : width, size = sizeof(T);
    const char* p = reinterpret_cast<const char*>(at + k0 * c * taps);
    if (channels_last)
      return {p + (t0 * c + c0) * size,
              c * taps * size,
              c * size,
              (c1 - c0) * size,
              static_cast<int>(rows),
              static_cast<int>(t1 - t0),
              0,
              0,
              0};
    return {p + c0 * taps * size,
            c * taps * size,
            0,
            (c1 - c0) * taps * size,
            static_cast<int>(rows),
            1,
            0,
            0,
            0};
  }
};
