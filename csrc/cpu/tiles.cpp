#include "tiles.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "parallel.h"

namespace r3d::cpu {
namespace {

constexpr int64_t kPanelBytes =
    352 << 10;  // of weights: with the pixels and the sums it fits into an L2 of 2 MiB

constexpr int64_t kMostGrouped = 16;  // kernel rows of one scratch pixel: the kernel has room for 24
constexpr int64_t kMostTaps = 1024;   // 6 MiB of weights for 32 channels of input and output

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

TilesAxis plan_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation, int m, int64_t group) {
  TilesAxis a;
  if (m > 1) {
    a.points = WinogradTile::inputs(m);
    a.outputs = m;
    a.units = ceil_div(out, m);
    a.taps = {{0, 0, 0}};
    a.phase = {0};
    return a;
  }
  a.units = out;
  for (int64_t t = 0; t < kernel; t += group) {
    // some output sees the input through this tap, or through one of its group
    const int64_t first = t * dilation - padding, last = (t + group - 1) * dilation - padding;
    bool sees = false;
    for (int64_t o = 0; o < out && !sees; ++o) sees = o * stride + last >= 0 && o * stride + first < in;
    if (!sees && !(a.taps.empty() && t + group >= kernel)) continue;
    const int offset = static_cast<int>(t * dilation % stride);
    auto at = std::find(a.phase.begin(), a.phase.end(), offset);
    const int phase = static_cast<int>(at - a.phase.begin());
    if (at == a.phase.end()) a.phase.push_back(offset);
    const int shift = static_cast<int>(t * dilation / stride);
    a.taps.push_back({phase, shift, static_cast<int>(t / group)});
    a.halo = std::max<int64_t>(a.halo, shift);
  }
  return a;
}

}  // namespace

const char* tiles_refuse(const TilesArgs& args) {
  const ConvGeometry& g = args.conv.g;
  if (args.slices < 1 || args.slices > 3) return "slices: expected 1, 2 or 3";
  if (args.conv.dtype == DType::kBFloat16 && args.slices != 1) return "bfloat16 has one slice";
  if (g.kernel.volume() > kMostTaps) return "weight: tiles take kernels of at most 1024 taps";
  const WinogradTile& t = args.tile;
  auto known = [](int m) { return m == 1 || m == 2 || m == 4; };
  if (!known(t.d) || !known(t.h) || t.w != 1 || (t.d > 1 && t.h == 4))
    return "tile: expected [1, 1, 1], [2, 1, 1], [4, 1, 1], [1, 2, 1], [1, 4, 1], [2, 2, 1] or [4, 2, 1]";
  auto fits = [](int m, int64_t kernel, int64_t stride, int64_t dilation) {
    return m == 1 || (kernel == 3 && stride == 1 && dilation == 1);
  };
  if (!fits(t.d, g.kernel.d, g.stride.d, g.dilation.d) || !fits(t.h, g.kernel.h, g.stride.h, g.dilation.h))
    return "Winograd needs a kernel of 3 with stride 1 and dilation 1 along its axis";
  if ((t.d > 1 && g.kernel.h > 3) || (t.h > 1 && g.kernel.d > 3))
    return "Winograd needs kernels of at most 3 along depth and height";
  return nullptr;
}

TilesPlan plan_tiles(const TilesArgs& args) {
  const ConvGeometry& g = args.conv.g;
  TilesPlan p;
  const bool winograd = args.tile.d > 1 || args.tile.h > 1;
  // Merging the taps of a row pays where a channel vector does not fill its steps.
  p.merged = g.c % 32 != 0 && g.dilation.w == 1 && g.kernel.w > 1 && g.kernel.w * g.c < 1024 && !winograd &&
             ceil_div(g.kernel.w * g.c, 32) < g.kernel.w * ceil_div(g.c, 32);
  if (p.merged && g.c <= 16) {
    int64_t best = g.kernel.h * ceil_div(g.kernel.w * g.c, 32);
    for (int group = 2; group <= std::min<int64_t>(g.kernel.h, kMostGrouped); ++group) {
      const int64_t steps = ceil_div(g.kernel.h, group) * ceil_div(g.kernel.w * g.c * group, 32);
      if (steps < best) {
        best = steps;
        p.group = group;
      }
    }
  }
  p.d = plan_axis(g.in.d, g.out.d, g.kernel.d, g.stride.d, g.padding.d, g.dilation.d, args.tile.d, 1);
  p.h = plan_axis(g.in.h, g.out.h, g.kernel.h, g.stride.h, g.padding.h, g.dilation.h, args.tile.h, p.group);
  const int dt = static_cast<int>(p.d.taps.size()), ht = static_cast<int>(p.h.taps.size());
  const int64_t points = p.d.points * p.h.points, blocks = ceil_div(g.c, 32);
  // weights of 32 channels for 32 output channels
  const int64_t bytes = points * dt * ht * g.kernel.w * args.slices * 2048;
  const int64_t panel = winograd ? 2 * kPanelBytes : kPanelBytes;
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(panel / bytes, 16));
  p.width = p.merged || blocks <= most ? g.c : ceil_div(blocks, ceil_div(blocks, most)) * 32;
  p.pixel = p.width * p.group;
  p.picks = g.kernel.w == 1 && g.stride.w > 1;
  const int64_t stride = p.picks ? 1 : g.stride.w;
  p.unit = stride * p.pixel;
  p.pitch = ceil_div((g.out.w - 1) * stride + (g.kernel.w - 1) * g.dilation.w + 1, stride);

  if (p.merged) {
    const int64_t len = g.kernel.w * p.pixel;
    p.padded = ceil_div(len, 32) * 32;
    for (int t = 0; t < dt; ++t)
      for (int r = 0; r < ht; ++r)
        for (int64_t e = 0; e < len; e += 32) p.steps.push_back({t, r, e});
    p.chunks.push_back({0, g.c, 0, static_cast<int>(p.steps.size())});
    return p;
  }
  for (int64_t c0 = 0; c0 < g.c; c0 += p.width) {
    const int first = static_cast<int>(p.steps.size());
    const int64_t c1 = std::min(g.c, c0 + p.width);
    for (int t = 0; t < dt; ++t)
      for (int r = 0; r < ht; ++r)
        for (int64_t c = c0; c < c1; c += 32)
          for (int64_t s = 0; s < g.kernel.w; ++s)
            p.steps.push_back({t, r, s * g.dilation.w * p.pixel + c - c0});
    p.chunks.push_back({c0, c1, first, static_cast<int>(p.steps.size()) - first});
  }
  return p;
}

TilesBlock choose_block(const TilesArgs& args, const TilesPlan& p, int threads) {
  const ConvGeometry& g = args.conv.g;
  const int64_t panels = ceil_div(g.k, 32), points = p.d.points * p.h.points;
  const int64_t chunks = static_cast<int64_t>(p.chunks.size());
  int most = 0;
  for (const TilesChunk& c : p.chunks) most = std::max(most, c.count);
  // pixels, a panel of weights and the sums that wait stay in L2 together
  const int64_t limit = std::max(l2_bytes() / 4, l2_bytes() * 7 / 10 - points * most * args.slices * 2048);
  // cycles as measured: a step is six tile products for each pair of operand slices
  const double step = 1.1 * 16 * 2 * args.slices * (args.slices + 1) / 2;
  const double spread = static_cast<double>(points) / ((p.d.points > 1 ? 3 : 1) * (p.h.points > 1 ? 3 : 1));
  const double weight = 0.5 + spread * (0.2 + 0.2 * args.slices), element = 0.4 + 0.3 * args.slices;
  const double weights = 32.0 * static_cast<double>(g.c * g.kernel.volume());  // of a panel
  TilesBlock best{1, 1, 1, 1};
  double least = HUGE_VAL;
  auto consider = [&](int64_t n, int64_t d, int64_t h) {
    const int64_t rows = n * (d + p.d.halo) * static_cast<int64_t>(p.d.phase.size()) * (h + p.h.halo) *
                         static_cast<int64_t>(p.h.phase.size());
    const int64_t elements = rows * p.pitch * p.unit * points;
    const int64_t blocks = ceil_div(g.n, n) * ceil_div(p.d.units, d) * ceil_div(p.h.units, h);
    const double tiles = std::ceil(static_cast<double>(n * d * (h * p.pitch)) / 16);
    for (int64_t splits = 1;; splits *= 2) {
      const int64_t mine = ceil_div(panels, std::min(splits, panels));
      const double sums = chunks > 1 ? tiles * static_cast<double>(points * 2048 * mine) : 0;
      const double bytes = static_cast<double>(2 * elements * args.slices) + sums;
      const double task =
          static_cast<double>(elements * chunks) * element +
          static_cast<double>(mine) * (weights * weight + tiles * static_cast<double>(points) *
                                                              (static_cast<double>(p.steps.size()) * step +
                                                               60.0 * static_cast<double>(chunks)));
      // beyond L2 everything waits for memory
      const double slow = bytes > static_cast<double>(limit) ? bytes / static_cast<double>(limit) : 1;
      const double all = task * slow * static_cast<double>(ceil_div(blocks * splits, threads));
      if (all < least) {
        least = all;
        best = {n, d, h, std::min(splits, panels)};
      }
      if (splits >= panels) break;
    }
  };
  auto parts = [](int64_t units, auto&& fn) {
    int64_t last = 0;
    for (int64_t count : {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64}) {
      const int64_t size = ceil_div(units, std::min<int64_t>(count, units));
      if (size != last) fn(size);
      last = size;
      if (size == 1) return;
    }
    fn(1);
  };
  parts(p.d.units, [&](int64_t d) { parts(p.h.units, [&](int64_t h) { consider(1, d, h); }); });
  for (int64_t n = 2; n <= g.n; n *= 2) consider(n, p.d.units, p.h.units);
  return best;
}

void conv3d_tiles(const TilesArgs& args, bool hardware) {
  if (args.conv.g.pixels() == 0 || args.conv.g.k == 0) return;
  const TilesPlan p = plan_tiles(args);
  auto axis = [](const TilesAxis& a) {
    return TilesAxisView{a.points,
                         a.outputs,
                         static_cast<int>(a.phase.size()),
                         static_cast<int>(a.taps.size()),
                         a.units,
                         a.halo,
                         a.taps.data(),
                         a.phase.data()};
  };
  const TilesView view{axis(p.d),       axis(p.h),
                       p.group,         p.picks,
                       p.merged,        p.width,
                       p.pixel,         p.unit,
                       p.pitch,         p.padded,
                       p.steps.data(),  static_cast<int>(p.steps.size()),
                       p.chunks.data(), static_cast<int>(p.chunks.size())};
  const TilesBlock block = choose_block(args, p, thread_pool().threads());
#if R3D_X86
  if (hardware) return conv3d_tiles_amx(args, view, block);
#endif
  (void)hardware;
  conv3d_tiles_plain(args, view, block);
}

}  // namespace r3d::cpu
