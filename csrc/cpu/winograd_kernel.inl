// Winograd convolution over channels-last tensors, float32 arithmetic, from the parameter itself. Included
// like conv3d_kernel.inl, after it and after lanes.inl.
//
// Three axes: `y` and `x`, and `p` (depth, unless only depth has a kernel), whose points are planes of y and
// x.
//
// U[point][c][k]: the weights, transformed at every call: little work next to the products that they take
// part in.
//
// V[tile][c / lanes][point][c % lanes]: the input transform. What one transform makes lies together, because
// stores that are scattered wait for one cache line each.
//
// M[point][tile][k] = V[point] * U[point]: a small matrix product for each point.
//
// The output transform of M is added up over the planes, with scale, bias, residual and activation at the
// end.
//
// Stride 2: points that share a filter are rows of one product, as if they were more tiles.
//
// Many tiles: all weights (or as many output channels as fit a bounded buffer) are transformed first; then
// blocks of tiles pass whose V, and whose M for a pair of planes, stay in L2. Few tiles: all inputs are
// transformed first; tasks take panels of output channels and transform their weights piece by piece, so that
// those never leave L2. Threads share what is transformed first only where doing it several times would be
// much work.

#include "winograd_axes.inl"
#include "winograd_product.inl"

struct WinogradAxis {
  int64_t in, out, padding, tiles;
  int64_t in_step, out_step;  // elements from one position to the next
};

template <class AP, class AY, class AX, class T>
struct Winograd {
  static constexpr int kPlane = AY::a * AX::a, kPoints = AP::a * kPlane, kOutputs = AY::m * AX::m;
  static constexpr int kPlaneFilters = AY::filters * AX::filters, kFilters = AP::filters * kPlaneFilters;
  static constexpr bool kStrided = AX::stride == 2;
  static constexpr bool kEdge = AP::in < AP::a;
  static constexpr int kTaps = AP::taps * AY::taps * AX::taps;
  static constexpr int kMost = V::kPanelVectors;
  // Channels summed at a time; in panels fewer of many points, whose weights would take all of L2.
  static constexpr int64_t kPiece = 64, kPanelPiece = kStrided || kFilters > 100 ? 32 : kPiece;
  // Bytes of transformed weights at a time. Every part of them takes the inputs' transforms once more, which
  // of strided tiles, that overlap little and have few points, is a good part of the work.
  static constexpr int64_t kMostWeights = (kStrided ? 9 : 4) << 20;
  static constexpr int64_t kMostPanel = 8 << 20;   // those of one panel, where that is more
  static constexpr int64_t kMostInputs = 5 << 20;  // bytes of all inputs, where they are transformed at once
  static constexpr int64_t kMostOwn = 32 << 20;    // bytes that all threads transform for themselves

  const WinogradArgs& args;
  const ConvGeometry& g;
  WinogradAxis p, y, x;
  int64_t in_sample, out_sample;

  struct Place {
    int64_t in, out;  // offsets of the tile's first input, which may lie outside, and of its first output
    int32_t p, y, x;  // first input along each axis
    bool inside;      // no input of the tile lies outside
  };

  Place place(int64_t tile) const {
    const int64_t tx = tile % x.tiles * AX::m, left = tile / x.tiles;
    const int64_t ty = left % y.tiles * AY::m, rest = left / y.tiles;
    const int64_t tp = rest % p.tiles * AP::m, n = rest / p.tiles;
    Place at;
    at.p = static_cast<int32_t>(tp * AP::stride - p.padding);
    at.y = static_cast<int32_t>(ty * AY::stride - y.padding);
    at.x = static_cast<int32_t>(tx * AX::stride - x.padding);
    at.in = n * in_sample + at.p * p.in_step + at.y * y.in_step + at.x * x.in_step;
    at.out = n * out_sample + tp * p.out_step + ty * y.out_step + tx * x.out_step;
    at.inside = at.p >= 0 && at.p + AP::in <= p.in && at.y >= 0 && at.y + AY::a <= y.in && at.x >= 0 &&
                at.x + AX::a <= x.in;
    return at;
  }

  // ---- weights

  // Lanes k0.. of `count` channels from c0: flat[c][tap][k]
  void read_weights(int64_t k0, int64_t c0, int count, float* flat) const {
    const T* w = static_cast<const T*>(args.conv.weight);
    constexpr int kLanes = V::kLanes;
    const int64_t ahead = args.weight_channels_last ? kLanes : kTaps * kLanes;  // the next channels
    auto transposed = [&](int64_t offset, int lanes, int64_t to, int64_t to_step) {
      V::Reg r[kLanes];
      const T* from = w + k0 * g.c * kTaps + offset;
      float* at = flat + to * kLanes;
      if (lanes == kLanes && k0 + kLanes <= g.k) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          __builtin_prefetch(from + i * g.c * kTaps + ahead, 0, 2);
          r[i] = ld(from + i * g.c * kTaps);
        }
        V::transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i, at += to_step * kLanes) V::store(at, r[i]);
        return;
      }
      for (int i = 0; i < kLanes; ++i)
        r[i] = k0 + i < g.k ? load_lanes(from + i * g.c * kTaps, lanes) : V::zero();
      V::transpose(r);
      for (int i = 0; i < lanes; ++i, at += to_step * kLanes) V::store(at, r[i]);
    };
    if (args.weight_channels_last) {
      for (int tap = 0; tap < kTaps; ++tap) transposed(tap * g.c + c0, count, tap, kTaps);
    } else {
      for (int e = 0; e < count * kTaps; e += kLanes)
        transposed(c0 * kTaps + e, count * kTaps - e < kLanes ? count * kTaps - e : kLanes, e, 1);
    }
  }

  // Planes [kFirst, kEnd), one after the other, so that nothing has to leave the registers.
  template <int kFirst, int kEnd>
  static void filter(const float* flat, float* u, int64_t point) {
    constexpr int kFace = AY::taps * AX::taps;
#pragma GCC unroll 6
    for (int t = kFirst; t < kEnd; ++t) {
      V::Reg plane[kFace];
#pragma GCC unroll 9
      for (int i = 0; i < kFace; ++i) {
        V::Reg in[AP::taps], out[AP::filters];
#pragma GCC unroll 3
        for (int s = 0; s < AP::taps; ++s) in[s] = V::load(flat + (s * kFace + i) * V::kLanes);
        filter_axis(AP(), in, out);
        plane[i] = out[t];
      }
      V::Reg rows[AY::filters][AX::taps];
#pragma GCC unroll 3
      for (int s = 0; s < AX::taps; ++s) {
        V::Reg in[AY::taps], out[AY::filters];
#pragma GCC unroll 3
        for (int r = 0; r < AY::taps; ++r) in[r] = plane[r * AX::taps + s];
        filter_axis(AY(), in, out);
#pragma GCC unroll 6
        for (int r = 0; r < AY::filters; ++r) rows[r][s] = out[r];
      }
      float* to = u + (t - kFirst) * kPlaneFilters * point;
#pragma GCC unroll 6
      for (int r = 0; r < AY::filters; ++r) {
        V::Reg out[AX::filters];
        filter_axis(AX(), rows[r], out);
#pragma GCC unroll 6
        for (int s = 0; s < AX::filters; ++s, to += point) V::store(to, out[s]);
      }
    }
  }

  // Channels c0 .. c0+count of a panel; u: where the first of them goes
  void weights(int64_t k0, int vectors, int64_t c0, int count, float* u, int64_t point) const {
    float* flat = static_cast<float*>(scratch(0, int64_t{4} * kTaps * V::kLanes * V::kLanes));
    for (int j = 0; j < vectors; ++j) {
      read_weights(k0 + j * V::kLanes, c0, count, flat);
      for (int c = 0; c < count; ++c)
        filter<0, AP::filters>(flat + c * kTaps * V::kLanes, u + (c * vectors + j) * V::kLanes, point);
    }
  }

  // ---- input

  // One vector of channels of one tile. pixels: each pixel of a tile at the border, null where all are `from`
  // + steps. The next tile is fetched meanwhile, `ahead` of this one: its lines asked for at once would wait
  // for one another.
  template <bool kInside>
  inline __attribute__((always_inline)) void input_vector(const T* from, const T* const* pixels, int64_t c,
                                                          int lanes, float* to, int64_t ahead) const {
    alignas(64) float buffer[AY::a][AP::a][AX::a][V::kLanes];
    const int64_t slice = p.in_step, row = y.in_step, column = x.in_step;
    from += c;
    // Six planes of six are more than there are registers: half of the planes at a time, from the same
    // inputs.
    constexpr int kHalves = AP::a * AX::a > 24 ? 2 : 1, kPlanes = AP::a / kHalves;
    for (int j = 0; j < AY::a; ++j, from += row) {
#pragma GCC unroll 2
      for (int half = 0; half < kHalves; ++half) {
        V::Reg in[kPlanes][AX::a];
#pragma GCC unroll 6
        for (int k = 0; k < AX::a; ++k) {
          V::Reg slices[AP::in], planes[AP::a];
#pragma GCC unroll 6
          for (int t = 0; t < AP::in; ++t) {
            const T* at = from + t * slice + k * column;
            slices[t] = load_lanes(kInside ? at : pixels[(j * AX::a + k) * AP::in + t] + c, lanes);
            if (half == 0) __builtin_prefetch(at + ahead, 0, 2);
          }
          input_axis(AP(), slices, planes);
#pragma GCC unroll 6
          for (int t = 0; t < kPlanes; ++t) in[t][k] = planes[half * kPlanes + t];
        }
#pragma GCC unroll 6
        for (int t = 0; t < kPlanes; ++t) {
          V::Reg out[AX::a];
          input_axis(AX(), in[t], out);
#pragma GCC unroll 6
          for (int k = 0; k < AX::a; ++k) V::store(buffer[j][half * kPlanes + t][k], out[k]);
        }
      }
    }
    for (int t = 0; t < AP::a; ++t, to += kPlane * V::kLanes)
      for (int k = 0; k < AX::a; ++k) {
        V::Reg in[AY::a], out[AY::a];
#pragma GCC unroll 6
        for (int j = 0; j < AY::a; ++j) in[j] = V::load(buffer[j][t][k]);
        input_axis(AY(), in, out);
#pragma GCC unroll 6
        for (int j = 0; j < AY::a; ++j) V::store(to + (j * AX::a + k) * V::kLanes, out[j]);
      }
  }

  template <bool kInside>
  void input_vectors(const T* from, const T* const* pixels, float* to, int64_t ahead) const {
    int64_t c = 0;
    for (; c + V::kLanes <= g.c; c += V::kLanes, to += kPoints * V::kLanes)
      input_vector<kInside>(from, pixels, c, V::kLanes, to, ahead);
    if (c < g.c) input_vector<kInside>(from, pixels, c, static_cast<int>(g.c - c), to, ahead);
  }

  // All channels of one tile
  void input_tile(const Place& at, const Place& next, const T* zeros, float* to) const {
    const T* from = static_cast<const T*>(args.conv.x) + at.in;
    const int64_t ahead = next.in - at.in;
    if (at.inside) return input_vectors<true>(from, nullptr, to, ahead);
    const T* pixels[AY::a * AX::a * AP::in];
    for (int j = 0; j < AY::a; ++j)
      for (int k = 0; k < AX::a; ++k) {
        const int64_t iy = at.y + j, ix = at.x + k;
        const bool ok = iy >= 0 && iy < y.in && ix >= 0 && ix < x.in;
        const T* pixel = from + j * y.in_step + k * x.in_step;
        for (int i = 0; i < AP::in; ++i, pixel += p.in_step) {
          const int64_t ip = at.p + i;
          pixels[(j * AX::a + k) * AP::in + i] = ok & (ip >= 0) & (ip < p.in) ? pixel : zeros;
        }
      }
    input_vectors<false>(from, pixels, to, ahead);
  }

  // ---- stride 2: V of a plane is made when its products are due, so that blocks of more tiles fit L2

  // Where a point lies within its plane: those that share a filter lie together.
  static constexpr int place_of(int j, int k) {
    constexpr int base = AY::own * AX::a, m = AY::m;
    return j < AY::own   ? j * AX::a + k
           : k < AX::own ? base + k * m + j - AY::own
                         : base + AX::own * m + (j - AY::own) * AX::m + k - AX::own;
  }
  static constexpr int filter_plane(int t) { return t < AP::own ? t : AP::own; }
  // How many points of a plane have this filter.
  static constexpr int sharing(int filter) {
    if (!kStrided) return 1;
    return (filter / AX::filters < AY::own ? 1 : AY::m) * (filter % AX::filters < AX::own ? 1 : AX::m);
  }

  // One vector of channels of one plane of a tile. pixels: of a tile at the border, for each term; else all
  // are `from` + steps. The next tile is fetched meanwhile, `ahead` of this one.
  template <bool kInside>
  inline __attribute__((always_inline)) void plane_vector(const DepthTerms& terms, const T* from,
                                                          int64_t ahead, const T* const* pixels, int64_t c,
                                                          int lanes, float* to) const {
    alignas(64) float buffer[AY::a][AX::a][V::kLanes];
    for (int j = 0; j < AY::a; ++j) {
      V::Reg in[AX::a], out[AX::a];
      for (int i = 0; i < terms.count; ++i) {
        const T* at = from + terms.slice[i] * p.in_step + j * y.in_step + c;
        const T* const* around = pixels + i * kPlane + j * AX::a;
        const V::Reg factor = V::set(terms.factor[i]);
#pragma GCC unroll 9
        for (int k = 0; k < AX::a; ++k) {
          __builtin_prefetch(at + k * x.in_step + ahead, 0, 2);
          const V::Reg value = load_lanes(kInside ? at + k * x.in_step : around[k] + c, lanes);
          in[k] = i ? V::fma(factor, value, in[k]) : value;
        }
      }
      input_axis(AX(), in, out);
#pragma GCC unroll 9
      for (int k = 0; k < AX::a; ++k) V::store(buffer[j][k], out[k]);
    }
    for (int k = 0; k < AX::a; ++k) {
      V::Reg in[AY::a], out[AY::a];
#pragma GCC unroll 9
      for (int j = 0; j < AY::a; ++j) in[j] = V::load(buffer[j][k]);
      input_axis(AY(), in, out);
#pragma GCC unroll 9
      for (int j = 0; j < AY::a; ++j) V::store(to + place_of(j, k) * V::kLanes, out[j]);
    }
  }

  // All channels of plane `t` of one tile, `step` floats from one vector to the next
  void plane_tile(int t, const Place& at, const Place& next, const T* zeros, float* to, int64_t step) const {
    const T* from = static_cast<const T*>(args.conv.x) + at.in;
    const DepthTerms terms = depth_terms(AP(), t);
    const int64_t ahead = next.in - at.in;
    const T* pixels[4 * kPlane];
    if (!at.inside)
      for (int i = 0; i < terms.count; ++i)
        for (int j = 0; j < AY::a; ++j)
          for (int k = 0; k < AX::a; ++k) {
            const int64_t ip = at.p + terms.slice[i], iy = at.y + j, ix = at.x + k;
            const bool ok = ip >= 0 && ip < p.in && iy >= 0 && iy < y.in && ix >= 0 && ix < x.in;
            pixels[(i * AY::a + j) * AX::a + k] =
                ok ? from + terms.slice[i] * p.in_step + j * y.in_step + k * x.in_step : zeros;
          }
    for (int64_t c = 0; c < g.c; c += V::kLanes, to += step) {
      const int lanes = static_cast<int>(least(g.c - c, V::kLanes));
      if (at.inside && lanes == V::kLanes)
        plane_vector<true>(terms, from, ahead, pixels, c, V::kLanes, to);
      else if (at.inside)
        plane_vector<true>(terms, from, ahead, pixels, c, lanes, to);
      else
        plane_vector<false>(terms, from, ahead, pixels, c, lanes, to);
    }
  }

  // One vector of output channels of one tile and plane. from: [point][tile][k], `stride` floats from one
  // point to the next. The next tile's outputs and residuals are fetched meanwhile, `ahead` of this one's.
  template <int kGroup>
  inline __attribute__((always_inline)) void plane_output(const Place& at, const float* from, int64_t stride,
                                                          int64_t k, int lanes, float* sums, int64_t ld,
                                                          int64_t ahead) const {
    constexpr int t = plane_of(kGroup);
    alignas(64) float buffer[AY::m][AX::a][V::kLanes];
    for (int z = 0; z < AX::a; ++z) {
      V::Reg in[AY::a], out[AY::m];
      const float* odd = from + place_of(AY::own, z) * stride;
      const int64_t odd_step = (z < AX::own ? 1 : AX::m) * stride;
#pragma GCC unroll 5
      for (int j = 0; j < AY::own; ++j) in[j] = V::load(from + (j * AX::a + z) * stride);
#pragma GCC unroll 4
      for (int j = AY::own; j < AY::a; ++j) in[j] = V::load(odd + (j - AY::own) * odd_step);
      output_axis(AY(), in, out);
#pragma GCC unroll 4
      for (int j = 0; j < AY::m; ++j) V::store(buffer[j][z], out[j]);
    }
    const int64_t rows = y.out - (at.y + y.padding) / AY::stride,
                  columns = x.out - (at.x + x.padding) / AX::stride,
                  slices = p.out - (at.p + p.padding) / AP::stride;
    const V::Reg bias = load_lanes(args.conv.bias + k, lanes);
    const V::Reg scale = args.scale ? load_lanes(args.scale + k, lanes) : V::set(1.f);
    for (int j = 0; j < AY::m; ++j) {
      V::Reg in[AX::a], out[AX::m];
#pragma GCC unroll 9
      for (int z = 0; z < AX::a; ++z) in[z] = V::load(buffer[j][z]);
      output_axis(AX(), in, out);
      const int64_t to = at.out + j * y.out_step + k;
#pragma GCC unroll 4
      for (int z = 0; z < AX::m; ++z) {
        float* sum = sums + (j * AX::m + z) * ld;
#pragma GCC unroll 4
        for (int i = 0; i < AP::m; ++i) {
          const float factor = depth_factor(AP(), i, t);
          if (factor == 0) continue;
          V::Reg s;
          if (kGroup == first_group(i))
            s = factor == 1 ? out[z] : V::mul(V::set(factor), out[z]);
          else if (factor == 1)
            s = V::add(V::load(sum + i * kOutputs * ld), out[z]);
          else
            s = V::fma(V::set(factor), out[z], V::load(sum + i * kOutputs * ld));
          if (kGroup != last_group(i)) {
            V::store(sum + i * kOutputs * ld, s);
          } else if (i < slices && j < rows && z < columns) {
            V::Reg value = V::fma(s, scale, bias);
            const int64_t o = to + i * p.out_step + z * x.out_step;
            __builtin_prefetch(static_cast<T*>(args.conv.y) + o + ahead, 1, 2);
            if (args.conv.residual) {
              __builtin_prefetch(static_cast<const T*>(args.conv.residual) + o + ahead, 0, 2);
              value = V::add(value, load_lanes(static_cast<const T*>(args.conv.residual) + o, lanes));
            }
            if (args.conv.activation == Activation::kRelu) value = V::relu(value);
            store_lanes(static_cast<T*>(args.conv.y) + o, value, lanes);
          }
        }
      }
    }
  }

  // Strided planes are groups of their own, in an order in which the slices are finished early.
  static constexpr int plane_of(int group) {
    if constexpr (AP::m == 2) {
      constexpr int order[] = {0, 3, 1, 2, 4};
      return order[group];
    } else {
      return group;
    }
  }
  static constexpr int first_group(int slice) {
    for (int group = 0; group < AP::a; ++group)
      if (depth_factor(AP(), slice, plane_of(group)) != 0) return group;
    return -1;
  }
  static constexpr int last_group(int slice) {
    for (int group = AP::a - 1; group >= 0; --group)
      if (depth_factor(AP(), slice, plane_of(group)) != 0) return group;
    return -1;
  }

  // ---- output

  // Planes are finished in groups: the pairs of points +-p together, because outputs need their sum and
  // difference.
  static constexpr int kGroups = kStrided || kEdge ? AP::a : AP::a / 2 + 1;
  static constexpr int group_plane(int group) {
    if constexpr (kStrided) return plane_of(group);
    return kEdge || group == 0 ? group : 2 * group - 1;
  }
  static constexpr int group_planes(int group) {
    return !kStrided && !kEdge && group && group < kGroups - 1 ? 2 : 1;
  }
  // Slices of outputs that a group completes.
  static constexpr int first_done(int group) {
    if constexpr (kStrided) {
      int slice = 0;
      while (slice < AP::m && last_group(slice) != group) ++slice;
      return slice;
    }
    if constexpr (kEdge) return group ? group - 1 : AP::m;
    return AP::m == 1 ? 0 : group == kGroups - 1 ? AP::m - 1 : group == kGroups - 2 ? 0 : AP::m;
  }
  static constexpr int end_done(int group) {
    if constexpr (kStrided) {
      int slice = first_done(group);
      while (slice < AP::m && last_group(slice) == group) ++slice;
      return slice;
    }
    if constexpr (kEdge) return group;
    return AP::m == 1 || group == kGroups - 1 ? AP::m : group == kGroups - 2 ? AP::m - 1 : 0;
  }

  // Adds the planes v of a group to the sums s of the slices: s[slice] are loaded before and stored after.
  static inline __attribute__((always_inline)) void add_planes(int group, const V::Reg* v, V::Reg* s) {
    if constexpr (AP::m == 1) {
      s[0] = v[0];
    } else if constexpr (kEdge) {
      if (group == 0)
        s[0] = s[1] = v[0];
      else
        s[group - 1] = group == 1 ? V::add(v[0], s[0]) : V::sub(v[0], s[1]);
    } else if constexpr (AP::m == 2) {
      if (group == 0) {
        s[0] = v[0];
      } else if (group == 1) {
        s[0] = V::add(s[0], V::add(v[0], v[1]));
        s[1] = V::sub(v[0], v[1]);
      } else {
        s[1] = V::add(s[1], v[0]);
      }
    } else {
      constexpr float p = Axis4::p, q = Axis4::q;
      if (group == 0) {
        s[0] = v[0];
      } else if (group == 1) {
        const V::Reg sum = V::add(v[0], v[1]), difference = V::sub(v[0], v[1]);
        s[0] = V::add(s[0], sum);
        s[1] = V::mul(V::set(p), difference);
        s[2] = V::mul(V::set(p * p), sum);
        s[3] = V::mul(V::set(p * p * p), difference);
      } else if (group == 2) {
        const V::Reg sum = V::add(v[0], v[1]), difference = V::sub(v[0], v[1]);
        s[0] = V::add(s[0], sum);
        s[1] = V::fma(V::set(q), difference, s[1]);
        s[2] = V::fma(V::set(q * q), sum, s[2]);
        s[3] = V::fma(V::set(q * q * q), difference, s[3]);
      } else {
        s[3] = V::add(s[3], v[0]);
      }
    }
  }

  // One vector of output channels of one tile and group of planes. sums: of the groups so far,
  // [slice][output][k]
  template <int kGroup>
  inline __attribute__((always_inline)) void output_vector(const Place& at, const float* from, int64_t stride,
                                                           int64_t k, int lanes, float* sums, int64_t ld,
                                                           int64_t ahead) const {
    constexpr int kPlanes = group_planes(kGroup), kFirst = first_done(kGroup), kEnd = end_done(kGroup);
    alignas(64) float buffer[kPlanes][AY::m][AX::a][V::kLanes];
    for (int t = 0; t < kPlanes; ++t)
      for (int z = 0; z < AX::a; ++z) {
        V::Reg in[AY::a], out[AY::m];
#pragma GCC unroll 6
        for (int j = 0; j < AY::a; ++j) in[j] = V::load(from + (t * kPlane + j * AX::a + z) * stride);
        output_axis(AY(), in, out);
#pragma GCC unroll 4
        for (int j = 0; j < AY::m; ++j) V::store(buffer[t][j][z], out[j]);
      }
    const int64_t rows = y.out - at.y - y.padding, columns = x.out - at.x - x.padding;
    const int64_t slices = p.out - at.p - p.padding;
    const V::Reg bias = load_lanes(args.conv.bias + k, lanes);
    const V::Reg scale = args.scale ? load_lanes(args.scale + k, lanes) : V::set(1.f);
    for (int j = 0; j < AY::m; ++j) {
      V::Reg out[kPlanes][AX::m];
#pragma GCC unroll 2
      for (int t = 0; t < kPlanes; ++t) {
        V::Reg in[AX::a];
#pragma GCC unroll 6
        for (int z = 0; z < AX::a; ++z) in[z] = V::load(buffer[t][j][z]);
        output_axis(AX(), in, out[t]);
      }
      const int64_t to = at.out + j * y.out_step + k;
#pragma GCC unroll 4
      for (int z = 0; z < AX::m; ++z) {
        V::Reg v[kPlanes], s[AP::m];
#pragma GCC unroll 2
        for (int t = 0; t < kPlanes; ++t) v[t] = out[t][z];
        float* sum = sums + (j * AX::m + z) * ld;
        // Group 0 starts the first sum, group 1 the others; of an edge, group 0 both.
        constexpr int kLoad = kGroup == 0   ? 0
                              : kGroup == 1 ? 1
                                            : AP::m,
                      kStart = kGroup == kGroups - 1 ? AP::m - 1 : 0;
#pragma GCC unroll 4
        for (int i = kStart; i < kLoad; ++i) s[i] = V::load(sum + i * kOutputs * ld);
        add_planes(kGroup, v, s);
        constexpr int kStore = kEdge ? (kGroup == 1 ? 1 : 2) : kGroup == 0 ? 1 : AP::m;
#pragma GCC unroll 4
        for (int i = kStart; i < kStore; ++i) {
          if (i < kFirst || i >= kEnd) {
            V::store(sum + i * kOutputs * ld, s[i]);
          } else if (i < slices && j < rows && z < columns) {
            V::Reg value = V::fma(s[i], scale, bias);
            const int64_t o = to + i * p.out_step + z * x.out_step;
            __builtin_prefetch(static_cast<T*>(args.conv.y) + o + ahead, 1, 2);
            if (args.conv.residual) {
              __builtin_prefetch(static_cast<const T*>(args.conv.residual) + o + ahead, 0, 2);
              value = V::add(value, load_lanes(static_cast<const T*>(args.conv.residual) + o, lanes));
            }
            if (args.conv.activation == Activation::kRelu) value = V::relu(value);
            store_lanes(static_cast<T*>(args.conv.y) + o, value, lanes);
          }
        }
      }
    }
  }

  // ---- blocks

  static int64_t odd_lines(int64_t floats) {
    return (floats + 15) / 16 % 2 ? (floats + 15) / 16 * 16 : (floats + 31) / 16 * 16;
  }
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  int64_t tiles() const { return g.n * p.tiles * y.tiles * x.tiles; }
  int64_t pieces(int64_t size) const { return ceil_div(g.c, size); }
  int piece_channels(int64_t i, int64_t size) const { return static_cast<int>(least(g.c - i * size, size)); }
  // Vectors of the panel that starts at channel k.
  int panel_vectors(int64_t k, int most) const {
    return static_cast<int>(least(most, ceil_div(g.k - k, V::kLanes)));
  }

  // V: floats of one tile, with a cache line more so that tiles do not fall on the same sets of L1.
  int64_t tile_floats(int points = kPoints) const {
    return ceil_div(g.c, V::kLanes) * points * V::kLanes + 16;
  }
  // Where `piece` of `point` starts in the V of the first tile.
  static int64_t piece_at(int64_t piece, int64_t size, int point, int points) {
    return (piece * (size / V::kLanes) * points + point) * V::kLanes;
  }
  // M: floats from one point to the next; rows of one product may not have gaps.
  static int64_t point_floats(int64_t tiles, int64_t width) {
    return kStrided ? tiles * width : odd_lines(tiles * width);
  }
  // places: one more than there are tiles
  void inputs(float* v, const Place* places, int64_t begin, int64_t end, const T* zeros) const {
    for (int64_t i = begin; i < end; ++i)
      if constexpr (kStrided)
        for (int t = 0; t < AP::a; ++t)
          plane_tile(t, places[i], places[i + 1], zeros, v + i * tile_floats() + t * kPlane * V::kLanes,
                     kPoints * V::kLanes);
      else
        input_tile(places[i], places[i + 1], zeros, v + i * tile_floats());
  }

  // Zeros for the pixels outside, and the places of `count` tiles, in one slot of scratch memory behind
  // `bytes`.
  struct Around {
    char* data;
    const T* zeros;
    Place* places;
  };
  Around around(int slot, int64_t bytes, int64_t first, int64_t count) const {
    const int64_t zero_bytes = ceil_div(g.c, V::kLanes) * V::kLanes * 4;
    char* data = static_cast<char*>(
        scratch(slot, bytes + zero_bytes + (count + 1) * static_cast<int64_t>(sizeof(Place))));
    __builtin_memset(data + bytes, 0, static_cast<std::size_t>(zero_bytes));
    const Around a{data, reinterpret_cast<T*>(data + bytes),
                   reinterpret_cast<Place*>(data + bytes + zero_bytes)};
    for (int64_t i = 0; i <= count; ++i) a.places[i] = place(least(first + i, tiles() - 1));
    return a;
  }

  // M of one group of planes and one panel to the outputs of all tiles. sums: [tile][slice][output][k - k0]
  template <int kGroup>
  void group_outputs(const float* m, int64_t stride_m, const Place* places, int64_t count, int64_t k,
                     int vectors, float* sums, int64_t k0, int64_t ld) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t ahead = i + 1 < count ? places[i + 1].out - places[i].out : 0;
      for (int j = 0; j < vectors; ++j) {
        const int64_t at = k + j * V::kLanes;
        const float* from = m + (i * vectors + j) * V::kLanes;
        const int lanes = static_cast<int>(least(g.k - at, V::kLanes));
        float* sum = sums + (AP::m > 1 ? i * AP::m * kOutputs * ld + at - k0 : 0);
        if constexpr (kStrided)
          plane_output<kGroup>(places[i], from, stride_m, at, lanes, sum, ld, ahead);
        else
          output_vector<kGroup>(places[i], from, stride_m, at, lanes, sum, ld, ahead);
      }
    }
  }
  void outputs(int group, const float* m, int64_t stride_m, const Place* places, int64_t count, int64_t k,
               int vectors, float* sums, int64_t k0, int64_t ld) const {
    outputs_from<0>(group, m, stride_m, places, count, k, vectors, sums, k0, ld);
  }
  template <int kGroup>
  void outputs_from(int group, const float* m, int64_t stride_m, const Place* places, int64_t count,
                    int64_t k, int vectors, float* sums, int64_t k0, int64_t ld) const {
    if (group == kGroup) return group_outputs<kGroup>(m, stride_m, places, count, k, vectors, sums, k0, ld);
    if constexpr (kGroup + 1 < kGroups)
      outputs_from<kGroup + 1>(group, m, stride_m, places, count, k, vectors, sums, k0, ld);
  }

  // ---- many tiles

  // Tiles [first_tile, first_tile + count), panels [begin, end) of the group whose weights are u
  void block(int most, const float* u, int64_t panel_step, int64_t point_step, int64_t first_tile,
             int64_t count, int64_t group_k, int64_t begin, int64_t end) const {
    const int64_t width = most * V::kLanes, ld = (end - begin) * width + 16;
    const int64_t k0 = group_k + begin * width;
    constexpr int kInputs = kStrided ? kPlane : kPoints;  // points of V at a time
    // V, M and the sums share a large page.
    const int64_t v_floats = count * tile_floats(kInputs),
                  m_floats = (AP::m > 1 && !kStrided ? 2 : 1) * kPlane * point_floats(count, width);
    const int64_t sum_floats = AP::m > 1 ? count * AP::m * kOutputs * ld : 0;
    const Around a = around(0, 4 * (v_floats + m_floats + sum_floats), first_tile, count);
    float *v = reinterpret_cast<float*>(a.data), *m = v + v_floats, *sums = m + m_floats;
    if (!kStrided) inputs(v, a.places, 0, count, a.zeros);
    for (int group = 0; group < kGroups; ++group) {
      const int first = group_plane(group);
      if constexpr (kStrided)
        for (int64_t i = 0; i < count; ++i)
          plane_tile(first, a.places[i], a.places[i + 1], a.zeros, v + i * tile_floats(kPlane),
                     kPlane * V::kLanes);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t k = group_k + panel * width;
        const int vectors = panel_vectors(k, most);
        const int64_t stride_m = point_floats(count, vectors * V::kLanes);
        const float* up = u + panel * panel_step + filter_plane(first) * kPlaneFilters * point_step;
        const int first_point = kStrided ? 0 : first * kPlane;
        for (int filter = 0, point = 0; filter < group_planes(group) * kPlaneFilters; ++filter) {
          for (int64_t c = 0; c < pieces(kPiece); ++c)
            multiply(vectors, v + piece_at(c, kPiece, first_point + point, kInputs), tile_floats(kInputs),
                     kInputs * V::kLanes, up + c * kPiece * vectors * V::kLanes, m + point * stride_m,
                     sharing(filter), static_cast<int>(count), piece_channels(c, kPiece), c == 0, true);
          point += sharing(filter);
          up += point_step;
        }
        outputs(group, m, stride_m, a.places, count, k, vectors, sums, k0, ld);
      }
    }
  }

  // Changes the speed only: every sum is the same in any blocking.
  int64_t block_tiles(int64_t threads) const {
    const int64_t width = kMost * V::kLanes;
    const int64_t sums = AP::m > 1 ? (AP::m * kOutputs + kPlane) * least(g.k, width) : 0;
    int64_t count = l2_bytes() * 7 / 10 / (4 * ((kStrided ? kPlane : kPoints) * g.c + kPlane * width + sums));
    count = count < 6 ? 6 : count > 96 ? 96 : count / 6 * 6;
    const int64_t blocks = ceil_div(ceil_div(tiles(), count), threads) * threads;  // as many for every thread
    return ceil_div(tiles(), blocks);
  }

  // The weights of output channels from `group_k` on, `chunks` of input channels for each panel: tasks
  // [begin, end).
  void group_weights(int most, int64_t group_k, int64_t begin, int64_t end, float* u, int64_t panel_step,
                     int64_t point_step) const {
    const int64_t chunks = ceil_div(g.c, V::kLanes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / chunks, c0 = task % chunks * V::kLanes,
                    k = group_k + panel * most * V::kLanes;
      const int vectors = panel_vectors(k, most);
      weights(k, vectors, c0, static_cast<int>(least(g.c - c0, V::kLanes)),
              u + panel * panel_step + c0 * vectors * V::kLanes, point_step);
    }
  }

  // Transformed weights of one panel.
  int64_t panel_floats(int vectors) const { return kFilters * odd_lines(g.c * vectors * V::kLanes); }
  // Panels whose weights are transformed at a time.
  int64_t group_panels(int vectors) const {
    const int64_t panels = ceil_div(g.k, vectors * V::kLanes),
                  fit = kMostWeights / (panel_floats(vectors) * 4);
    return ceil_div(panels, ceil_div(panels, fit < 1 ? 1 : least(fit, panels)));
  }

  // What one thread writes and others read is slow where threads do not share a cache: 1.75 ms for 1.1. So
  // every thread has the weights of some output channels to itself, and transforms the inputs of all tiles,
  // unless that is much more work than sharing the tiles out.
  bool by_channels(int vectors) const {
    const int64_t threads = thread_pool().threads(), panels = ceil_div(g.k, vectors * V::kLanes);
    const int64_t group = group_panels(vectors), each = least(group, panels / threads);
    if (threads == 1 || panels % threads || threads * each * panel_floats(vectors) * 4 > kMostOwn)
      return false;
    return ceil_div(panels, group) % threads == 0 ||
           tiles() * tile_floats() * (threads - 1) <= 2 * panel_floats(vectors) * panels;
  }

  void run_blocks() const {
    // Narrow panels where the weights of a wide one would take too much memory, or are too few to share out.
    int most = kMost;
    while (most > 1 && panel_floats(most) * 4 > kMostPanel) most /= 2;
    if (most > 1 && !by_channels(most) && by_channels(most / 2)) most /= 2;
    const int64_t width = most * V::kLanes, panels = ceil_div(g.k, width), threads = thread_pool().threads();
    const int64_t point_step = odd_lines(g.c * width), panel_step = panel_floats(most);
    const int64_t chunks = ceil_div(g.c, V::kLanes);
    int64_t group = group_panels(most);
    if (by_channels(most)) {
      group = least(group, panels / threads);
      const int64_t count = block_tiles(1);
      parallel_for(ceil_div(panels, group), 1, [&](int64_t begin, int64_t end) {
        float* u = static_cast<float*>(scratch(3, group * panel_step * 4));
        for (int64_t part = begin; part < end; ++part) {
          const int64_t base = part * group, here = least(panels - base, group), group_k = base * width;
          group_weights(most, group_k, 0, here * chunks, u, panel_step, point_step);
          for (int64_t i = 0; i < tiles(); i += count)
            block(most, u, panel_step, point_step, i, least(tiles() - i, count), group_k, 0, here);
        }
      });
      return;
    }
    const int64_t count = block_tiles(threads), blocks = ceil_div(tiles(), count);
    // Or every thread transforms all weights for itself, where that is little work.
    const int64_t all = threads * group * panel_step;
    const bool own = threads > 1 && 3 * all <= tiles() * tile_floats() && all * 4 <= kMostOwn;
    float* shared = own ? nullptr : static_cast<float*>(scratch(3, group * panel_step * 4));
    for (int64_t base = 0; base < panels; base += group) {
      const int64_t here = least(panels - base, group), group_k = base * width;
      if (!own)
        parallel_for(here * chunks, 1, [&](int64_t begin, int64_t end) {
          group_weights(most, group_k, begin, end, shared, panel_step, point_step);
        });
      parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
        float* u = shared;
        if (own) {
          u = static_cast<float*>(scratch(3, group * panel_step * 4));
          group_weights(most, group_k, 0, here * chunks, u, panel_step, point_step);
        }
        for (int64_t i = begin; i < end; ++i)
          block(most, u, panel_step, point_step, i * count, least(tiles() - i * count, count), group_k, 0,
                here);
      });
    }
  }

  // ---- few tiles

  bool few() const {
    // M of a panel of all strided points leaves L2 sooner.
    if (kStrided && kPoints * tiles() * 2 * V::kLanes * 4 > l2_bytes() / 2) return false;
    return tiles() <= 128 && tiles() * tile_floats() * 4 <= kMostInputs;
  }

  // Part `part` of kFilters of the parameter's channels c .. c + kPanelPiece for `width` output channels from
  // k.
  void fetch_weights(int64_t k, int width, int64_t c, int part) const {
    if (k >= g.k) return;
    const T* w = static_cast<const T*>(args.conv.weight);
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    const int64_t channels = least(g.c - c, kPanelPiece), rows = least(g.k - k, width);
    const bool last = args.weight_channels_last;
    const int64_t lines = ceil_div(last ? channels : channels * kTaps, kLine),
                  runs = last ? rows * kTaps : rows;
    const int64_t begin = runs * lines * part / kFilters, end = runs * lines * (part + 1) / kFilters;
    const int64_t run_step = last ? g.c : g.c * kTaps;
    const T* from = w + k * g.c * kTaps + (last ? c : c * kTaps);
    for (int64_t i = begin; i < end; ++i)
      __builtin_prefetch(from + i / lines * run_step + i % lines * kLine, 0, 2);
  }

  // A piece of the channels of a panel: V and the sums of all points, and what is asked for meanwhile.
  struct PanelPiece {
    const float *v, *flat;  // flat: [channels / lanes][vector][c % lanes][tap][k % lanes]
    float *u, *m;
    int64_t c, next_k, next_c;
    int vectors, channels;
  };

  // The products of the planes of points that share plane kFilter of the filters. Those are made when they
  // are due: the weights of all planes would fill L2, where V and the sums lie as well.
  template <int kFilter>
  void panel_planes(const PanelPiece& piece) const {
    const int64_t width = piece.vectors * V::kLanes, point_step = odd_lines(piece.channels * width),
                  stride_m = point_floats(tiles(), width);
    for (int64_t c = 0; c < piece.channels; ++c)
      for (int j = 0; j < piece.vectors; ++j)
        filter<kFilter, kFilter + 1>(
            piece.flat +
                ((c / V::kLanes * piece.vectors + j) * V::kLanes + c % V::kLanes) * kTaps * V::kLanes,
            piece.u + (c * piece.vectors + j) * V::kLanes, point_step);
    for (int t = kFilter; t < AP::a && filter_plane(t) == kFilter; ++t)
      for (int filter = 0, point = t * kPlane; filter < kPlaneFilters; ++filter) {
        if (t == kFilter)
          fetch_weights(piece.next_k, static_cast<int>(width), piece.next_c,
                        kFilter * kPlaneFilters + filter);
        multiply(piece.vectors, piece.v + piece_at(piece.c, kPanelPiece, point, kPoints), tile_floats(),
                 kPoints * V::kLanes, piece.u + filter * point_step, piece.m + point * stride_m,
                 sharing(filter), static_cast<int>(tiles()), piece.channels, piece.c == 0, false);
        point += sharing(filter);
      }
    if constexpr (kFilter + 1 < AP::filters) panel_planes<kFilter + 1>(piece);
  }

  void panel(const float* v, const Place* places, int64_t k, int vectors) const {
    const int64_t width = vectors * V::kLanes, chunks = ceil_div(least(kPanelPiece, g.c), V::kLanes);
    const int64_t stride_m = point_floats(tiles(), width), ld = width + 16;
    const int64_t chunk_floats = kTaps * V::kLanes * V::kLanes, flat_floats = chunks * vectors * chunk_floats;
    const int64_t u_floats = kPlaneFilters * odd_lines(chunks * V::kLanes * width),
                  m_floats = kPoints * stride_m;
    float* flat = static_cast<float*>(scratch(
        1, 4 * (flat_floats + u_floats + m_floats + (AP::m > 1 ? tiles() * AP::m * kOutputs * ld : 0))));
    float *u = flat + flat_floats, *m = u + u_floats, *sums = m + m_floats;
    for (int64_t c = 0; c < pieces(kPanelPiece); ++c) {
      const int channels = piece_channels(c, kPanelPiece);
      for (int64_t i = 0; i < channels; i += V::kLanes)
        for (int j = 0; j < vectors; ++j)
          read_weights(k + j * V::kLanes, c * kPanelPiece + i,
                       static_cast<int>(least(channels - i, V::kLanes)),
                       flat + (i / V::kLanes * vectors + j) * chunk_floats);
      // Meanwhile the weights of the next piece come from memory.
      const bool last = c + 1 == pieces(kPanelPiece);
      panel_planes<0>(
          {v, flat, u, m, c, last ? k + width : k, last ? 0 : (c + 1) * kPanelPiece, vectors, channels});
    }
    for (int group = 0; group < kGroups; ++group)
      outputs(group, m + group_plane(group) * kPlane * stride_m, stride_m, places, tiles(), k, vectors, sums,
              k, ld);
  }

  void run_panels() const {
    // A narrow panel leaves registers for more tiles, and there are more of them to share out: the narrowest
    // where many threads would wait for a few. It takes a tenth more time for every channel.
    const int wide = kMost == 4 ? 2 : kMost;
    const int64_t threads = thread_pool().threads();
    const auto rounds = [&](int most) { return ceil_div(ceil_div(g.k, most * V::kLanes), threads) * most; };
    const int most = 10 * rounds(wide) > 11 * rounds(1) ? 1 : wide;
    const int64_t width = most * V::kLanes, panels = ceil_div(g.k, width);
    const int64_t v_bytes = tiles() * tile_floats() * 4;
    const auto share = [&](const float* v, const Place* places, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) panel(v, places, i * width, panel_vectors(i * width, most));
    };
    // Little work next to the products: every thread for itself (by_channels).
    if (threads * 32 <= g.k && threads * v_bytes <= kMostOwn) {
      parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
        float* v = static_cast<float*>(scratch(3, v_bytes));
        const Around a = around(4, 0, 0, tiles());
        inputs(v, a.places, 0, tiles(), a.zeros);
        share(v, a.places, begin, end);
      });
      return;
    }
    float* v = static_cast<float*>(scratch(3, v_bytes));  // of this thread, read by all
    const Around a = around(4, 0, 0, tiles());
    parallel_for(tiles(), 1, [&](int64_t begin, int64_t end) { inputs(v, a.places, begin, end, a.zeros); });
    parallel_for(panels, 1, [&](int64_t begin, int64_t end) { share(v, a.places, begin, end); });
  }

  void run() const { few() ? run_panels() : run_blocks(); }
};

// kDepth: the one axis with a kernel is depth; it takes the role of `y`
template <class AP, class AY, class AX, class T, bool kDepth>
static void run_winograd(const WinogradArgs& args) {
  const ConvGeometry& g = args.conv.g;
  auto axis = [](int64_t in, int64_t out, int64_t padding, int m, int64_t in_step, int64_t out_step) {
    return WinogradAxis{in, out, padding, (out + m - 1) / m, in_step, out_step};
  };
  const int64_t row_in = g.in.w * g.c, row_out = g.out.w * g.k;
  const int md = kDepth ? AY::m : AP::m, mh = kDepth ? AP::m : AY::m;
  const int64_t pad_d = AP::in < AP::a ? 0 : g.padding.d;  // an edge's inputs are those that there are
  const WinogradAxis d = axis(g.in.d, g.out.d, pad_d, md, g.in.h * row_in, g.out.h * row_out);
  const WinogradAxis h = axis(g.in.h, g.out.h, g.padding.h, mh, row_in, row_out);
  const WinogradAxis w = axis(g.in.w, g.out.w, g.padding.w, AX::m, g.c, g.k);
  const Winograd<AP, AY, AX, T> winograd{
      args, g, kDepth ? h : d, kDepth ? d : h, w, g.in.volume() * g.c, g.out.volume() * g.k};
  winograd.run();
}

template <class T>
static void winograd_typed(const WinogradArgs& args) {
  switch (args.tile.code()) {
    case 222:
      if (args.conv.g.stride.d == 2) return run_winograd<Strided2, Strided2, Strided2, T, false>(args);
      if (winograd_edge(args.conv.g)) return run_winograd<Edge2, Axis2, Axis2, T, false>(args);
      return run_winograd<Axis2, Axis2, Axis2, T, false>(args);
    case 244:
      if (winograd_edge(args.conv.g)) return run_winograd<Edge2, Axis4, Axis4, T, false>(args);
      return run_winograd<Axis2, Axis4, Axis4, T, false>(args);
    case 422:
      return run_winograd<Strided4, Strided2, Strided2, T, false>(args);
    case 444:
      return run_winograd<Axis4, Axis4, Axis4, T, false>(args);
    case 122:
      if (args.conv.g.stride.h == 2) return run_winograd<Axis1, Strided2, Strided2, T, false>(args);
      return run_winograd<Axis1, Axis2, Axis2, T, false>(args);
    case 144:
      if (args.conv.g.stride.h == 2) return run_winograd<Axis1, Strided4, Strided4, T, false>(args);
      return run_winograd<Axis1, Axis4, Axis4, T, false>(args);
    case 211:
      return run_winograd<Axis1, Axis2, Axis1, T, true>(args);
    case 411:
      return run_winograd<Axis1, Axis4, Axis1, T, true>(args);
  }
}

static void winograd_any(const WinogradArgs& args) {
  args.conv.dtype == DType::kBFloat16 ? winograd_typed<uint16_t>(args) : winograd_typed<float>(args);
}
