// The emulated Hopper convolution of few channels in a program of its own, for -fsanitize=address,undefined:
// every buffer is exactly as large as its contents. With the argument "y", "rows" or "pieces" (of a max-pool)
// that buffer is too short, which must not pass.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/conv3d_sm90_stem.cu"

using namespace r3d;
using namespace r3d::cuda;

int main(int argc, char** argv) {
  const auto shortened = [&](const char* name) { return argc > 1 && !std::strcmp(argv[1], name); };
  int failures = 0, number = 0;
  const ConvGeometry geometries[] = {
      {2, 3, {3, 9, 12}, 24, {3, 7, 7}, {1, 2, 2}, {1, 3, 3}, {1, 1, 1}, {3, 5, 6}},
      {1, 1, {4, 12, 11}, 70, {7, 7, 7}, {2, 2, 2}, {3, 3, 3}, {1, 1, 1}, {2, 6, 6}},
      {1, 3, {2, 6, 7}, 45, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {2, 6, 7}},
  };
  for (const ConvGeometry& g : geometries)
    for (int kind = 0; kind < kStemKinds; kind++) {
      const int pool_frames = number % 3 == 2 ? 3 : number % 3;
      if ((pool_frames == 0 && shortened("pieces")) || (pool_frames && shortened("rows"))) {
        number++;
        continue;
      }
      emu::settings().schedule = emu::Schedule(number % 3);
      emu::timing() = {number % 2 == 0, number / 2 % 2 == 0};
      number++;
      const StemLayout l = stem_layout(g);
      const StemPlan plan = stem_plan(g, 2, kind, pool_frames);
      const int64_t pixels = g.n * stem_pooled(g.out, pool_frames).volume();
      std::vector<uint16_t> x(size_t(g.n * g.c * g.in.volume()), 0x3c00);
      std::vector<uint16_t> w(size_t(l.weight_elements(g)), 0x3c00);
      std::vector<uint16_t> y(size_t(pixels * sm90_pitch(g.k) - shortened("y")));
      std::vector<float> scale(size_t(g.k), 1.f), bias(size_t(g.k), 0.5f);
      // of pieces those of the last plane, not all of which are written
      const int64_t shorter =
          shortened("pieces") ? plan.pool.slices * plan.pool.slice_units : shortened("rows");
      std::vector<uint4> rows(size_t(plan.workspace_bytes() / kStemUnit - shorter));
      const ConvArgs args{g,           DType::kFloat16, nullptr,  w.data(),
                          bias.data(), nullptr,         y.data(), Activation::kRelu};
      const int64_t row = g.in.w, plane = row * g.in.h, channel = plane * g.in.d;
      const StemSource source{x.data(), channel * g.c, channel, plane, row, 1, 2, nullptr, nullptr};
      if (const char* error = conv3d_sm90_stem(args, source, scale.data(), plan, rows.data(), nullptr)) {
        std::printf("%s\n", error);
        failures++;
      }
    }
  return failures != 0;
}
