// The direct convolution, written once over a vector policy. Included by one file per instruction set, inside
// that file's own namespace and target options. Nothing from the standard library is instantiated here: a
// shared template compiled with AVX-512 could become the copy that the linker keeps for every processor.
//
// A policy V has: Reg (a vector of float32), kLanes, zero, load, store, broadcast, fma(a, b, c) = a*b + c,
// add, relu (NaN stays NaN), load_bf16, store_bf16, and partial forms of the loads and stores for the first n
// lanes.

struct Pixel {
  int64_t sample;   // offset of the sample in elements
  int64_t d, h, w;  // input coordinates of tap (0, 0, 0); may be negative
};

// What the epilogue of one register tile needs.
struct Tail {
  const float* bias;     // of the panel
  const char* residual;  // first row of the tile, or null
  char* y;               // first row of the tile
  int64_t row_bytes;     // from one pixel to the next
  int valid;             // output channels of the panel that exist
  bool bf16, relu;
};

// Multiplies float32 activations with float32 weights.
template <class V>
struct MathF32 {
  using A = float;
  static constexpr int kStep = 1;
  template <int MR, int NV>
  static inline __attribute__((always_inline)) void run(typename V::Reg (&acc)[MR][NV], const A* const* rows,
                                                        const char* weights, int steps) {
    const float* b = reinterpret_cast<const float*>(weights);
    const A* a[MR];
    for (int i = 0; i < MR; ++i) a[i] = rows[i];
#pragma GCC unroll 2
    for (int e = 0; e < steps; ++e) {
      typename V::Reg w[NV];
      for (int j = 0; j < NV; ++j) w[j] = V::load(b + j * V::kLanes);
      for (int i = 0; i < MR; ++i) {
        const typename V::Reg v = V::broadcast(a[i] + e);
        for (int j = 0; j < NV; ++j) acc[i][j] = V::fma(v, w[j], acc[i][j]);
      }
      b += NV * V::kLanes;
    }
  }
};

// Where a tile reads its activations: `runs` runs of `steps` steps each; at[run * next + pixel] points to a
// run.
template <class A>
struct Rows {
  const A* const* at;
  int64_t next;
  int runs, steps;
};

// rows * weights for MR pixels and NV vectors of output channels, added to the partial sums in `sums` unless
// this is the `first` chunk; `tail` finishes the tile instead of writing partial sums back.
template <class V, class Math, int MR, int NV>
void tile(const Rows<typename Math::A>& rows, const char* weights, float* sums, int64_t ld, bool first,
          const Tail* tail) {
  typename V::Reg acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = V::zero();
  for (int run = 0; run < rows.runs; ++run)
    Math::template run<MR, NV>(acc, rows.at + run * rows.next,
                               weights + static_cast<int64_t>(run) * rows.steps * NV * V::kLanes * 4,
                               rows.steps);
  // Sums of chunks, then a sum of those: rounding grows with the two lengths, not with their product.
  if (!first)
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) acc[i][j] = V::add(V::load(sums + i * ld + j * V::kLanes), acc[i][j]);
  if (!tail) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) V::store(sums + i * ld + j * V::kLanes, acc[i][j]);
    return;
  }
  typename V::Reg bias[NV];
  for (int j = 0; j < NV; ++j) bias[j] = V::load(tail->bias + j * V::kLanes);
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      const int n = tail->valid - j * V::kLanes;  // lanes of this vector that exist
      if (n <= 0) continue;
      typename V::Reg v = V::add(acc[i][j], bias[j]);
      const int64_t at = i * tail->row_bytes;
      if (tail->bf16) {
        const int64_t o = at + j * V::kLanes * 2;
        if (tail->residual) {
          const uint16_t* r = reinterpret_cast<const uint16_t*>(tail->residual + o);
          v = V::add(v, n >= V::kLanes ? V::load_bf16(r) : V::load_bf16_part(r, n));
        }
        if (tail->relu) v = V::relu(v);
        uint16_t* y = reinterpret_cast<uint16_t*>(tail->y + o);
        n >= V::kLanes ? V::store_bf16(y, v) : V::store_bf16_part(y, v, n);
      } else {
        const int64_t o = at + j * V::kLanes * 4;
        if (tail->residual) {
          const float* r = reinterpret_cast<const float*>(tail->residual + o);
          v = V::add(v, n >= V::kLanes ? V::load(r) : V::load_part(r, n));
        }
        if (tail->relu) v = V::relu(v);
        float* y = reinterpret_cast<float*>(tail->y + o);
        n >= V::kLanes ? V::store(y, v) : V::store_part(y, v, n);
      }
    }
  }
}

template <class A>
using TileFn = void (*)(const Rows<A>&, const char*, float*, int64_t, bool, const Tail*);

// tile functions for 1 .. MAX rows
template <class V, class Math, int NV, int MAX>
struct Tiles {
  TileFn<typename Math::A> fn[MAX + 1];
  constexpr Tiles() : fn{} { fill<MAX>(); }
  template <int MR>
  constexpr void fill() {
    fn[MR] = &tile<V, Math, MR, NV>;
    if constexpr (MR > 1) fill<MR - 1>();
  }
};

// Copies n elements, converting when the kernel computes in another type.
template <class V>
inline void copy_run(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(to + i, V::load(from + i));
  if (i < n) V::store_part(to + i, V::load_part(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}
template <class V>
inline void copy_run(float* to, const uint16_t* from, int64_t n) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(to + i, V::load_bf16(from + i));
  if (i < n)
    V::store_part(to + i, V::load_bf16_part(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}
template <class V>
inline void copy_run(uint16_t* to, const uint16_t* from, int64_t n) {
  V::copy16(to, from, n);
}

template <class A>
inline void fill_zero(A* to, int64_t n) {
  __builtin_memset(to, 0, static_cast<std::size_t>(n) * sizeof(A));
}

template <class V, class Math, class T>
struct Direct {
  using A = typename Math::A;
  static constexpr bool kSameType = sizeof(A) == sizeof(T);  // no conversion between memory and kernel
  static constexpr int kPanelVectors = V::kPanelVectors;

  const ConvArgs& args;
  const ConvGeometry& g;
  const Chunk* chunks;
  int chunk_count;
  int64_t steps;  // of the whole reduction
  const char* payload;
  int64_t lda;  // elements from one gathered row to the next

  // Gathers the chunk for one pixel into `to` (padded with zeros to whole steps).
  void gather(A* to, const Pixel& p, const Chunk& chunk) const {
    const T* x = static_cast<const T*>(args.x) + p.sample;
    const int64_t id = p.d + chunk.t * g.dilation.d, c = g.c;
    for (int row = 0; row < chunk.rows; ++row, to += chunk.len) {
      const int64_t ih = p.h + (chunk.r + row) * g.dilation.h;
      if (id < 0 || id >= g.in.d || ih < 0 || ih >= g.in.h) {
        fill_zero(to, chunk.len);
        continue;
      }
      const T* line = x + (id * g.in.h + ih) * g.in.w * c;
      if (g.dilation.w == 1) {
        // element e of the row lies at line[w*c + e]: keep what is inside [0, W*C)
        const int64_t from = p.w * c + chunk.pos;
        int64_t lo = from < 0 ? -from : 0, hi = g.in.w * c - from;
        if (lo > chunk.len) lo = chunk.len;
        if (hi > chunk.len) hi = chunk.len;
        if (hi < lo) hi = lo;
        if (lo > 0) fill_zero(to, lo);
        copy_run<V>(to + lo, line + from + lo, hi - lo);
        if (hi < chunk.len) fill_zero(to + hi, chunk.len - hi);
      } else {
        for (int64_t e = 0; e < chunk.len;) {
          const int64_t s = (chunk.pos + e) / c, ci = (chunk.pos + e) % c, iw = p.w + s * g.dilation.w;
          const int64_t n = c - ci < chunk.len - e ? c - ci : chunk.len - e;
          if (iw >= 0 && iw < g.in.w)
            copy_run<V>(to + e, line + iw * c + ci, n);
          else
            fill_zero(to + e, n);
          e += n;
        }
      }
    }
    const int64_t tail =
        static_cast<int64_t>(chunk.steps) * Math::kStep - static_cast<int64_t>(chunk.rows) * chunk.len;
    if (tail > 0) fill_zero(to, tail);
  }

  bool touches_input(const Pixel& p, const Chunk& chunk) const {
    const int64_t id = p.d + chunk.t * g.dilation.d;
    if (id < 0 || id >= g.in.d) return false;
    for (int row = 0; row < chunk.rows; ++row) {
      const int64_t ih = p.h + (chunk.r + row) * g.dilation.h;
      if (ih >= 0 && ih < g.in.h) return true;
    }
    return false;
  }

  // Whether the kernel may read activations where they lie, run by run.
  bool reads_in_place(const Chunk& chunk) const {
    return kSameType && g.dilation.w == 1 && chunk.len % Math::kStep == 0;
  }

  // One run of one pixel: in place when it lies inside the input, else a copy padded with zeros.
  const A* run_pointer(A* copy, const A* zeros, const Pixel& p, const Chunk& chunk, int row) const {
    const int64_t id = p.d + chunk.t * g.dilation.d, ih = p.h + (chunk.r + row) * g.dilation.h;
    if (id < 0 || id >= g.in.d || ih < 0 || ih >= g.in.h) return zeros;
    const int64_t from = p.w * g.c + chunk.pos, end = g.in.w * g.c;
    if (from + chunk.len <= 0 || from >= end) return zeros;
    if (from >= 0 && from + chunk.len <= end)
      return reinterpret_cast<const A*>(static_cast<const T*>(args.x) + p.sample + (id * g.in.h + ih) * end +
                                        from);
    gather(copy, p, {chunk.t, chunk.r + row, 1, chunk.pos, chunk.len, 0, chunk.len / Math::kStep});
    return copy;
  }

  template <int NV>
  void panel(Rows<A> rows, int count, const char* weights, float* sums, int64_t ld, bool first,
             Tail* tail) const {
    constexpr int kMax = V::max_rows(NV);
    static constexpr Tiles<V, Math, NV, kMax> tiles{};
    for (int i = 0; i < count;) {
      const int left = count - i;
      // an even split of the last rows: two tiles of 4 keep the multipliers busier than 6 + 2
      const int mr = left >= 2 * kMax ? kMax : left > kMax ? (left + 1) / 2 : left;
      tiles.fn[mr](rows, weights, sums + i * ld, ld, first, tail);
      rows.at += mr;
      if (tail) {
        tail->y += mr * tail->row_bytes;
        if (tail->residual) tail->residual += mr * tail->row_bytes;
      }
      i += mr;
    }
  }

  // Output pixels [m0, m0+count), output channels [k0, k1); k0 starts a panel.
  void block(int64_t m0, int count, int64_t k0, int64_t k1) const {
    int most_runs = 1;
    for (int i = 0; i < chunk_count; ++i) most_runs = chunks[i].rows > most_runs ? chunks[i].rows : most_runs;
    const int64_t pointers = static_cast<int64_t>(count) * most_runs;
    Pixel* pixels = static_cast<Pixel*>(scratch(0, count * static_cast<int64_t>(sizeof(Pixel)) +
                                                       pointers * static_cast<int64_t>(sizeof(void*)) +
                                                       chunk_count * static_cast<int64_t>(sizeof(int))));
    const A** at = reinterpret_cast<const A**>(pixels + count);
    int* active = reinterpret_cast<int*>(at + pointers);
    const int64_t padded = (k1 - k0 + V::kLanes - 1) / V::kLanes * V::kLanes;
    float* sums = static_cast<float*>(scratch(1, count * padded * 4));
    A* gathered = static_cast<A*>(scratch(2, (count + 1) * lda * static_cast<int64_t>(sizeof(A))));
    A* zeros = gathered + count * lda;
    fill_zero(zeros, lda);

    int64_t q = m0, ow = q % g.out.w;
    q /= g.out.w;
    int64_t oh = q % g.out.h;
    q /= g.out.h;
    int64_t od = q % g.out.d, n = q / g.out.d;
    const int64_t sample = g.in.volume() * g.c;
    for (int i = 0; i < count; ++i) {
      pixels[i] = {n * sample, od * g.stride.d - g.padding.d, oh * g.stride.h - g.padding.h,
                   ow * g.stride.w - g.padding.w};
      if (++ow == g.out.w) {
        ow = 0;
        if (++oh == g.out.h) {
          oh = 0;
          if (++od == g.out.d) {
            od = 0;
            ++n;
          }
        }
      }
    }

    int live = 0;  // chunks that touch the input anywhere in this block; the others would only add zeros
    for (int ci = 0; ci < chunk_count; ++ci)
      for (int i = 0; i < count; ++i)
        if (touches_input(pixels[i], chunks[ci])) {
          active[live++] = ci;
          break;
        }

    const bool bf16 = args.dtype == DType::kBFloat16;
    const int64_t size = bf16 ? 2 : 4;
    const Chunk none{0, 0, 0, 0, 0, 0, 0};
    for (int a = 0; a < (live ? live : 1); ++a) {
      const Chunk& chunk = live ? chunks[active[a]] : none;
      Rows<A> rows{at, count, 1, chunk.steps};
      if (!live) {
        for (int i = 0; i < count; ++i) at[i] = zeros;
      } else if (reads_in_place(chunk)) {
        rows.runs = chunk.rows;
        rows.steps = chunk.len / Math::kStep;
        for (int row = 0; row < chunk.rows; ++row)
          for (int i = 0; i < count; ++i)
            at[row * count + i] =
                run_pointer(gathered + i * lda + row * chunk.len, zeros, pixels[i], chunk, row);
      } else {
        for (int i = 0; i < count; ++i) {
          gather(gathered + i * lda, pixels[i], chunk);
          at[i] = gathered + i * lda;
        }
      }
      const bool last = a + 1 >= live;
      for (int64_t k = k0; k < k1; k += kPanelVectors * V::kLanes) {
        const int64_t left = g.k - k, lanes = V::kLanes;
        const int vectors =
            static_cast<int>(left >= kPanelVectors * lanes ? kPanelVectors : (left + lanes - 1) / lanes);
        const char* weights = payload + 4 * (k * steps + chunk.packed * vectors * lanes);
        float* part = sums + (k - k0);
        alignas(64) float bias[kPanelVectors * V::kLanes];
        Tail tail{};
        if (last) {
          tail.valid = static_cast<int>(left < vectors * lanes ? left : vectors * lanes);
          for (int j = 0; j < vectors * V::kLanes; ++j) bias[j] = j < tail.valid ? args.bias[k + j] : 0.f;
          tail.bias = bias;
          tail.row_bytes = g.k * size;
          tail.y = static_cast<char*>(args.y) + (m0 * g.k + k) * size;
          tail.residual =
              args.residual ? static_cast<const char*>(args.residual) + (m0 * g.k + k) * size : nullptr;
          tail.bf16 = bf16;
          tail.relu = args.activation == Activation::kRelu;
        }
        Tail* t = last ? &tail : nullptr;
        if (kPanelVectors == 4 && vectors == 4)
          panel<kPanelVectors == 4 ? 4 : 1>(rows, count, weights, part, padded, a == 0, t);
        else if (kPanelVectors == 4 && vectors == 3)
          panel<kPanelVectors == 4 ? 3 : 1>(rows, count, weights, part, padded, a == 0, t);
        else if (vectors == 2)
          panel<2>(rows, count, weights, part, padded, a == 0, t);
        else
          panel<1>(rows, count, weights, part, padded, a == 0, t);
      }
    }
  }

  void run() const {
    const int64_t m = g.pixels(), panel_width = kPanelVectors * V::kLanes;
    const int64_t panels = (g.k + panel_width - 1) / panel_width;
    const int threads = thread_pool().threads();
    // Pixel blocks: about 96 rows keep a chunk of weights busy; partial sums of a block must stay in L2.
    int64_t rows = 96;
    while (rows > 24 && rows * g.k * 4 > 256 * 1024) rows /= 2;
    int64_t blocks = (m + rows - 1) / rows;
    if (blocks > threads) blocks = (blocks + threads - 1) / threads * threads;  // as many for every thread
    rows = (m + blocks - 1) / blocks;
    blocks = (m + rows - 1) / rows;
    // Few pixels, many weights: share out the panels instead, so that every thread reads its own weights
    // only.
    int64_t splits = 1;
    while (blocks * splits < 4 * threads && splits < panels) splits *= 2;
    if (splits > panels) splits = panels;
    const int64_t per_split = (panels + splits - 1) / splits;
    splits = (panels + per_split - 1) / per_split;
    parallel_for(blocks * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task / blocks, m0 = task % blocks * rows;
        const int64_t count = m - m0 < rows ? m - m0 : rows;
        const int64_t k0 = split * per_split * panel_width;
        const int64_t k1 = k0 + per_split * panel_width < g.k ? k0 + per_split * panel_width : g.k;
        block(m0, static_cast<int>(count), k0, k1);
      }
    });
  }
};

template <class V, class Math, class T>
void run_direct(const ConvArgs& args, const Chunk* chunks, int chunk_count, int64_t steps, int max_chunk) {
  const Direct<V, Math, T> d{args,
                             args.g,
                             chunks,
                             chunk_count,
                             steps,
                             static_cast<const char*>(args.weight) + sizeof(PackHeader),
                             max_chunk + 2 + 32 / static_cast<int64_t>(sizeof(typename Math::A))};
  d.run();
}
