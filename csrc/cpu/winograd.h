// Winograd / Toom-Cook minimal filtering, per axis: m outputs of a 3-tap filter from a = m + 2 inputs with a
// instead of 3*m multiplications (Lavin & Gray, CVPR 2016; Jia et al., PPoPP 2018 for N dimensions).
//   y = AT [ (G g) * (BT d) ],  d: a inputs, g: 3 taps, y: m outputs.
// An axis whose kernel is 1 passes through.
#pragma once

#include "../conv3d.h"

namespace r3d::cpu {

struct Axis1 {  // kernel 1
  static constexpr int taps = 1, m = 1, a = 1;
};

struct Axis2 {  // F(2, 3), points 0, 1, -1, inf
  static constexpr int taps = 3, m = 2, a = 4;
};

struct Axis4 {  // F(4, 3), points 0, +-p, +-q, inf: pairs share half of their transforms
  static constexpr int taps = 3, m = 4, a = 6;
  static constexpr float p = 5.f / 8, q = 3.f / 2;
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
                                           {1, 4, 4}, {2, 1, 1}, {4, 1, 1}};

// The tile of a code such as 244, or {0, 0, 0}.
constexpr WinogradTile winograd_tile(int code) {
  for (const WinogradTile& t : kWinogradTiles)
    if (t.code() == code) return t;
  return {0, 0, 0};
}

// nullptr when the tile computes this convolution, otherwise why not.
inline const char* winograd_refuses(const WinogradTile& t, const ConvGeometry& g) {
  auto fits = [](int m, int64_t kernel) { return m == 1 ? kernel == 1 : kernel == 3; };
  if (!fits(t.d, g.kernel.d) || !fits(t.h, g.kernel.h) || !fits(t.w, g.kernel.w))
    return "the Winograd tile is for another kernel size";
  if (g.stride.d != 1 || g.stride.h != 1 || g.stride.w != 1) return "Winograd needs stride 1";
  if (g.dilation.d != 1 || g.dilation.h != 1 || g.dilation.w != 1) return "Winograd needs dilation 1";
  return nullptr;
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
