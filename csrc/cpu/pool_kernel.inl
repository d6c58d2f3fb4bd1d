// Max-pool, average-pool + linear head, and batch-norm application over channels-last tensors. Included like
// conv3d_kernel.inl, once for each instruction set, after lanes.inl.

static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// The window of one output pixel: [d0, d1) x [h0, h1) x [w0, w1) of the input.
struct PoolWindow {
  int64_t d0, d1, h0, h1, w0, w1;
};

// Maxima of NV vectors of channels, not-a-number where the window has one. That is noted beside the maxima,
// so that these wait for one instruction a pixel only.
template <int NV, class T>
static inline void max_pool_window(const PoolArgs& a, const T* x, const PoolWindow& win, int lanes, T* y) {
  V::Reg most[NV];
  V::Flags bad[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    most[j] = V::set(-__builtin_inff());
    bad[j] = V::no_flags();
  }
  for (int64_t d = win.d0; d < win.d1; ++d)
    for (int64_t h = win.h0; h < win.h1; ++h) {
      const T* from = x + ((d * a.in.h + h) * a.in.w + win.w0) * a.c;
      for (int64_t w = win.w0; w < win.w1; ++w, from += a.c)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          const V::Reg v = NV > 1 ? ld(from + j * V::kLanes) : load_lanes(from, lanes);
          most[j] = V::max_number(v, most[j]);
          bad[j] = V::either(bad[j], V::nan_flags(v));
        }
    }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const V::Reg v = V::nan_where(bad[j], most[j]);
    NV > 1 ? st(y + j * V::kLanes, v) : store_lanes(y, v, lanes);
  }
}

template <class T>
static void max_pool3d_typed(const PoolArgs& a) {
  const int64_t rows = a.n * a.out.d * a.out.h;  // one task: a line of output pixels
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t oh = row % a.out.h, od = row / a.out.h % a.out.d, n = row / (a.out.h * a.out.d);
      const int64_t d0 = od * a.stride.d - a.padding.d, h0 = oh * a.stride.h - a.padding.h;
      PoolWindow win{at_least(d0, 0),
                     at_most(d0 + a.kernel.d, a.in.d),
                     at_least(h0, 0),
                     at_most(h0 + a.kernel.h, a.in.h),
                     0,
                     0};
      const T* x = static_cast<const T*>(a.x) + n * a.in.volume() * a.c;
      T* y = static_cast<T*>(a.y) + row * a.out.w * a.c;
      for (int64_t ow = 0; ow < a.out.w; ++ow, y += a.c) {
        const int64_t w0 = ow * a.stride.w - a.padding.w;
        win.w0 = at_least(w0, 0);
        win.w1 = at_most(w0 + a.kernel.w, a.in.w);
        int64_t c = 0;
        for (; c + 4 * V::kLanes <= a.c; c += 4 * V::kLanes)
          max_pool_window<4>(a, x + c, win, V::kLanes, y + c);
        for (; c < a.c; c += V::kLanes)
          max_pool_window<1>(a, x + c, win, static_cast<int>(at_most(a.c - c, V::kLanes)), y + c);
      }
    }
  });
}

static void max_pool3d_any(const PoolArgs& a) {
  a.dtype == DType::kBFloat16 ? max_pool3d_typed<uint16_t>(a) : max_pool3d_typed<float>(a);
}

template <class T>
static void head_typed(const HeadArgs& a) {
  const int64_t padded = (a.c + V::kLanes - 1) / V::kLanes * V::kLanes;
  float* mean =
      static_cast<float*>(scratch(1, a.n * padded * 4));  // of the calling thread; the others read it
  constexpr int64_t kBlock = 32;  // plain sums of 32, compensated (Kahan) between them
  const int64_t groups = padded / V::kLanes;
  parallel_for(a.n * groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups, c = task % groups * V::kLanes;
      const int lanes = static_cast<int>(at_most(V::kLanes, a.c - c));
      const T* x = static_cast<const T*>(a.x) + n * a.pixels * a.c + c;
      V::Reg total = V::zero(), lost = V::zero();
      const V::Reg minus = V::set(-1.f);
      for (int64_t p0 = 0; p0 < a.pixels; p0 += kBlock) {
        V::Reg part = V::zero();
        for (int64_t p = p0; p < at_most(p0 + kBlock, a.pixels); ++p)
          part = V::add(part, load_lanes(x + p * a.c, lanes));
        const V::Reg term = V::fma(minus, lost, part), sum = V::add(total, term);
        lost = V::fma(minus, term, V::fma(minus, total, sum));
        total = sum;
      }
      V::store(mean + n * padded + c, V::mul(total, V::set(1.f / static_cast<float>(a.pixels))));
    }
  });
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  parallel_for(a.classes, 16, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t n = 0; n < a.n; ++n) {
        const float* v = mean + n * padded;
        const T* w = weight + j * a.c;
        V::Reg s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        int turn = 0;
        for_vectors(a.c, [&](int64_t c, int lanes) {
          s[turn & 3] = V::fma(load_lanes(w + c, lanes), V::load(v + c), s[turn & 3]);
          ++turn;
        });
        float dot = V::sum(V::add(V::add(s[0], s[1]), V::add(s[2], s[3])));
        if (bias) {
          V::Reg b = ld(bias + j, 1);
          dot += V::sum(b);
        }
        st(y + n * a.classes + j, V::set(dot), 1);
      }
    }
  });
}

static void avg_pool_linear_any(const HeadArgs& a) {
  a.dtype == DType::kBFloat16 ? head_typed<uint16_t>(a) : head_typed<float>(a);
}

template <class T>
static void bn_act_typed(const BnActArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* r = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const int64_t grain = at_least(1, 16384 / at_least(1, a.channels));
  parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t o = row * a.channels;
      for_vectors(a.channels, [&](int64_t c, int lanes) {
        V::Reg v = V::fma(load_lanes(x + o + c, lanes), load_lanes(a.scale + c, lanes),
                          load_lanes(a.shift + c, lanes));
        if (r) v = V::add(v, load_lanes(r + o + c, lanes));
        if (a.activation == Activation::kRelu) v = V::relu(v);
        store_lanes(y + o + c, v, lanes);
      });
    }
  });
}

static void bn_act_any(const BnActArgs& a) {
  a.dtype == DType::kBFloat16 ? bn_act_typed<uint16_t>(a) : bn_act_typed<float>(a);
}
