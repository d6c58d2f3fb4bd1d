// The register tiles of the direct convolution: what they read, multiply and finish. Included by
// conv3d_kernel.inl.

// What the epilogue of one register tile needs.
struct Tail {
  const float* bias;     // of the panel
  const float* scale;    // of the panel, multiplied into the sums
  const char* residual;  // first row of the tile, or null
  char* y;               // first row of the tile
  int64_t row_bytes;     // from one pixel to the next
  int valid;             // output channels of the panel that exist
  bool bf16, relu;
};

// Hides from the compiler where p comes from: what was loaded there has to be loaded again.
template <class P>
inline __attribute__((always_inline)) void forget(P& p) {
  __asm__("" : "+r"(p));
}

// Multiplies float32 activations with float32 weights.
template <class V>
struct MathF32 {
  using A = float;
  static constexpr int kStep = 1;
  // 32-bit words of weights: n of them from p.
  static inline __attribute__((always_inline)) typename V::Reg words(const float* p, int n) {
    return n == V::kLanes ? V::load(p) : V::load_part(p, n);
  }
  static inline __attribute__((always_inline)) typename V::Reg words(const uint16_t* p, int n) {
    return n == V::kLanes ? V::load_bf16(p) : V::load_bf16_part(p, n);
  }
  // Steps [begin, end) of the pixels [LO, HI) of a tile.
  template <int LO, int HI, int MR, int NV>
  static inline __attribute__((always_inline)) void run(typename V::Reg (&acc)[MR][NV], const A* const* rows,
                                                        int64_t offset, const char* weights, int begin,
                                                        int end) {
    const float* b = reinterpret_cast<const float*>(weights) + static_cast<int64_t>(begin) * NV * V::kLanes;
    constexpr bool kMemory = V::last_in_memory(HI - LO, NV);
    constexpr int kHeld = kMemory ? NV - 1 : NV;
    const A* a[MR];
    for (int i = LO; i < HI; ++i) a[i] = rows[i] + offset;
#pragma GCC unroll 2
    for (int e = begin; e < end; ++e) {
      typename V::Reg w[NV];
      for (int j = 0; j < kHeld; ++j) w[j] = V::load(b + j * V::kLanes);
      const float* last = b + kHeld * V::kLanes;
      for (int i = LO; i < HI; ++i) {
        const typename V::Reg v = V::broadcast(a[i] + e);
        for (int j = 0; j < kHeld; ++j) acc[i][j] = V::fma(v, w[j], acc[i][j]);
        if constexpr (kMemory) {
          forget(last);  // a compiler would load it once, and run out of registers
          acc[i][kHeld] = V::fma(v, V::load(last), acc[i][kHeld]);
        }
      }
      b += NV * V::kLanes;
    }
  }
  template <int NV>
  static inline __attribute__((always_inline)) void store_row(uint16_t* y, const typename V::Reg (&v)[NV]) {
    for (int j = 0; j < NV; ++j) V::store_bf16(y + j * V::kLanes, v[j]);
  }
};

// Where a tile reads its activations: `runs` runs of `steps` steps each; at[run * next + pixel] + offset
// points to a run, and the offset grows by `advance` from run to run. Where it is `zeros` for all pixels of
// the tile, the run is left out.
template <class A>
struct Rows {
  const A* const* at;
  int64_t next;
  int runs, steps;
  int64_t offset = 0;
  const A* zeros = nullptr;
  Ahead* ahead = nullptr;
  int64_t gap = 0;  // bytes between the weights of one run and those of the next
  // The first pixel of a line lies outside the input before step `from` of a run, the last one from step
  // `to`.
  int from = 0, to = INT32_MAX;
  int64_t advance = 0;
  void* turner = nullptr;  // a Turner of the same V and Math: works between the runs
};

// Finishes `count` pixels whose panel is not full, from sums in memory.
template <class V>
void finish_part(const float* sums, int64_t ld, int count, const Tail& tail) {
  for (int i = 0; i < count; ++i, sums += ld)
    for (int j = 0; j < tail.valid; j += V::kLanes) {
      const int left = tail.valid - j, n = left < V::kLanes ? left : V::kLanes;
      typename V::Reg v = V::fma(V::load(sums + j), V::load(tail.scale + j), V::load(tail.bias + j));
      const int64_t at = i * tail.row_bytes + j * (tail.bf16 ? 2 : 4);
      if (tail.residual) {
        const char* r = tail.residual + at;
        v = V::add(v, tail.bf16 ? V::load_bf16_part(reinterpret_cast<const uint16_t*>(r), n)
                                : V::load_part(reinterpret_cast<const float*>(r), n));
      }
      if (tail.relu) v = V::relu(v);
      if (tail.bf16)
        V::store_bf16_part(reinterpret_cast<uint16_t*>(tail.y + at), v, n);
      else
        V::store_part(reinterpret_cast<float*>(tail.y + at), v, n);
    }
}

// rows * weights for MR pixels and NV vectors of output channels, added to the partial sums in `sums` unless
// this is the `first` chunk; `tail` finishes the tile instead of writing partial sums back.
template <class V, class Math, int MR, int NV>
void tile(const Rows<typename Math::A>& rows, const char* weights, float* sums, int64_t ld, bool first,
          const Tail* tail) {
  typename V::Reg acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) acc[i][j] = V::zero();
  if (tail) {
    // Lines that the residual and the stores will want; for few products, asking for the latter takes longer
    // than it saves.
    const int64_t width = tail->valid * (Math::kStep == 2 || tail->bf16 ? 2 : 4);
    const bool many = rows.runs * rows.steps >= 128;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
      for (int64_t o = 0; o < width; o += 64) {
        if (many) __builtin_prefetch(tail->y + i * tail->row_bytes + o, 1, 3);
        if (tail->residual) __builtin_prefetch(tail->residual + i * tail->row_bytes + o, 0, 3);
      }
  }
  bool any = false;
  const typename Math::A* const* at = rows.at;
  const int64_t next_run = rows.gap + static_cast<int64_t>(rows.steps) * NV * V::kLanes * 4;
  int64_t offset = rows.offset;
  for (int run = 0; run < rows.runs; ++run, at += rows.next, offset += rows.advance, weights += next_run) {
    if (rows.ahead) rows.ahead->step();
    if constexpr (MR * NV <= V::kTurnTile)
      if (rows.turner) static_cast<Turner<V, Math>*>(rows.turner)->step();
    bool live = false;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) live |= at[i] != rows.zeros;
    if (!live) continue;
    any = true;
    const typename Math::A* const* in = at;
    forget(in);  // the pointers would be kept in vector registers
    int from = rows.from, to = rows.to < rows.steps ? rows.to : rows.steps;
    if constexpr (MR > 1) {
      // Products with padding at the ends of a line are left out: at one end, where the other end's pixel
      // lies inside the input for a part of the run only.
      if (at[0] == rows.zeros && to == rows.steps)
        from = to = rows.steps;
      else if (at[MR - 1] == rows.zeros && from == 0)
        from = to = 0;
      if (from > 0) Math::template run<1, MR>(acc, in, offset, weights, 0, from);
    }
    Math::template run<0, MR>(acc, in, offset, weights, from, to);
    if constexpr (MR > 1)
      if (to < rows.steps) Math::template run<0, MR - 1>(acc, in, offset, weights, to, rows.steps);
  }
  if (!any && !first && !tail) return;
  // Sums of chunks, then a sum of those: rounding grows with the two lengths, not with their product.
  if (!first)
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) acc[i][j] = V::add(V::load(sums + i * ld + j * V::kLanes), acc[i][j]);
  const bool part = tail && tail->valid < NV * V::kLanes;
  if (!tail || part) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) V::store(sums + i * ld + j * V::kLanes, acc[i][j]);
    if (part) finish_part<V>(sums, ld, MR, *tail);
    return;
  }
#pragma GCC unroll 16
  for (int j = 0; j < NV; ++j) {
    const typename V::Reg scale = V::load(tail->scale + j * V::kLanes),
                          bias = V::load(tail->bias + j * V::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) acc[i][j] = V::fma(acc[i][j], scale, bias);
  }
  // -inf is below everything, and NaN passes
  const typename V::Reg floor = V::set(tail->relu ? 0.f : -__builtin_inff());
  const bool bf16 = Math::kStep == 2 || tail->bf16;
  // Row by row: lines that follow one another are written one after another.
  auto finish = [&](auto residual) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j)
        acc[i][j] = V::max_number(floor, residual(acc[i][j], i * tail->row_bytes, j * V::kLanes));
      char* y = tail->y + i * tail->row_bytes;
      if (bf16)
        Math::template store_row<NV>(reinterpret_cast<uint16_t*>(y), acc[i]);
      else
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) V::store(reinterpret_cast<float*>(y) + j * V::kLanes, acc[i][j]);
    }
  };
  if (!tail->residual)
    finish([](typename V::Reg v, int64_t, int) __attribute__((always_inline)) { return v; });
  else if (bf16)
    finish([&](typename V::Reg v, int64_t row, int j) __attribute__((always_inline)) {
      return V::add(v, V::load_bf16(reinterpret_cast<const uint16_t*>(tail->residual + row) + j));
    });
  else
    finish([&](typename V::Reg v, int64_t row, int j) __attribute__((always_inline)) {
      return V::add(v, V::load(reinterpret_cast<const float*>(tail->residual + row) + j));
    });
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
