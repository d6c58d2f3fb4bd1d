// Winograd / Toom-Cook minimal filtering, per axis: m outputs of a 3-tap filter from a = m + 2 inputs with a
// instead of 3*m multiplications (Lavin & Gray, CVPR 2016; Jia et al., PPoPP 2018 for N dimensions).
//   y = AT [ (G g) * (BT d) ],  d: a inputs, g: 3 taps, y: m outputs.
// A stride of 2 is split by phase (Winograd 1980; "polyphase"), see Strided2. An axis whose kernel is 1
// passes through.
#pragma once

#include "../conv3d.h"

namespace r3d::cpu {

struct Axis1 {  // kernel 1
  static constexpr int taps = 1, m = 1, in = 1, a = 1, stride = 1, own = 1, filters = 1;
};

struct Axis2 {  // F(2, 3), points 0, 1, -1, inf
  static constexpr int taps = 3, m = 2, in = 4, a = 4, stride = 1, own = 4, filters = 4;
};

struct Axis4 {  // F(4, 3), points 0, +-p, +-q, inf: pairs share half of their transforms
  static constexpr int taps = 3, m = 4, in = 6, a = 6, stride = 1, own = 6, filters = 6;
  static constexpr float p = 5.f / 8, q = 3.f / 2;
};

// A whole axis of two, whose neighbours are padding: y = [g1 g2; g0 g1] d, a Toeplitz matrix, takes three
// products: y0 = g1 (d0 - d1) + (g1 + g2) d1, y1 = (g0 + g1) d0 - g1 (d0 - d1). The other signs would do too,
// but behind a ReLU differences are the smaller ones.
struct Edge2 {
  static constexpr int taps = 3, m = 2, in = 2, a = 3, stride = 1, own = 3, filters = 3;
};

// Stride 2: the even inputs meet taps 0 and 2, the odd ones tap 1: F(m, 2) and F(m, 1), a = 2*m + 1 points
// instead of 3*m products. The m odd points are the inputs themselves, and all have tap 1 for their filter:
// `own` points have a filter of their own.
struct Strided2 {  // F(2, 2), points 0, 1, inf
  static constexpr int taps = 3, m = 2, in = 5, a = 5, stride = 2, own = 3, filters = 4;
};

struct Strided4 {  // F(4, 2), points +-p, +-q, inf: without 0 the error is less than half
  static constexpr int taps = 3, m = 4, in = 9, a = 9, stride = 2, own = 5, filters = 6;
  static constexpr float p = 1.f / 2, q = 3.f / 2;
};

// Outputs of a tile along depth, height and width: 1 where the kernel is 1, else 2 or 4.
struct WinogradTile {
  int d, h, w;
  constexpr int code() const { return 100 * d + 10 * h + w; }
  constexpr int points() const { return inputs(d) * inputs(h) * inputs(w); }
  static constexpr int inputs(int m) { return m == 1 ? 1 : m + 2; }
};

// The tiles that are compiled.
constexpr WinogradTile kWinogradTiles[] = {{2, 2, 2}, {2, 4, 4}, {4, 4, 4}, {1, 2, 2},
                                           {1, 4, 4}, {2, 1, 1}, {4, 1, 1}, {4, 2, 2}};

// The tile of a code such as 244, or {0, 0, 0}.
constexpr WinogradTile winograd_tile(int code) {
  for (const WinogradTile& t : kWinogradTiles)
    if (t.code() == code) return t;
  return {0, 0, 0};
}

// Whether a tile is there for a stride of 1 or 2 along the axes with a kernel.
constexpr bool winograd_compiled(const WinogradTile& t, int stride) {
  if (stride == 1) return t.code() != 422;
  return t.code() == 222 || t.code() == 422 || t.code() == 122 || t.code() == 144;
}

// nullptr when the tile computes this convolution, otherwise why not.
inline const char* winograd_refuses(const WinogradTile& t, const ConvGeometry& g) {
  auto fits = [](int m, int64_t kernel) { return m == 1 ? kernel == 1 : kernel == 3; };
  if (!fits(t.d, g.kernel.d) || !fits(t.h, g.kernel.h) || !fits(t.w, g.kernel.w))
    return "the Winograd tile is for another kernel size";
  const auto strided = [&](int64_t s) {
    return g.stride.d == (t.d == 1 ? 1 : s) && g.stride.h == (t.h == 1 ? 1 : s) &&
           g.stride.w == (t.w == 1 ? 1 : s);
  };
  if (!strided(1) && !strided(2))
    return "Winograd needs a stride of 1 or of 2 along every axis with a kernel";
  if (!winograd_compiled(t, strided(2) ? 2 : 1)) return "the Winograd tile is for another stride";
  if (g.dilation.d != 1 || g.dilation.h != 1 || g.dilation.w != 1) return "Winograd needs dilation 1";
  return nullptr;
}

// Whether Edge2 takes the place of two outputs along depth.
constexpr bool winograd_edge(const ConvGeometry& g) {
  return g.kernel.d == 3 && g.stride.d == 1 && g.in.d == 2 && g.out.d == 2 && g.padding.d == 1;
}

struct WinogradArgs {
  ConvArgs conv;              // weight: the parameter [K, C, T, R, S], of conv.dtype
  const float* scale;         // [K], multiplied with the sums, or null
  bool weight_channels_last;  // the parameter lies as [K, T, R, S, C]
  WinogradTile tile;
};

// By the kernels of the active instruction set.
void conv3d_winograd(const WinogradArgs& args);

}  // namespace r3d::cpu
