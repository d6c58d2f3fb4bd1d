#include "stem.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "numbers.h"
#include "parallel.h"

namespace r3d::cpu {
namespace {

constexpr int kMostPanel = 64, kMostTaps = 7;
constexpr int64_t kChunk = 48;  // steps: fewer cost time, more cost accuracy

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FilterRows {
  int a;
  const double* g;  // [a][taps]
};

FilterRows filter_rows(int m, int64_t taps) {
#define R3D_STEM_TILE(M, R) \
  if (m == M && taps == R) return {StemTile<M, R>::a, &StemTile<M, R>::mats.g[0][0]};
  R3D_STEM_TILES(R3D_STEM_TILE)
#undef R3D_STEM_TILE
  return {0, nullptr};
}

struct Height {
  int points;  // products along height
  FilterRows even, odd;
};

Height height_of(int m) {
  return {m == 4 ? StemRowTile<4>::points : StemRowTile<2>::points, filter_rows(m, 4), filter_rows(m, 3)};
}

template <class W>
void transform(const StemArgs& args, const StemPlan& plan, int lanes, int panel, float* out) {
  const ConvGeometry& g = args.conv.g;
  const int taps = static_cast<int>(stem_taps(g));
  const FilterRows f = filter_rows(args.tile, taps);
  const int64_t padded = ceil_div(g.k, lanes) * lanes, total = plan.runs * plan.steps;
  const bool last = args.weight_channels_last;
  const int64_t c_stride = last ? 1 : g.kernel.volume(), s_stride = last ? g.c : 1;
  const int64_t r_stride = s_stride * g.kernel.w, t_stride = r_stride * g.kernel.h;
  const W* weight = static_cast<const W*>(args.conv.weight);
  parallel_for(total, 16, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t run = e / plan.steps, step = e % plan.steps, line = run % plan.lines;
      const int64_t phase = args.planes ? line / g.c : line, c = args.planes ? line % g.c : step % plan.inner;
      // The kernel's rows and their factors in this run.
      int64_t first = run / plan.lines, row_step = 1, rows = 1;
      const double one = 1, *factors = &one;
      if (args.row_tile > 1) {
        const Height h = height_of(args.row_tile);
        const bool odd = first >= h.even.a;
        factors = odd ? h.odd.g + (first - h.even.a) * 3 : h.even.g + first * 4;
        rows = odd ? 3 : 4;
        first = odd;
        row_step = 2;
      }
      const W* from = weight + c * c_stride + first * r_stride + step / plan.inner * s_stride;
      for (int64_t k0 = 0; k0 < padded; k0 += panel) {
        const int width = static_cast<int>(std::min<int64_t>(panel, padded - k0));
        double w[kMostTaps][kMostPanel] = {};
        const int64_t exist = std::min<int64_t>(width, g.k - k0);
        for (int64_t i = 0; i < exist; ++i)
          for (int64_t t = 0; t < taps && t * g.stride.d + phase < g.kernel.d; ++t) {
            const W* column = from + (k0 + i) * g.c * g.kernel.volume() + (t * g.stride.d + phase) * t_stride;
            for (int64_t r = 0; r < rows; ++r) w[t][i] += factors[r] * widen(column[r * row_step * r_stride]);
          }
        for (int p = 0; p < f.a; ++p) {
          double sum[kMostPanel] = {};
          for (int t = 0; t < taps; ++t) {
            const double factor = f.g[p * taps + t];
            for (int i = 0; i < width; ++i) sum[i] += factor * w[t][i];
          }
          float* to = out + k0 * f.a * total + (p * total + e) * width;
          for (int i = 0; i < width; ++i) to[i] = static_cast<float>(sum[i]);
        }
      }
    }
  });
}

}  // namespace

const char* stem_refuses(const ConvGeometry& g, int tile, int row_tile) {
  if (g.c > 4) return "x: stems have at most 4 channels";
  if (g.stride.d > 2) return "stride: stems have a stride of 1 or 2 along depth";
  if (g.kernel.d > kMostTaps) return "weight: stems have a kernel of at most 7 along depth";
  const int64_t taps = stem_taps(g);
  if (taps < 3 && (g.kernel.d != 1 || g.stride.d != 1))
    return "weight: stems have a kernel of 1 or at least 3 along depth, at least 5 with a stride of 2";
  if (!filter_rows(tile, taps).a)
    return "tile: expected 2, 4, 6 (for 5 or 7 taps along depth) or 8 (for 3 or 4; a stride of 2 halves "
           "them), and 1 for one tap";
  if (row_tile != 1 && row_tile != 2 && row_tile != 4) return "row_tile: expected 1, 2 or 4";
  if (row_tile > 1 && (g.kernel.h != 7 || g.stride.h != 2))
    return "row_tile: more than 1 is for kernels of 7 with a stride of 2 along height";
  return nullptr;
}

StemPlan plan_stem(const StemArgs& args, int threads) {
  const ConvGeometry& g = args.conv.g;
  StemPlan p{};
  p.inner = args.planes ? 1 : g.c;
  p.lines = args.planes ? g.stride.d * g.c : g.stride.d;
  const int row_tile = args.row_tile, products = row_tile > 1 ? height_of(row_tile).points : 0;
  p.runs = (row_tile > 1 ? products : g.kernel.h) * p.lines;
  p.steps = g.kernel.w * p.inner;
  p.pitch = ceil_div(((g.out.w - 1) * g.stride.w + g.kernel.w) * p.inner, 16) * 16;
  // as many runs in every chunk as can be
  const int64_t chunks = ceil_div(p.runs, std::max<int64_t>(1, kChunk / p.steps));
  p.chunk = ceil_div(p.runs, chunks);
  const double points = filter_rows(args.tile, stem_taps(g)).a;
  const double line = static_cast<double>(p.lines * p.pitch), room = static_cast<double>(l2_bytes()) / 4;
  double least = HUGE_VAL;
  for (int64_t tasks = 1; tasks <= g.out.h; ++tasks) {  // of one tile of frames
    const int64_t tiles = ceil_div(ceil_div(g.out.h, tasks), row_tile), rows = tiles * row_tile;
    if (p.rows == rows) continue;
    const double in_rows = static_cast<double>((rows - 1) * g.stride.h + g.kernel.h);
    const double bytes = 4 * points * in_rows * line;
    if (bytes > room && tiles > 1) continue;
    // cycles, as if of sixteen lanes
    const double pixels = points * static_cast<double>(tiles * g.out.w * g.k);
    const double work =
        pixels * (static_cast<double>(p.runs * p.steps) / 30 + (row_tile > 1 ? 0.1 * products : 0.3)) +
        points * in_rows * line * 0.4;
    const int64_t all = g.n * ceil_div(g.out.d, args.tile) * ceil_div(g.out.h, rows);
    const double cycles = work * static_cast<double>(ceil_div(all, threads));
    if (cycles < least) {
      least = cycles;
      p.rows = rows;
    }
  }
  return p;
}

int64_t stem_weights_bytes(const StemArgs& args, const StemPlan& plan, int lanes) {
  const ConvGeometry& g = args.conv.g;
  return 4 * filter_rows(args.tile, stem_taps(g)).a * plan.runs * plan.steps * ceil_div(g.k, lanes) * lanes;
}

void stem_weights(const StemArgs& args, const StemPlan& plan, int lanes, int panel, float* out) {
  args.conv.dtype == DType::kBFloat16 ? transform<uint16_t>(args, plan, lanes, panel, out)
                                      : transform<float>(args, plan, lanes, panel, out);
}

void conv3d_stem(const StemArgs& args) {
  if (args.conv.g.pixels() == 0 || args.conv.g.k == 0) return;
  kernels(active_isa()).stem(args);
}

}  // namespace r3d::cpu
