// The emulated kernels in a program of their own, to be compiled with -fsanitize=address,undefined: every
// buffer is exactly as large as its contents, so that one element too far is an error. Without arguments it
// must pass; with the name of a planted kernel it must not.
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/bn_act.cu"
#include "planted.h"

using namespace r3d;

static int check(const char* what, const char* error) {
  if (error) std::printf("%s: %s\n", what, error);
  return error != nullptr;
}

int main(int argc, char** argv) {
  int failures = 0;
  for (auto schedule : {emu::Schedule::lockstep, emu::Schedule::reversed, emu::Schedule::ahead}) {
    emu::settings().schedule = schedule;
    if (argc > 1) {
      std::vector<float> data(planted::kThreads, 1.f);
      failures += check(argv[1], planted::run(argv[1], data.data(), 1));
      continue;
    }
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      for (int64_t channels : {1, 7, 8, 45, 64})
        for (int64_t rows : {1, 2, 257})
          for (bool residual : {false, true}) {
            std::vector<char> x(rows * channels * element_size(dtype)), y(x.size()), r(x.size());
            std::vector<float> scale(channels, 1.f), shift(channels, 0.5f);
            const BnActArgs args{rows,     channels,     dtype,        Activation::kRelu,
                                 x.data(), scale.data(), shift.data(), residual ? r.data() : nullptr,
                                 y.data()};
            failures += check("bn_act", cuda::bn_act(args, nullptr));
          }
  }
  return failures != 0;
}
