// The emulated Hopper convolution in a program of its own, for -fsanitize=address,undefined: every buffer is
// exactly as large as its contents. With an argument, y is one element short, which must not pass.
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/conv3d_sm90.cu"

using namespace r3d;
using namespace r3d::cuda;

int main(int argc, char**) {
  int failures = 0, number = 0;
  const Dim3 one{1, 1, 1};
  const ConvGeometry geometries[] = {
      {2, 24, {3, 4, 5}, 8, {3, 3, 3}, one, {0, 1, 2}, one, {1, 4, 7}},
      {1, 72, {3, 5, 6}, 136, {1, 3, 2}, {2, 1, 2}, {0, 1, 0}, one, {2, 5, 3}},
      {1, 8, {2, 4, 10}, 72, {3, 1, 3}, one, {2, 0, 2}, {2, 1, 2}, {2, 4, 10}},
      {2, 45, {3, 4, 5}, 70, {3, 3, 3}, one, {0, 1, 2}, one, {1, 4, 7}},
  };
  for (const ConvGeometry& g : geometries)
    for (const auto [tile, split] : {std::pair{11, 1}, {11, 2}, {0, 1}, {1, 1}, {8, 1}}) {
      const Sm90Plan plan = sm90_plan_for(g, tile, split, 2);
      if (plan.tile < 0) continue;
      const auto schedule = emu::Schedule(number % 3);
      emu::settings().schedule = schedule;
      emu::timing() = {number % 2 == 0, number / 2 % 2 == 0};
      number++;
      // The last pixel ends with its last channel; y with whole 16 bytes.
      const int64_t c = sm90_pitch(g.c), k = sm90_pitch(g.k);
      const auto filled = [](int64_t pixels, int64_t pitch, int64_t channels) {
        return std::vector<uint16_t>(size_t((pixels - 1) * pitch + channels), 0x3c00);
      };
      std::vector<uint16_t> x = filled(g.n * g.in.volume(), c, g.c),
                            w = filled(g.k * g.kernel.volume(), c, g.c);
      std::vector<uint16_t> residual = filled(g.pixels(), k, g.k), y(g.pixels() * k - (argc > 1));
      std::vector<float> scale(g.k, 1.f), bias(g.k, 0.5f), workspace(plan.workspace_bytes() / 4);
      const ConvArgs args{g,           DType::kFloat16, x.data(), w.data(),
                          bias.data(), residual.data(), y.data(), Activation::kRelu};
      if (const char* error =
              conv3d_sm90(args, {c, c, k, k}, scale.data(), plan, workspace.data(), nullptr, nullptr)) {
        std::printf("%s\n", error);
        failures++;
      }
    }
  if (number < 8) std::printf("only %d cases\n", number);
  return failures != 0 || number < 8;
}
