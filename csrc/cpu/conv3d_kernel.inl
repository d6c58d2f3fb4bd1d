// The direct convolution, written once over a vector policy. Included by one file per instruction set, inside
// that file's own namespace and target options. Nothing from the standard library is instantiated here: a
// shared template compiled with AVX-512 could become the copy that the linker keeps for every processor.
//
// A policy V has: Reg (a vector of float32), kLanes, zero, load, store, broadcast, fma(a, b, c) = a*b + c,
// add, relu (NaN stays NaN), load_bf16, store_bf16, partial forms of the loads and stores for the first n
// lanes, transpose of kLanes vectors, whatever their bits mean, set, max_number(a, b) (NaN in b stays), and
// last_in_memory(rows, vectors): whether a tile of that size leaves no register for the last vector of
// weights.

#include "conv3d_parameter.inl"
#include "conv3d_turner.inl"

struct Pixel {
  int64_t sample;   // offset of the sample in elements
  int64_t d, h, w;  // input coordinates of tap (0, 0, 0); may be negative
};

#include "conv3d_tile.inl"

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
  static constexpr int kPanelVectors = V::kDirectVectors;

  const ConvArgs& args;
  const ConvGeometry& g;
  const Chunk* chunks;
  int chunk_count;
  int64_t steps;        // of the whole reduction
  const char* payload;  // packed weights of the output channels from `first_k`
  int64_t lda;          // elements from one gathered row to the next
  const float* scale = nullptr;
  int64_t first_k = 0;

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

  // The pixels at the ends of a line, whose windows reach into padding: how much of a run they leave out.
  void cut_ends(Rows<A>& rows, const Chunk& chunk) const {
    const int64_t c = g.c, end = g.in.w * c, first = chunk.pos - g.padding.w * c,
                  last = first + (g.out.w - 1) * g.stride.w * c;
    // each lies outside on one side only, and not entirely
    const bool left = first < 0 && first + chunk.len > 0 && first + chunk.len <= end;
    const bool right = last >= 0 && last < end && last + chunk.len > end;
    if (left && -first % Math::kStep == 0) rows.from = static_cast<int>(-first / Math::kStep);
    if (right && (end - last) % Math::kStep == 0) {
      const int to = static_cast<int>((end - last) / Math::kStep);
      if (to >= rows.from) rows.to = to;
    }
  }

  // One run of the pixels of a line: in place where it lies inside the input or `rows` leaves out what does
  // not, else a copy padded with zeros.
  void run_pointers(const A** at, A* copies, const A* zeros, const Pixel* pixels, int count,
                    const Chunk& chunk, int row, const Rows<A>& rows) const {
    const Pixel& p = pixels[0];
    const int64_t id = p.d + chunk.t * g.dilation.d, ih = p.h + (chunk.r + row) * g.dilation.h;
    if (id < 0 || id >= g.in.d || ih < 0 || ih >= g.in.h) {
      for (int i = 0; i < count; ++i) at[i] = zeros;
      return;
    }
    const int64_t end = g.in.w * g.c, step = g.stride.w * g.c, last = g.out.w * g.stride.w - g.stride.w;
    const T* line = static_cast<const T*>(args.x) + p.sample + (id * g.in.h + ih) * end;
    int64_t from = p.w * g.c + chunk.pos;
    for (int i = 0; i < count; ++i, from += step) {
      const bool before = from<0, after = from + chunk.len> end;
      if ((!before || (rows.from > 0 && pixels[i].w == -g.padding.w)) &&
          (!after || (rows.to < rows.steps && pixels[i].w == last - g.padding.w))) {
        at[i] = reinterpret_cast<const A*>(line + from);
      } else if (from + chunk.len <= 0 || from >= end) {
        at[i] = zeros;
      } else {
        gather(copies + i * lda, pixels[i],
               {chunk.t, chunk.r + row, 1, chunk.pos, chunk.len, 0, chunk.len / Math::kStep});
        at[i] = copies + i * lda;
      }
    }
  }

  // Pixels of a full tile: fewer where the registers have to do for turning, too.
  static int rows_of_tile(int vectors, bool turning) {
    const int most = V::direct_rows(vectors);
    return turning && most > V::kTurnTile / vectors ? V::kTurnTile / vectors : most;
  }
  static int tiles_of(int count, int line, int most) {
    const int whole = count / line, rest = count % line;
    return whole * ((line + most - 1) / most) + (rest + most - 1) / most;
  }

  // No tile goes beyond a line of `line` pixels: they see the same taps.
  template <int NV>
  void panel(Rows<A> rows, int count, int line, const char* weights, float* sums, int64_t ld, bool first,
             Tail* tail) const {
    constexpr int kMax = V::direct_rows(NV);
    static constexpr Tiles<V, Math, NV, kMax> tiles{};
    const int from = rows.from, to = rows.to, most = rows_of_tile(NV, rows.turner != nullptr);
    // Rows of a block of one chunk that lie apart: no prefetcher finds the next ones.
    const bool ask = rows.runs == 1 && g.stride.w > 1;
    for (int i = 0, in_line = line; i < count;) {
      const int left = count - i < in_line ? count - i : in_line;
      // an even split of the last rows: two tiles of 4 keep the multipliers busier than 6 + 2
      const int mr = left >= 2 * most ? most : left > most ? (left + 1) / 2 : left;
      rows.from = in_line == line ? from : 0;
      rows.to = mr == in_line ? to : rows.steps;
      if (ask && count - i >= 2 * mr)
        for (int q = mr; q < 2 * mr; ++q)
          for (int o = 0; o < 4 && o * 16 < rows.steps; ++o)
            __builtin_prefetch(reinterpret_cast<const char*>(rows.at[q] + rows.offset) + o * 64, 0, 3);
      tiles.fn[mr](rows, weights, sums + i * ld, ld, first, tail);
      rows.at += mr;
      if (tail) {
        tail->y += mr * tail->row_bytes;
        if (tail->residual) tail->residual += mr * tail->row_bytes;
      }
      i += mr;
      in_line = in_line == mr ? line : in_line - mr;
    }
  }

  void panel_of(int vectors, const Rows<A>& rows, int count, int line, const char* weights, float* sums,
                int64_t ld, bool first, Tail* tail) const {
    constexpr int kMost = kPanelVectors;
    if (kMost >= 4 && vectors == 4)
      panel<kMost >= 4 ? 4 : 1>(rows, count, line, weights, sums, ld, first, tail);
    else if (kMost >= 3 && vectors == 3)
      panel<kMost >= 3 ? 3 : 1>(rows, count, line, weights, sums, ld, first, tail);
    else if (vectors == 2)
      panel<2>(rows, count, line, weights, sums, ld, first, tail);
    else
      panel<1>(rows, count, line, weights, sums, ld, first, tail);
  }

  // The epilogue's constants for the panel of `vectors` vectors at output channel k.
  struct Epilogue {
    alignas(64) float bias[kPanelVectors * V::kLanes], scale[kPanelVectors * V::kLanes];

    Tail of(const Direct& d, int64_t m0, int64_t k, int vectors) {
      const ConvArgs& args = d.args;
      const int64_t left = args.g.k - k, width = vectors * V::kLanes;
      Tail tail{};
      tail.bf16 = args.dtype == DType::kBFloat16;
      const int64_t size = tail.bf16 ? 2 : 4, at = (m0 * args.g.k + k) * size;
      tail.valid = static_cast<int>(left < width ? left : width);
      tail.bias = args.bias + k;
      tail.scale = d.scale ? d.scale + k : scale;
      if (tail.valid < width || !d.scale) {
        for (int j = 0; j < width; ++j) {
          bias[j] = j < tail.valid ? args.bias[k + j] : 0.f;
          scale[j] = d.scale && j < tail.valid ? d.scale[k + j] : 1.f;
        }
        tail.bias = bias;
        tail.scale = scale;
      }
      tail.row_bytes = args.g.k * size;
      tail.y = static_cast<char*>(args.y) + at;
      tail.residual = args.residual ? static_cast<const char*>(args.residual) + at : nullptr;
      tail.relu = args.activation == Activation::kRelu;
      return tail;
    }
  };

  // Output pixels [m0, m0+count).
  void place_pixels(Pixel* pixels, int64_t m0, int count) const {
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
    A* zeros = gathered + count * lda;  // also tells tiles what to leave out
    fill_zero(zeros, lda);

    place_pixels(pixels, m0, count);
    const int line = by_line() ? static_cast<int>(g.out.w) : count;

    int live = 0;  // chunks that touch the input anywhere in this block; the others would only add zeros
    for (int ci = 0; ci < chunk_count; ++ci)
      for (int i = 0; i < count; ++i)
        if (touches_input(pixels[i], chunks[ci])) {
          active[live++] = ci;
          break;
        }

    const Chunk none{0, 0, 0, 0, 0, 0, 0};
    const bool streams = 4 * steps * (k1 - k0) > 512 * 1024;
    for (int a = 0; a < (live ? live : 1); ++a) {
      const Chunk& chunk = live ? chunks[active[a]] : none;
      Rows<A> rows{at, count, 1, chunk.steps, 0, zeros};
      if (!live) {
        for (int i = 0; i < count; ++i) at[i] = zeros;
      } else if (reads_in_place(chunk)) {
        rows.runs = chunk.rows;
        rows.steps = chunk.len / Math::kStep;
        if (by_line()) cut_ends(rows, chunk);
        for (int row = 0; row < chunk.rows; ++row)
          for (int i = 0; i < count;) {
            const int64_t in_line = g.out.w - (m0 + i) % g.out.w;
            const int n = count - i < in_line ? count - i : static_cast<int>(in_line);
            run_pointers(at + row * count + i, gathered + i * lda + row * chunk.len, zeros, pixels + i, n,
                         chunk, row, rows);
            i += n;
          }
      } else {
        for (int i = 0; i < count; ++i) {
          gather(gathered + i * lda, pixels[i], chunk);
          at[i] = gathered + i * lda;
        }
      }
      const bool last = a + 1 >= live;
      constexpr int64_t lanes = V::kLanes, width = kPanelVectors * lanes;
      for (int64_t k = k0; k < k1; k += width) {
        const int64_t left = g.k - k;
        const int vectors = static_cast<int>(left >= width ? kPanelVectors : (left + lanes - 1) / lanes);
        const char* weights = payload + 4 * ((k - first_k) * steps + chunk.packed * vectors * lanes);
        Ahead ahead{};
        if (k + width < k1 || !last) {
          // the weights that come next, where L2 cannot hold all of them
          const int64_t next_k = k + width < k1 ? k + width : k0;
          const Chunk& next = k + width < k1 ? chunk : chunks[active[a + 1]];
          const int64_t next_width =
              g.k - next_k < width ? (g.k - next_k + lanes - 1) / lanes * lanes : width;
          ahead = {payload + 4 * ((next_k - first_k) * steps + next.packed * next_width),
                   0,
                   0,
                   4 * next.steps * next_width,
                   1,
                   1,
                   0,
                   0,
                   0};
          const int64_t stops = rows.runs * ((count + 5) / 6);
          ahead.lines = static_cast<int>((ahead.bytes / 64 + stops) / stops);
          rows.ahead = streams ? &ahead : nullptr;
        } else {
          rows.ahead = nullptr;
        }
        Epilogue epilogue;
        Tail tail{};
        if (last) tail = epilogue.of(*this, m0, k, vectors);
        panel_of(vectors, rows, count, line, weights, sums + (k - k0), padded, a == 0,
                 last ? &tail : nullptr);
      }
    }
  }

  // Whether tiles end with their line of pixels: they can leave out taps that fall on padding.
  bool by_line() const {
    return g.out.w >= 3 && g.out.w <= 128 && (g.padding.d > 0 || g.padding.h > 0 || g.padding.w > 0);
  }

  // Output channels [ka, kb); ka starts a panel. With `own`, every thread turns the weights that it needs for
  // itself: those of another thread's come slowly where the two do not share a cache.
  void run(int64_t ka, int64_t kb, const Parameter<V, Math, T>* own = nullptr) const {
    const int64_t m = g.pixels(), panel_width = kPanelVectors * V::kLanes;
    const int64_t panels = (kb - ka + panel_width - 1) / panel_width;
    const int threads = thread_pool().threads();
    // Pixel blocks: 96 rows keep a chunk of weights busy, 192 where there are many, or more weights than L2
    // holds. The partial sums of a block must stay in L2.
    int64_t rows = m >= 4096 || 4 * steps * (kb - ka) > 1024 * 1024 ? 192 : 96;
    while (rows > 24 && rows * (kb - ka) * 4 > 512 * 1024) rows /= 2;
    int64_t blocks = (m + rows - 1) / rows;
    if (blocks > threads) blocks = (blocks + threads - 1) / threads * threads;  // as many for every thread
    rows = (m + blocks - 1) / blocks;
    const int64_t unit = by_line() ? g.out.w : 1, units = m / unit;  // blocks are whole lines
    if (blocks > units) blocks = units;
    // Few pixels, many weights: share out the panels instead, so that every thread reads its own weights
    // only.
    int64_t splits = 1;
    while (blocks * splits < 4 * threads && splits < panels) splits *= 2;
    if (splits > panels) splits = panels;
    const int64_t per_split = (panels + splits - 1) / splits;
    splits = (panels + per_split - 1) / per_split;
    parallel_for(blocks * splits, 1, [&](int64_t begin, int64_t end) {
      Direct mine = *this;
      if (own) {
        const int64_t split_width = per_split * panel_width,
                      padded = (kb + V::kLanes - 1) / V::kLanes * V::kLanes;
        const int64_t from = ka + begin / blocks * split_width;
        int64_t to = ka + ((end - 1) / blocks + 1) * split_width;
        if (to > padded) to = padded;
        float* turned = static_cast<float*>(scratch(3, 4 * steps * (to - from)));
        turn_tasks(*own, from, to, turned, 0, turning_tasks(from, to));
        mine.payload = reinterpret_cast<const char*>(turned);
        mine.first_k = from;
      }
      for (int64_t task = begin; task < end; ++task) {
        // Threads take ranges of tasks, and the first planes may cost less than others: neighbours go to
        // different threads.
        const int64_t split = task / blocks, turn = task % blocks,
                      b = blocks % threads ? turn
                                           : turn % (blocks / threads) * threads + turn / (blocks / threads);
        const int64_t m0 = b * units / blocks * unit, count = (b + 1) * units / blocks * unit - m0;
        const int64_t k0 = ka + split * per_split * panel_width;
        const int64_t k1 = k0 + per_split * panel_width < kb ? k0 + per_split * panel_width : kb;
        mine.block(m0, static_cast<int>(count), k0, k1);
      }
    });
  }

  // ---- weights straight from the parameter

  using Weights = Parameter<V, Math, T>;
  static constexpr int64_t kMostTurned = 8 << 20;  // bytes of turned weights that exist at a time
  static constexpr int64_t kMostOwn = 1 << 20;     // of those that a thread turns for itself
  static constexpr int64_t kFewPixels = 512;

  // Many pixels, few weights: all weights are turned first, as they would be packed. Where they are too many,
  // some output channels after others.
  void run_turned(const Weights& weights) {
    const int64_t panel_width = kPanelVectors * V::kLanes, padded = padded_channels(),
                  threads = thread_pool().threads(), bytes = 4 * steps * padded;
    if (threads > 1 && bytes <= kMostOwn && threads * bytes <= kMostTurned && g.pixels() >= 64 * threads)
      return run(0, g.k, &weights);
    int64_t width = kMostTurned / (4 * steps) / panel_width * panel_width;  // channels at a time
    width = width < panel_width ? panel_width : width > padded ? padded : width;
    struct Memory {
      void* at;
      ~Memory() { give_back(at); }
    } memory{take(4 * steps * width)};
    payload = static_cast<const char*>(memory.at);
    for (int64_t ka = 0; ka < g.k; ka += width) {
      const int64_t end = padded - ka < width ? padded : ka + width;
      turn(weights, ka, end, static_cast<float*>(memory.at));
      first_k = ka;
      run(ka, end < g.k ? end : g.k);
    }
  }

  int64_t padded_channels() const { return (g.k + V::kLanes - 1) / V::kLanes * V::kLanes; }

  // The weights of output channels [ka, end), panel after panel, as run() reads them; ka starts a panel.
  void turn(const Weights& weights, int64_t ka, int64_t end, float* out) const {
    parallel_for(turning_tasks(ka, end), 1,
                 [&](int64_t begin, int64_t stop) { turn_tasks(weights, ka, end, out, begin, stop); });
  }

  // Tasks are 16 channels of input and all taps for one vector of output channels, or a chunk where pairs of
  // input channels lie in different taps.
  int64_t turning_tasks(int64_t ka, int64_t end) const {
    return (g.c % Math::kStep == 0 ? (g.c + 15) / 16 : chunk_count) * ((end - ka) / V::kLanes);
  }
  void turn_tasks(const Weights& weights, int64_t ka, int64_t end, float* out, int64_t begin,
                  int64_t stop) const {
    const int64_t panel_width = kPanelVectors * V::kLanes, lanes = V::kLanes;
    const int64_t pieces = turning_tasks(0, lanes);
    for (int64_t task = begin; task < stop; ++task) {
      const int64_t k = ka + task / pieces * lanes, piece = task % pieces;
      const int64_t k0 = ka + (k - ka) / panel_width * panel_width;
      const int64_t panel = end - k0 < panel_width ? end - k0 : panel_width;
      float* to = out + (k0 - ka) * steps + (k - k0);
      if (g.c % Math::kStep == 0) {
        const int64_t c0 = piece * 16, c1 = g.c - c0 < 16 ? g.c : c0 + 16;
        weights.turn(k, c0, c1, 0, weights.taps, to + c0 / Math::kStep * panel, g.c / Math::kStep * panel,
                     panel);
      } else {
        const Chunk& chunk = chunks[piece];
        T* words = reinterpret_cast<T*>(to + chunk.packed * panel);
        for (int64_t e = 0; e < chunk.steps * Math::kStep; ++e)
          for (int64_t j = 0; j < lanes; ++j)
            words[(e / Math::kStep * panel + j) * Math::kStep + e % Math::kStep] =
                weights.element(chunk, e, k + j, g.kernel.h, g.kernel.w);
      }
    }
  }

  // Input channels that are multiplied at a time; 0 where chunks of all taps would be too short. What is
  // turned for the call has to fit L2, all planes of taps together. Of what is kept, a plane passes at a
  // time, and long runs cost less: 16 steps take 10 to 20 % more time than 64.
  int64_t turned_channels(int max_chunk, bool kept) const {
    const int64_t plane = g.kernel.h * g.kernel.w, width = kPanelVectors * V::kLanes;
    int64_t most = max_chunk / plane, fits = 160 * 1024 / (4 * plane * g.kernel.d * width) * Math::kStep;
    if (!kept && most > fits) most = fits;
    if (most >= g.c) return g.c;
    if (most < 8 * Math::kStep) return 0;
    const int64_t unit = most < 16 ? 8 : 16, pieces = (g.c + most - 1) / most;
    const int64_t even = ((g.c + pieces - 1) / pieces + unit - 1) / unit * unit;
    return even <= most ? even : most / unit * unit;
  }

  // Few pixels, many weights: these are turned a chunk of input channels at a time.
  struct Turning {
    int64_t channels;  // of a chunk
    int64_t plane;     // taps of a plane
    int live;          // planes of taps that touch the input anywhere
    const int64_t* planes;
    // Runs are often a multiple of 4 KiB: without a gap, all taps of a channel would compete for one set of
    // L1.
    static constexpr int64_t kGap = 5 * V::kLanes;

    static int64_t tap_stride(int64_t channels, int64_t width) {
      return channels / Math::kStep * width + kGap;
    }
    // Floats of the chunks before input channel c, all of `width` output channels; c starts a chunk or is the
    // end.
    int64_t before(int64_t c, int64_t width) const {
      return live * plane * (c / Math::kStep * width + (c + channels - 1) / channels * kGap);
    }
    // Floats of the panels before one that starts at output channel k.
    int64_t before_panel(int64_t c, int64_t panel, int64_t k) const {
      return live * plane * (c / Math::kStep * k + panel * ((c + channels - 1) / channels * kGap));
    }
  };
  // Panels of at most `most` vectors: of nearly the same width, and as many for every thread.
  static int64_t panels_of(int64_t vectors, int64_t most, int64_t blocks) {
    int64_t panels = (vectors + most - 1) / most;
    while (panels * blocks % thread_pool().threads() && panels < vectors) ++panels;
    return panels;
  }

  // Turns the weights of input channels [c0, c1) at once, for vectors [from, vectors) of the panel at k.
  void turn_chunk(const Weights& weights, const Turning& t, int64_t k, int from, int vectors, int64_t c0,
                  int64_t c1, float* out) const {
    const int64_t width = vectors * V::kLanes, next_tap = Turning::tap_stride(c1 - c0, width);
    for (int64_t j = from * V::kLanes; j < width; j += V::kLanes)
      if (t.live == g.kernel.d)
        weights.turn(k + j, c0, c1, 0, weights.taps, out + j, next_tap, width);
      else
        for (int l = 0; l < t.live; ++l)
          weights.turn(k + j, c0, c1, t.planes[l] * t.plane, (t.planes[l] + 1) * t.plane,
                       out + l * t.plane * next_tap + j, next_tap, width);
  }

  // Output pixels [m0, m0+count) of the panel of `width` channels at k. Its weights are in `kept`; or they
  // are turned right before they are multiplied, or while the chunk before theirs is, where the registers
  // suffice.
  void turning_block(const Weights& weights, int64_t channels, int64_t m0, int count, int64_t k,
                     int64_t width, const float* kept) const {
    constexpr bool kBetween = V::kTurnTile > 0;
    using Unit = TurnUnit<4 * Math::kStep>;
    const int64_t plane = g.kernel.h * g.kernel.w, taps = weights.taps;
    const int vectors = static_cast<int>(width / V::kLanes);
    const int64_t most_units = kBetween && !kept ? channels * taps : 0;
    Pixel* pixels = static_cast<Pixel*>(scratch(0, count * static_cast<int64_t>(sizeof(Pixel)) +
                                                       taps * count * static_cast<int64_t>(sizeof(void*)) +
                                                       g.kernel.d * static_cast<int64_t>(sizeof(int64_t)) +
                                                       most_units * static_cast<int64_t>(sizeof(Unit))));
    const A** at = reinterpret_cast<const A**>(pixels + count);
    int64_t* planes = reinterpret_cast<int64_t*>(at + taps * count);
    Unit* units = reinterpret_cast<Unit*>(planes + g.kernel.d);
    float* sums = static_cast<float*>(scratch(1, count * width * 4));
    // What units waste goes to the end, one line for each vector.
    const int64_t most_stride = Turning::tap_stride(channels, width),
                  buffer = kept ? 0 : taps * most_stride + (kBetween ? width : 0);
    float* turned = static_cast<float*>(
        scratch(2, (kBetween ? 2 : 1) * buffer * 4 + (g.c + 16) * static_cast<int64_t>(sizeof(A))));
    A* zeros = reinterpret_cast<A*>(turned + (kBetween ? 2 : 1) * buffer);
    fill_zero(zeros, g.c + 16);
    place_pixels(pixels, m0, count);

    Turning t{channels, plane, 0, planes};
    for (int64_t p = 0; p < g.kernel.d; ++p) {
      const A** row = at + t.live * plane * count;
      bool any = false;
      for (int64_t r = 0; r < g.kernel.h; ++r)
        for (int64_t s = 0; s < g.kernel.w; ++s, row += count)
          for (int i = 0; i < count; ++i) {
            const Pixel& pixel = pixels[i];
            const int64_t id = pixel.d + p * g.dilation.d, ih = pixel.h + r * g.dilation.h,
                          iw = pixel.w + s * g.dilation.w;
            const bool inside = id >= 0 && id < g.in.d && ih >= 0 && ih < g.in.h && iw >= 0 && iw < g.in.w;
            any |= inside;
            row[i] = inside ? reinterpret_cast<const A*>(static_cast<const T*>(args.x) + pixel.sample) +
                                  ((id * g.in.h + ih) * g.in.w + iw) * g.c
                            : zeros;
          }
      if (any) planes[t.live++] = p;
    }
    // Tiles of one line of pixels leave out the rows of taps above and below the input.
    const bool by_line = g.kernel.h > 1 && g.out.w >= 3 && g.out.w <= 16 && m0 % g.out.w == 0;
    const int line = by_line ? static_cast<int>(g.out.w) : count;

    Epilogue epilogue;
    Tail tail = epilogue.of(*this, m0, k, vectors);
    if (!t.live) {
      panel_of(vectors, Rows<A>{at, count, 0, 0}, count, count, nullptr, sums, width, true, &tail);
      return;
    }
    // A single run of many steps is cut, so that there is something to do between its parts.
    constexpr int64_t kPart = 16;
    int between = 0;  // vectors that are turned while the chunk before theirs is multiplied
    if (kBetween && !kept && planes[t.live - 1] - planes[0] + 1 == t.live)
      between = static_cast<int>((g.k - k < width ? g.k - k : width) / V::kLanes);
    int64_t unit_channels = 0;
    int unit_count = 0;
    for (int64_t c0 = 0, chunk = 0; c0 < g.c; c0 += channels, ++chunk) {
      const int64_t c1 = g.c - c0 < channels ? g.c : c0 + channels;
      const int run_steps = static_cast<int>((c1 - c0) / Math::kStep);
      const int64_t next_tap = Turning::tap_stride(c1 - c0, width);
      const float* now = kept ? kept + t.before(c0, width) : turned + (between && chunk % 2 ? buffer : 0);
      if (!kept) turn_chunk(weights, t, k, c0 == 0 ? 0 : between, vectors, c0, c1, const_cast<float*>(now));
      Rows<A> rows{at, count, static_cast<int>(plane), run_steps, c0, zeros, nullptr, Turning::kGap * 4};
      if (!kept && plane == 1 && run_steps % kPart == 0) {
        rows.next = rows.gap = 0;
        rows.runs = static_cast<int>(run_steps / kPart);
        rows.steps = kPart;
        rows.advance = kPart * Math::kStep;
      }
      const int64_t stops = t.live * rows.runs * tiles_of(count, line, rows_of_tile(vectors, between > 0));
      auto multiply = [&] {
        Rows<A> of_plane = rows;
        for (int l = 0; l < t.live; ++l, of_plane.at += plane * count)
          panel_of(vectors, of_plane, count, line, reinterpret_cast<const char*>(now + l * plane * next_tap),
                   sums, width, c0 == 0 && l == 0, c1 == g.c && l + 1 == t.live ? &tail : nullptr);
      };
      if (kept || c1 == g.c) {
        multiply();
      } else if constexpr (kBetween) {
        const int64_t next = g.c - c1 < channels ? g.c - c1 : channels;
        if (next != unit_channels) {
          unit_channels = next;
          bool over = false;
          unit_count =
              turn_units<V, Math>(units, weights, next, planes[0] * plane, t.live * plane,
                                  Turning::tap_stride(next, width), width, taps * most_stride, &over);
          // what they would read behind the last row is not ours
          if (over && between && k + between * V::kLanes == g.k) --between;
        }
        const int64_t size = sizeof(T), each_channel = weights.channels_last ? 1 : taps;
        Turner<V, Math> turner{};
        turner.units = units;
        turner.count = unit_count;
        turner.each = static_cast<int>((between * unit_count + stops - 1) / stops);
        turner.row = g.c * taps * size;
        turner.soon = next * each_channel * size;
        turner.partner = Math::kStep == 2 && each_channel > 1 ? taps * size : 0;
        turner.at = reinterpret_cast<const char*>(weights.at + (k * g.c * taps + c1 * each_channel));
        turner.out = turned + (chunk % 2 ? 0 : buffer);
        turner.vectors = between;
        if (between) rows.turner = &turner;
        multiply();
        turner.finish();
      } else {
        Ahead ahead{};
        if (taps > 1) {  // with one tap, there is less to compute than to ask for
          const int64_t next = g.c - c1 < channels ? g.c : c1 + channels;
          ahead = weights.ahead(k, width, c1, next, planes[0] * plane, (planes[t.live - 1] + 1) * plane);
          const int64_t lines = ahead.rows * ahead.segments * ((ahead.bytes + 126) / 64);
          ahead.lines = static_cast<int>((lines + stops - 1) / stops);
          rows.ahead = &ahead;
        }
        multiply();
      }
    }
  }

  void run_turning(const Weights& weights, int64_t channels, const void* kept) const {
    const int64_t m = g.pixels(), lanes = V::kLanes, vectors = (g.k + lanes - 1) / lanes;
    int64_t blocks = (m + kFewPixels - 1) / kFewPixels;
    int64_t rows = (m + blocks - 1) / blocks;
    rows = (rows + g.out.w - 1) / g.out.w * g.out.w;
    blocks = (m + rows - 1) / rows;
    int64_t panels = panels_of(vectors, V::kTurnTile > 0 ? V::kTurnVectors : kPanelVectors, blocks);
    int64_t planes[kMostKeptPlanes];
    Turning t{channels, g.kernel.h * g.kernel.w, 0, planes};
    const float* payload = nullptr;
    if (kept) {
      const auto& header = *static_cast<const KeptHeader*>(kept);
      payload = reinterpret_cast<const float*>(static_cast<const char*>(kept) + sizeof header);
      panels = header.panels;
      t.live = live_planes(planes);
    }
    parallel_for(blocks * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task / blocks, m0 = task % blocks * rows;
        const int64_t from = vectors * panel / panels, to = vectors * (panel + 1) / panels;
        turning_block(weights, channels, m0, static_cast<int>(m - m0 < rows ? m - m0 : rows), from * lanes,
                      (to - from) * lanes,
                      kept ? payload + t.before_panel(g.c, panel, from * lanes) : nullptr);
      }
    });
  }

  // ---- weights that are turned once and kept

  static constexpr int kMostKeptPlanes = 16;

  // Planes of taps that touch the input anywhere.
  int live_planes(int64_t* planes) const {
    int live = 0;
    for (int64_t t = 0; t < g.kernel.d; ++t) {
      bool any = false;
      for (int64_t o = 0; o < g.out.d; ++o) {
        const int64_t id = o * g.stride.d - g.padding.d + t * g.dilation.d;
        any |= id >= 0 && id < g.in.d;
      }
      if (any) planes[live++] = t;
    }
    return live;
  }

  // Turns all weights that matter to `out`, a header first; null only asks for the bytes: 0 where nothing can
  // be kept.
  int64_t keep(const DirectArgs& a, int max_chunk, void* out) const {
    const Weights weights = weights_of(a);
    const int64_t channels = channels_of_chunk(max_chunk, true), lanes = V::kLanes,
                  vectors = padded_channels() / lanes;
    const bool few = channels && g.pixels() <= kFewPixels;
    if (!kSameType || (few && g.kernel.d > kMostKeptPlanes)) return 0;
    int64_t planes[kMostKeptPlanes];
    Turning t{channels, g.kernel.h * g.kernel.w, 0, planes};
    const int64_t panels = few ? panels_of(vectors, kPanelVectors, 1) : 0;
    if (few) t.live = live_planes(planes);
    KeptHeader header{};
    header.bytes = static_cast<int64_t>(sizeof header) +
                   4 * (few ? t.before_panel(g.c, panels, vectors * lanes) : vectors * lanes * steps);
    if (!out) return header.bytes;
    __builtin_memset(out, 0,
                     static_cast<std::size_t>(header.bytes));  // the gaps, too: the same bytes every time
    header.magic = kKeptMagic;
    header.panels = static_cast<int32_t>(panels);
    header.geometry = g;
    __builtin_memcpy(out, &header, sizeof header);
    float* to = reinterpret_cast<float*>(static_cast<char*>(out) + sizeof header);
    if (!few) {
      turn(weights, 0, vectors * lanes, to);
    } else if constexpr (kSameType) {
      parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t from = vectors * panel / panels, width = vectors * (panel + 1) / panels - from;
          for (int64_t c0 = 0; c0 < g.c; c0 += channels)
            turn_chunk(weights, t, from * lanes, 0, static_cast<int>(width), c0,
                       g.c - c0 < channels ? g.c : c0 + channels,
                       to + t.before_panel(g.c, panel, from * lanes) + t.before(c0, width * lanes));
        }
      });
    }
    return header.bytes;
  }

  Weights weights_of(const DirectArgs& a) const {
    return {static_cast<const T*>(a.conv.weight), g.k, g.c, g.kernel.volume(), a.weight_channels_last};
  }
  // The order of the sums must not depend on the threads: nor must this choice.
  int64_t channels_of_chunk(int max_chunk, bool kept) const {
    return kSameType && g.c % Math::kStep == 0 ? turned_channels(max_chunk, kept) : 0;
  }

  void run_parameter(const DirectArgs& a, int max_chunk) {
    const Weights weights = weights_of(a);
    const int64_t channels = channels_of_chunk(max_chunk, a.kept);
    if constexpr (kSameType) {
      if (channels && g.pixels() <= kFewPixels) return run_turning(weights, channels, a.kept);
      if (a.kept) {
        payload = static_cast<const char*>(a.kept) + sizeof(KeptHeader);
        return run(0, g.k);
      }
    }
    run_turned(weights);
  }
};

template <class V, class Math, class T>
Direct<V, Math, T> direct_of(const ConvArgs& args, const Chunk* chunks, int chunk_count, int64_t steps,
                             int max_chunk) {
  return {args,
          args.g,
          chunks,
          chunk_count,
          steps,
          nullptr,
          max_chunk + 2 + 32 / static_cast<int64_t>(sizeof(typename Math::A))};
}

template <class V, class Math, class T>
void run_packed(const ConvArgs& args, const Chunk* chunks, int chunk_count, int64_t steps, int max_chunk) {
  auto d = direct_of<V, Math, T>(args, chunks, chunk_count, steps, max_chunk);
  d.payload = static_cast<const char*>(args.weight) + sizeof(PackHeader);
  d.run(0, args.g.k);
}

template <class V, class Math, class T>
void run_parameter(const DirectArgs& args, const Chunk* chunks, int chunk_count, int64_t steps,
                   int max_chunk) {
  auto d = direct_of<V, Math, T>(args.conv, chunks, chunk_count, steps, max_chunk);
  d.scale = args.scale;
  d.run_parameter(args, max_chunk);
}

// The bytes that `keep` of these arguments takes, and where `out` is not null their turned weights.
template <class V, class Math, class T>
int64_t keep_parameter(const DirectArgs& args, const Chunk* chunks, int chunk_count, int64_t steps,
                       int max_chunk, void* out) {
  return direct_of<V, Math, T>(args.conv, chunks, chunk_count, steps, max_chunk).keep(args, max_chunk, out);
}
