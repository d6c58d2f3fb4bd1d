#include "winograd.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "parallel.h"

namespace r3d::cpu {
namespace {

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// Rows of G for an axis with m outputs.
struct FilterRows {
  int a, taps;
  const double* g;
};

FilterRows filter_rows(int m) {
  if (m == 2) return {Axis2::a, Axis2::taps, &Axis2::G[0][0]};
  if (m == 4) return {Axis4::a, Axis4::taps, &Axis4::G[0][0]};
  return {1, 1, &Axis1::G[0][0]};
}

}  // namespace

int64_t winograd_payload_bytes(const WinogradTile& tile, int64_t k, int64_t c, int lanes) {
  return 4 * tile.points() * c * round_up(k, lanes);
}

template <class T>
void winograd_pack(const T* weight, const double* scale, int64_t k, int64_t c, const WinogradTile& tile,
                   int lanes, int panel, float* out) {
  const FilterRows d = filter_rows(tile.d), h = filter_rows(tile.h), w = filter_rows(tile.w);
  const int64_t padded = round_up(k, lanes), points = tile.points();
  const int taps = d.taps * h.taps * w.taps;
  parallel_for(padded, 4, [&](int64_t begin, int64_t end) {
    for (int64_t ki = begin; ki < end; ++ki) {
      const int64_t k0 = ki / panel * panel, width = std::min<int64_t>(panel, padded - k0);
      for (int64_t ci = 0; ci < c; ++ci) {
        double f[27] = {};
        if (ki < k)
          for (int i = 0; i < taps; ++i)
            f[i] = widen(weight[(ki * c + ci) * taps + i]) * (scale ? scale[ki] : 1.0);
        // u[x, y, z] = sum_{t, r, s} Gd[x, t] Gh[y, r] Gw[z, s] f[t, r, s], in float64
        for (int x = 0; x < d.a; ++x) {
          double plane[9] = {};
          for (int t = 0; t < d.taps; ++t)
            for (int i = 0; i < h.taps * w.taps; ++i)
              plane[i] += d.g[x * d.taps + t] * f[t * h.taps * w.taps + i];
          for (int y = 0; y < h.a; ++y) {
            double line[3] = {};
            for (int r = 0; r < h.taps; ++r)
              for (int s = 0; s < w.taps; ++s) line[s] += h.g[y * h.taps + r] * plane[r * w.taps + s];
            for (int z = 0; z < w.a; ++z) {
              double u = 0;
              for (int s = 0; s < w.taps; ++s) u += w.g[z * w.taps + s] * line[s];
              const int64_t point = (x * h.a + y) * w.a + z;
              out[k0 * points * c + (point * c + ci) * width + (ki - k0)] = static_cast<float>(u);
            }
          }
        }
      }
    }
  });
}

template void winograd_pack(const float*, const double*, int64_t, int64_t, const WinogradTile&, int, int,
                            float*);
template void winograd_pack(const double*, const double*, int64_t, int64_t, const WinogradTile&, int, int,
                            float*);
template void winograd_pack(const uint16_t*, const double*, int64_t, int64_t, const WinogradTile&, int, int,
                            float*);

}  // namespace r3d::cpu
