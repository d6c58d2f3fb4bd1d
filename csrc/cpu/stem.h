// Stems: convolutions of few input channels, with fewer multiplications along depth (time).
//
// Toom-Cook / Winograd minimal filtering (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin &
// Gray, CVPR 2016) along depth: m outputs of a filter of r taps from a = m + r - 1 products in place of
// m * r. One to four channels make the input transform nearly free, width stays direct, with any stride.
// A stride of 2 along depth takes its two input phases for channels of a filter of half the taps. Seven rows
// with a stride of 2 along height may be taken apart likewise, here into a filter of four taps on even input
// rows and one of three on odd rows: M output rows from 2 M + 5 products in place of 7 M. Stems without a
// kernel along depth, as those of R(2+1)D, have that alone.
//
// Points are 0, pairs of +-p, and infinity where a is even. Pairs halve the transforms: for +-p the rows of
// the input transform are E + p O and E - p O, and the output needs the sum and the difference of two
// products only. The p below came out of a search for the least amplification of rounding over multiples of
// 1/16; they are near tan(i pi / a), evenly spread over the projective line, and nearly all coefficients are
// exact in float32. F(4,7) with them has a third of the error of 0, +-1, +-1/2, +-2, +-1/4, infinity.
//
// Relative L2 error against float64 as measured, 7x7 kernels, 1 to 4 channels (stride 2 along depth doubles
// them), the worst of normal data, ReLU of it, uniform 0..255, and 0..255 nearly static with and without
// normalisation; the first is always the worst (the stock layer and the direct kernel: 2 to 3e-7).
//   F(2,3) 1.7e-7   F(4,3) 3.0e-7   F(8,3) 1.5e-6   F(2,4) 2.4e-7   F(4,4) 4.4e-7
//   F(8,4) 2.3e-6   F(2,5) 3.1e-7   F(4,5) 5.9e-7   F(6,5) 1.3e-6   F(2,6) 4.6e-7
//   F(4,6) 9.1e-7   F(2,7) 6.8e-7   F(4,7) 1.4e-6   F(6,7) 3.3e-6   (F(8,7) would have about 8e-6)
// Row tiles of two have 1.3 times that, those of four 2.3 times.
#pragma once

#include "../conv3d.h"

namespace r3d::cpu {

template <int A>
struct StemPoints;  // the positive ones
template <>
struct StemPoints<4> {
  static constexpr double p[] = {1};
};
template <>
struct StemPoints<5> {
  static constexpr double p[] = {13. / 16, 5. / 2};
};
template <>
struct StemPoints<6> {
  static constexpr double p[] = {5. / 8, 3. / 2};
};
template <>
struct StemPoints<7> {
  static constexpr double p[] = {9. / 16, 9. / 8, 7. / 2};
};
template <>
struct StemPoints<8> {
  static constexpr double p[] = {1. / 2, 1, 2};
};
template <>
struct StemPoints<9> {
  static constexpr double p[] = {7. / 16, 7. / 8, 3. / 2, 4};
};
template <>
struct StemPoints<10> {
  static constexpr double p[] = {7. / 16, 13. / 16, 5. / 4, 5. / 2};
};
template <>
struct StemPoints<11> {
  static constexpr double p[] = {3. / 8, 3. / 4, 9. / 8, 7. / 4, 5};
};
template <>
struct StemPoints<12> {
  static constexpr double p[] = {3. / 8, 11. / 16, 1, 3. / 2, 11. / 4};
};

template <int M, int R>
struct StemMatrices {
  static constexpr int a = M + R - 1, pairs = (a - 1) / 2;
  static constexpr bool infinity = a % 2 == 0;
  // Products are in the order 0, +p0, -p0, +p1, ..., infinity.
  double all[pairs + 1] = {};     // prod (x^2 - p^2), coefficients of x^0, x^2, ...
  double but[pairs][pairs] = {};  // the same without one pair
  double p[pairs] = {};
  double power[M][pairs] = {};  // p^i
  double g[a][R] = {};          // filter transform

  constexpr StemMatrices() {
    all[0] = 1;
    for (int q = 0; q < pairs; ++q) {
      p[q] = StemPoints<a>::p[q];
      for (int i = q + 1; i > 0; --i) all[i] = all[i - 1] - all[i] * p[q] * p[q];
      all[0] *= -p[q] * p[q];
      but[q][0] = 1;
      int degree = 0;
      for (int l = 0; l < pairs; ++l) {
        const double s = StemPoints<a>::p[l] * StemPoints<a>::p[l];
        if (l == q) continue;
        for (int i = ++degree; i > 0; --i) but[q][i] = but[q][i - 1] - but[q][i] * s;
        but[q][0] *= -s;
      }
      double v = 1;
      for (int i = 0; i < M; ++i, v *= p[q]) power[i][q] = v;
      double n = 0, x = 1;  // derivative of x prod (x^2 - p^2) at p
      for (int i = 0; i < pairs; ++i, x *= p[q] * p[q]) n += but[q][i] * x;
      n *= 2 * p[q] * p[q];
      v = 1 / n;
      for (int t = 0; t < R; ++t, v *= p[q]) {
        g[1 + 2 * q][t] = v;
        g[2 + 2 * q][t] = t % 2 ? -v : v;
      }
    }
    g[0][0] = 1 / all[0];
    if (infinity) g[a - 1][R - 1] = 1;
  }
};

template <int M, int R>
struct StemTile {
  static constexpr int m = M, taps = R, a = M + R - 1;
  static constexpr StemMatrices<M, R> mats{};
};

// Frames that are taken one by one.
struct StemNoMatrices {
  double g[1][1] = {{1}};
};
template <>
struct StemTile<1, 1> {
  static constexpr int m = 1, taps = 1, a = 1;
  static constexpr StemNoMatrices mats{};
};

// The tiles that are compiled: outputs, taps.
#define R3D_STEM_TILES(X) \
  X(1, 1)                 \
  X(2, 3)                 \
  X(4, 3) X(8, 3) X(2, 4) X(4, 4) X(8, 4) X(2, 5) X(4, 5) X(6, 5) X(2, 6) X(4, 6) X(2, 7) X(4, 7) X(6, 7)

// Tiles of M output rows where seven rows have a stride of 2.
template <int M>
struct StemRowTile {
  static constexpr int points = StemTile<M, 4>::a + StemTile<M, 3>::a;
};

struct StemArgs {
  ConvArgs conv;              // conv.weight is the parameter, [K, C, T, R, S], of conv.dtype
  bool weight_channels_last;  // [K, T, R, S, C] in memory
  const float* scale;         // [K], multiplied into the sums, or null
  int tile;                   // m
  int row_tile = 1;           // outputs along height that share multiplications: 1, 2 or 4
  // Elements from one sample, channel, frame and row of x to the next. Pixels of a row are 1 apart where
  // `planes`, else C, with channels next to one another.
  int64_t x_n, x_c, x_d, x_h;
  bool planes;
};

constexpr int64_t stem_taps(const ConvGeometry& g) { return (g.kernel.d + g.stride.d - 1) / g.stride.d; }

// nullptr when the tile computes this convolution, otherwise why not.
const char* stem_refuses(const ConvGeometry& g, int tile, int row_tile);

void conv3d_stem(const StemArgs& args);

// ---- how the work is cut up ----

// Transformed frames are lines of `pitch` floats with the padding of height and width in them: one line for
// each (row, phase of the stride, channel) where `planes`, else for each (row, phase) with channels side by
// side. A kernel row of a pixel is one run of `steps` in such a line; `runs` of them, `pitch` apart, are a
// whole kernel.
struct StemPlan {
  int64_t lines;  // of one row
  int64_t inner;  // floats from one pixel to the next
  int64_t runs, steps, pitch;
  int64_t chunk;  // runs that are summed before they join the others: less rounding
  int64_t rows;   // output rows of a task
};

StemPlan plan_stem(const StemArgs& args, int threads);

// Transformed weights, [panel][point][run][step][panel width], from the parameter; `lanes` and `panel` are
// channels of a vector and of a panel.
int64_t stem_weights_bytes(const StemArgs& args, const StemPlan& plan, int lanes);
void stem_weights(const StemArgs& args, const StemPlan& plan, int lanes, int panel, float* out);

}  // namespace r3d::cpu
