// Winograd convolution over channels-last tensors, float32 arithmetic. Included like conv3d_kernel.inl, after
// it and after lanes.inl.
//
// A task takes a block of output tiles through three steps, all in scratch memory that fits L2:
//   V[p][tile][c] = input transform, for every point p of the tile and every input channel
//   M[p][tile][k] = V[p] * U[p], a small matrix product for each point, one panel of output channels at a
//   time y             = output transform of M, with bias, residual and activation

// out[i] = sum_j MAT[i][j] * in[j], unrolled; zeros and ones cost nothing.
template <int ROWS, int COLS>
static inline __attribute__((always_inline)) void apply_rows(const float (&mat)[ROWS][COLS], const V::Reg* in,
                                                             V::Reg* out) {
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
    V::Reg sum = V::zero();
    bool empty = true;
#pragma GCC unroll 6
    for (int j = 0; j < COLS; ++j) {
      const float f = mat[i][j];
      if (f == 0.f) continue;
      if (empty)
        sum = f == 1.f ? in[j] : f == -1.f ? V::sub(V::zero(), in[j]) : V::mul(V::set(f), in[j]);
      else
        sum = f == 1.f ? V::add(sum, in[j]) : f == -1.f ? V::sub(sum, in[j]) : V::fma(V::set(f), in[j], sum);
      empty = false;
    }
    out[i] = sum;
  }
}

template <class AD, class AH, class AW, class T>
struct Winograd {
  static constexpr int kPoints = AD::a * AH::a * AW::a;
  static constexpr int64_t kPiece = 64;
  const ConvArgs& args;
  const ConvGeometry& g;
  const float* weights;
  int64_t td, th, tw;  // tiles along each axis

  struct Place {
    int64_t n, d, h, w;  // first output of the tile
  };

  Place place(int64_t tile) const {
    Place p;
    p.w = tile % tw * AW::m;
    tile /= tw;
    p.h = tile % th * AH::m;
    tile /= th;
    p.d = tile % td * AD::m;
    p.n = tile / td;
    return p;
  }

  // One vector of channels of one tile: loads a^3 pixels, transforms along w, h, d, stores a^3 points
  // `stride` apart.
  inline __attribute__((always_inline)) void input_vector(const T* const* lines, const bool* inside,
                                                          int64_t c, int lanes, float* to,
                                                          int64_t stride) const {
    V::Reg buf[AD::a][AH::a][AW::a];
    for (int i = 0; i < AD::a; ++i)
      for (int j = 0; j < AH::a; ++j) {
        const T* line = lines[i * AH::a + j];
        if (!line) {
          for (int k = 0; k < AW::a; ++k) buf[i][j][k] = V::zero();
          continue;
        }
        V::Reg in[AW::a];
        for (int k = 0; k < AW::a; ++k) in[k] = inside[k] ? load_lanes(line + k * g.c + c, lanes) : V::zero();
        apply_rows(AW::BT, in, buf[i][j]);
      }
    for (int i = 0; i < AD::a; ++i)
      for (int k = 0; k < AW::a; ++k) {
        V::Reg in[AH::a], out[AH::a];
        for (int j = 0; j < AH::a; ++j) in[j] = buf[i][j][k];
        apply_rows(AH::BT, in, out);
        for (int j = 0; j < AH::a; ++j) buf[i][j][k] = out[j];
      }
    for (int j = 0; j < AH::a; ++j)
      for (int k = 0; k < AW::a; ++k) {
        V::Reg in[AD::a], out[AD::a];
        for (int i = 0; i < AD::a; ++i) in[i] = buf[i][j][k];
        apply_rows(AD::BT, in, out);
        for (int i = 0; i < AD::a; ++i) V::store(to + ((i * AH::a + j) * AW::a + k) * stride, out[i]);
      }
  }

  void input_tile(const Place& p, float* to, int64_t stride) const {
    const T* x = static_cast<const T*>(args.x) + p.n * g.in.volume() * g.c;
    const T* lines[AD::a * AH::a];
    const int64_t w0 = p.w - g.padding.w;
    for (int i = 0; i < AD::a; ++i)
      for (int j = 0; j < AH::a; ++j) {
        const int64_t id = p.d - g.padding.d + i, ih = p.h - g.padding.h + j;
        const bool ok = id >= 0 && id < g.in.d && ih >= 0 && ih < g.in.h;
        lines[i * AH::a + j] = ok ? x + ((id * g.in.h + ih) * g.in.w + w0) * g.c : nullptr;
      }
    bool inside[AW::a];
    for (int k = 0; k < AW::a; ++k) inside[k] = w0 + k >= 0 && w0 + k < g.in.w;
    int64_t c = 0;
    for (; c + V::kLanes <= g.c; c += V::kLanes) input_vector(lines, inside, c, V::kLanes, to + c, stride);
    if (c < g.c) input_vector(lines, inside, c, static_cast<int>(g.c - c), to + c, stride);
  }

  // One vector of output channels of one tile.
  inline __attribute__((always_inline)) void output_vector(const Place& p, const float* from, int64_t stride,
                                                           int64_t k, int lanes, V::Reg bias) const {
    V::Reg buf[AD::m][AH::a][AW::a];
    for (int j = 0; j < AH::a; ++j)
      for (int z = 0; z < AW::a; ++z) {
        V::Reg in[AD::a], out[AD::m];
        for (int i = 0; i < AD::a; ++i) in[i] = V::load(from + ((i * AH::a + j) * AW::a + z) * stride);
        apply_rows(AD::AT, in, out);
        for (int i = 0; i < AD::m; ++i) buf[i][j][z] = out[i];
      }
    for (int i = 0; i < AD::m; ++i) {
      if (p.d + i >= g.out.d) break;
      V::Reg rows[AH::m][AW::a];
      for (int z = 0; z < AW::a; ++z) {
        V::Reg in[AH::a], out[AH::m];
        for (int j = 0; j < AH::a; ++j) in[j] = buf[i][j][z];
        apply_rows(AH::AT, in, out);
        for (int j = 0; j < AH::m; ++j) rows[j][z] = out[j];
      }
      for (int j = 0; j < AH::m; ++j) {
        if (p.h + j >= g.out.h) break;
        V::Reg out[AW::m];
        apply_rows(AW::AT, rows[j], out);
        const int64_t at = (((p.n * g.out.d + p.d + i) * g.out.h + p.h + j) * g.out.w + p.w) * g.k + k;
        for (int z = 0; z < AW::m; ++z) {
          if (p.w + z >= g.out.w) break;
          V::Reg v = V::add(out[z], bias);
          if (args.residual)
            v = V::add(v, load_lanes(static_cast<const T*>(args.residual) + at + z * g.k, lanes));
          if (args.activation == Activation::kRelu) v = V::relu(v);
          store_lanes(static_cast<T*>(args.y) + at + z * g.k, v, lanes);
        }
      }
    }
  }

  template <int NV>
  void multiply(const float* v, const float* u, float* m, int count, int64_t ldv) const {
    constexpr int kMax = V::max_rows(NV);
    static constexpr Tiles<V, MathF32<V>, NV, kMax> tiles{};
    const float* rows[kMax];
    for (int i = 0; i < count;) {
      const int left = count - i;
      const int mr = left >= 2 * kMax ? kMax : left > kMax ? (left + 1) / 2 : left;
      // pieces of kPiece channels, summed one by one: as exact as a direct convolution, which sums in chunks
      // too
      for (int64_t c = 0; c < g.c; c += kPiece) {
        const int steps = static_cast<int>(g.c - c < kPiece ? g.c - c : kPiece);
        for (int r = 0; r < mr; ++r) rows[r] = v + (i + r) * ldv + c;
        tiles.fn[mr]({rows, 0, 1, steps}, reinterpret_cast<const char*>(u + c * NV * V::kLanes),
                     m + i * NV * V::kLanes, NV * V::kLanes, c == 0, nullptr);
      }
      i += mr;
    }
  }

  static int64_t odd_lines(int64_t floats) {
    return (floats + 15) / 16 % 2 ? (floats + 15) / 16 * 16 : (floats + 31) / 16 * 16;
  }

  void block(int64_t first, int count, int64_t k0, int64_t k1) const {
    const int64_t ldv = (g.c + V::kLanes - 1) / V::kLanes * V::kLanes;
    constexpr int64_t kPanel = V::kPanelVectors * V::kLanes;
    // The transforms touch all points of a tile at once: an odd number of cache lines between points spreads
    // them over the sets of L1.
    const int64_t stride_v = odd_lines(count * ldv), stride_m = odd_lines(count * kPanel);
    float* v = static_cast<float*>(scratch(0, kPoints * stride_v * 4));
    float* m = static_cast<float*>(scratch(1, kPoints * stride_m * 4));
    for (int t = 0; t < count; ++t) input_tile(place(first + t), v + t * ldv, stride_v);
    for (int64_t k = k0; k < k1; k += kPanel) {
      const int64_t left = g.k - k;
      const int vectors =
          static_cast<int>(left >= kPanel ? V::kPanelVectors : (left + V::kLanes - 1) / V::kLanes);
      const int64_t width = vectors * V::kLanes;
      const float* u = weights + k * kPoints * g.c;
      for (int p = 0; p < kPoints; ++p) {
        const float* vp = v + p * stride_v;
        const float* up = u + p * g.c * width;
        float* mp = m + p * stride_m;
        if (V::kPanelVectors == 4 && vectors == 4)
          multiply<V::kPanelVectors == 4 ? 4 : 1>(vp, up, mp, count, ldv);
        else if (V::kPanelVectors == 4 && vectors == 3)
          multiply<V::kPanelVectors == 4 ? 3 : 1>(vp, up, mp, count, ldv);
        else if (vectors == 2)
          multiply<2>(vp, up, mp, count, ldv);
        else
          multiply<1>(vp, up, mp, count, ldv);
      }
      for (int t = 0; t < count; ++t) {
        const Place p = place(first + t);
        for (int j = 0; j < vectors; ++j) {
          const int64_t at = k + j * V::kLanes;
          const int lanes = static_cast<int>(g.k - at < V::kLanes ? g.k - at : V::kLanes);
          const V::Reg bias = load_lanes(args.bias + at, lanes);
          output_vector(p, m + t * width + j * V::kLanes, stride_m, at, lanes, bias);
        }
      }
    }
  }

  struct Blocking {
    int64_t count, panels;  // of one task
  };

  // Picks the blocks that should cost the fewest cycles: multiplications, transforms, weights that stream
  // through the cache once for each block of tiles, and what of V and M does not stay in L2. Few tiles share
  // out the panels among the threads (and repeat the input transform). Changes the speed only: every sum is
  // the same in any blocking.
  Blocking blocking(int64_t tiles, int64_t panels) const {
    constexpr int64_t kPanel = V::kPanelVectors * V::kLanes;
    constexpr int64_t kScratch = 12 << 20;  // bytes of V and M a thread
    // a cycle: multiply-adds; bytes of weights from beyond L2, and from L2; bytes of V and M from beyond L2
    constexpr double kMacs = 2 * V::kLanes, kFar = 6, kNear = 24, kSpill = 4.5;
    constexpr double kTransform = 8;  // cycles to transform one vector of one point
    const int threads = thread_pool().threads();
    const double l2 = static_cast<double>(l2_bytes()), c = static_cast<double>(g.c), points = kPoints;
    Blocking best{6, panels};
    double least = 0;
    for (int64_t split = 1; split <= panels; split *= 2) {
      const int64_t per_split = (panels + split - 1) / split, splits = (panels + per_split - 1) / per_split;
      const double columns = static_cast<double>(per_split * kPanel < g.k ? per_split * kPanel : g.k);
      const double passes = static_cast<double>(per_split);
      for (int64_t want = 6; want <= 384; want += want < 48 ? 6 : 48) {
        int64_t blocks = (tiles + want - 1) / want;
        if (blocks > threads) blocks = (blocks + threads - 1) / threads * threads;
        const int64_t count = (tiles + blocks - 1) / blocks;
        blocks = (tiles + count - 1) / count;
        const double n = static_cast<double>(count);
        const double v = points * 4 * n * c, m = points * 4 * n * kPanel, u = points * 4 * columns * c;
        if (want > 6 && v + m > kScratch) break;
        double cycles =
            points * n * c * columns / kMacs + points * n * (c + columns) / V::kLanes * kTransform;
        cycles += u / (u + v + m < 0.8 * l2 ? kNear : kFar);
        const double kept = 0.6 * l2 / (v + m);
        if (kept < 1) cycles += (1 - kept) * ((1 + passes) * v + 2 * passes * m) / kSpill;
        cycles *= static_cast<double>((blocks * splits + threads - 1) / threads);
        if (least == 0 || cycles < least) {
          least = cycles;
          best = {count, per_split};
        }
      }
    }
    return best;
  }

  void run() const {
    constexpr int64_t kPanel = V::kPanelVectors * V::kLanes;
    const int64_t tiles = g.n * td * th * tw, panels = (g.k + kPanel - 1) / kPanel;
    const Blocking best = blocking(tiles, panels);
    const int64_t count = best.count, blocks = (tiles + count - 1) / count, per_split = best.panels;
    const int64_t splits = (panels + per_split - 1) / per_split;
    parallel_for(blocks * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task / blocks, first = task % blocks * count;
        const int64_t k0 = split * per_split * kPanel;
        const int64_t k1 = k0 + per_split * kPanel < g.k ? k0 + per_split * kPanel : g.k;
        block(first, static_cast<int>(tiles - first < count ? tiles - first : count), k0, k1);
      }
    });
  }
};

template <class AD, class AH, class AW, class T>
static void run_winograd(const ConvArgs& args) {
  const ConvGeometry& g = args.g;
  const Winograd<AD, AH, AW, T> w{
      args,
      g,
      reinterpret_cast<const float*>(static_cast<const char*>(args.weight) + sizeof(PackHeader)),
      (g.out.d + AD::m - 1) / AD::m,
      (g.out.h + AH::m - 1) / AH::m,
      (g.out.w + AW::m - 1) / AW::m};
  w.run();
}

template <class T>
static void winograd_typed(const ConvArgs& args, int code) {
  switch (code) {
    case 222:
      return run_winograd<Axis2, Axis2, Axis2, T>(args);
    case 244:
      return run_winograd<Axis2, Axis4, Axis4, T>(args);
    case 122:
      return run_winograd<Axis1, Axis2, Axis2, T>(args);
    case 144:
      return run_winograd<Axis1, Axis4, Axis4, T>(args);
    case 211:
      return run_winograd<Axis2, Axis1, Axis1, T>(args);
    case 411:
      return run_winograd<Axis4, Axis1, Axis1, T>(args);
  }
}

static void winograd_any(const ConvArgs& args, int code) {
  args.dtype == DType::kBFloat16 ? winograd_typed<uint16_t>(args, code) : winograd_typed<float>(args, code);
}
