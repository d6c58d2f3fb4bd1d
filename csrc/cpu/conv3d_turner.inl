// Turning weights between the products of others. The shuffles that turn a parameter (conv3d_parameter.inl)
// and the multiply-adds wait for different parts of a core: a few shuffles after every run of products cost
// next to nothing, where a phase of their own takes as long as the products of six pixels. Included by
// conv3d_kernel.inl.

// Where one step of turning reads in every row, and where its columns go.
template <int N>
struct TurnUnit {
  int32_t from;   // bytes
  int32_t to[N];  // floats
};

// Turns the weights of one chunk of input channels, a unit at every `step`.
template <class V, class Math>
struct Turner {
  // four words of a row; where neighbours in a word belong to different taps, eight taps of two channels
  static constexpr int kWords = 4, kColumns = kWords * Math::kStep;
  using Unit = TurnUnit<kColumns>;

  const Unit* units;
  int count, each;  // units a vector of output channels; units at every step
  int64_t row;      // bytes from one output channel to the next
  int64_t soon;     // bytes to the weights of the chunk after this one, which are asked for
  int64_t partner;  // bytes from a channel to the next where units are pairs of channels, else 0
  const char* at;   // the first of kLanes rows
  float* out;
  int vectors, unit = 0;  // left, and the next one of the vector at hand

  inline __attribute__((always_inline)) void step() {
    for (int left = each; left > 0 && vectors > 0; --left) turn();
  }
  void finish() {
    while (vectors > 0) turn();
  }

  inline __attribute__((always_inline)) void turn() {
    const Unit& u = units[unit];
    const char* p = at + u.from;
    // a line of every row serves four units
    const char* ahead = p + soon + (unit & 3) * (V::kLanes / 4) * row;
    for (int i = 0; i < V::kLanes / 4; ++i, ahead += row) __builtin_prefetch(ahead, 0, 2);
    typename V::Reg r[kWords];
    V::four_columns(reinterpret_cast<const float*>(p), row / 4, r);
    if constexpr (Math::kStep == 2) {
      if (partner) {
        typename V::Reg s[kWords];
        V::four_columns(reinterpret_cast<const float*>(p + partner), row / 4, s);
#pragma GCC unroll 4
        for (int i = 0; i < kWords; ++i) {
          V::store(out + u.to[2 * i], Math::low_halves(r[i], s[i]));
          V::store(out + u.to[2 * i + 1], Math::high_halves(r[i], s[i]));
        }
        return next();
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kWords; ++i) V::store(out + u.to[i], r[i]);
    next();
  }

  inline __attribute__((always_inline)) void next() {
    if (++unit < count) return;
    unit = 0;
    at += V::kLanes * row;
    out += V::kLanes;
    --vectors;
  }
};

// The units of `channels` input channels and the taps [t0, t0+live) of each, for a buffer in which taps lie
// `tap_stride` and steps `width` floats apart; columns that nobody wants go to `waste`. Returns how many
// there are: at most channels * taps. `over` tells whether units read behind the weights of their channels.
template <class V, class Math, class Weights>
int turn_units(typename Turner<V, Math>::Unit* units, const Weights& weights, int64_t channels, int64_t t0,
               int64_t live, int64_t tap_stride, int64_t width, int64_t waste, bool* over) {
  constexpr int64_t kSize = Math::kStep == 2 ? 2 : 4;
  const int64_t taps = weights.taps;
  int count = 0;
  *over = false;
  // Units of `columns` columns for `n` columns from byte `from` on; the last one overlaps the one before it.
  auto cut = [&](int64_t from, int64_t n, int64_t columns, auto place) {
    for (int64_t e = 0; e < n; e += columns) {
      int64_t first = e;
      if (e + columns > n) first = n < columns ? 0 : n - columns;
      *over |= first + columns > n;
      auto& u = units[count++];
      u.from = static_cast<int32_t>(from + first * (columns == 4 ? 4 : 2));  // words, or single taps
      for (int64_t q = 0; q < columns; ++q)
        u.to[q] = static_cast<int32_t>(first + q < n ? place(first + q) : waste);
    }
  };
  if (weights.channels_last || taps == 1) {
    for (int64_t t = 0; t < live; ++t)
      cut((t0 + t) * weights.c * kSize, channels / Math::kStep, 4,
          [&](int64_t e) { return t * tap_stride + e * width; });
  } else if constexpr (Math::kStep == 2) {
    for (int64_t c = 0; c < channels; c += 2)
      cut((c * taps + t0) * kSize, live, 8, [&](int64_t t) { return t * tap_stride + c / 2 * width; });
  } else if (live == taps) {
    cut(0, channels * taps, 4, [&](int64_t e) { return e % taps * tap_stride + e / taps * width; });
  } else {
    for (int64_t c = 0; c < channels; ++c)
      cut((c * taps + t0) * kSize, live, 4, [&](int64_t t) { return t * tap_stride + c * width; });
  }
  return count;
}
