// Loads and stores of the first n lanes in either storage type, over the vector policy V of the includer.

static inline V::Reg ld(const float* p) { return V::load(p); }
static inline V::Reg ld(const uint16_t* p) { return V::load_bf16(p); }
static inline V::Reg ld(const float* p, int n) { return V::load_part(p, n); }
static inline V::Reg ld(const uint16_t* p, int n) { return V::load_bf16_part(p, n); }
static inline void st(float* p, V::Reg v) { V::store(p, v); }
static inline void st(uint16_t* p, V::Reg v) { V::store_bf16(p, v); }
static inline void st(float* p, V::Reg v, int n) { V::store_part(p, v, n); }
static inline void st(uint16_t* p, V::Reg v, int n) { V::store_bf16_part(p, v, n); }

// fn(channel, lanes) over [0, c) in vectors; lanes < kLanes only for the last one
template <class F>
static inline void for_vectors(int64_t c, F&& fn) {
  int64_t i = 0;
  for (; i + V::kLanes <= c; i += V::kLanes) fn(i, V::kLanes);
  if (i < c) fn(i, static_cast<int>(c - i));
}

template <class T>
static inline V::Reg load_lanes(const T* p, int n) {
  return n == V::kLanes ? ld(p) : ld(p, n);
}
template <class T>
static inline void store_lanes(T* p, V::Reg v, int n) {
  n == V::kLanes ? st(p, v) : st(p, v, n);
}
