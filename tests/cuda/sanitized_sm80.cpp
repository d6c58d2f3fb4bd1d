// The kernels for compute capability 8.0, pool and head in a program of their own, to be compiled with
// -fsanitize=address,undefined: every buffer is exactly as large as its contents. With an argument a planted
// kernel reads one chunk too far, which must not pass.
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/conv3d_sm80.cu"
#include "../../csrc/cuda/conv3d_sm80_pack.cu"
#include "../../csrc/cuda/pool.cu"

using namespace r3d;
namespace sm80 = r3d::cuda::sm80;

static int check(const char* what, const char* error) {
  if (error) std::printf("%s: %s\n", what, error);
  return error != nullptr;
}

static ConvGeometry geometry(int64_t n, int64_t c, Dim3 in, int64_t k, Dim3 kernel, Dim3 stride,
                             Dim3 padding) {
  ConvGeometry g{n, c, in, k, kernel, stride, padding, {1, 1, 1}, {}};
  g.out = {conv_out_size(in.d, kernel.d, stride.d, padding.d, 1),
           conv_out_size(in.h, kernel.h, stride.h, padding.h, 1),
           conv_out_size(in.w, kernel.w, stride.w, padding.w, 1)};
  return g;
}

// `padded`: pixels at whole chunks. A tensor ends with the last channel that is its own: what x and the
// residual have behind that must not be read, and is there in y alone.
static int convolution(const ConvGeometry& g, DType dtype, bool residual, sm80::Choice choice, bool short_x,
                       bool padded = false) {
  const int64_t bytes = element_size(dtype);
  const int64_t c = padded ? sm80::pitch_of(g.c, dtype) : g.c, k = padded ? sm80::pitch_of(g.k, dtype) : g.k;
  std::vector<char> weight(g.k * g.reduction() * bytes), y(g.pixels() * k * bytes), r(y.size());
  std::vector<char> packed(g.k * sm80::layout_of(g, dtype).row_elements * bytes);
  std::vector<char> x((g.n * c * g.in.volume() - (c - g.c)) * bytes - (short_x ? sm80::kChunk : 0));
  std::vector<float> scale(g.k, 1.f), bias(g.k, 0.5f);
  int failures = check("pack", sm80::pack(g, dtype, weight.data(), dtype, packed.data(), nullptr));
  const int64_t row = g.in.w * c, plane = row * g.in.h;
  const sm80::Call call{{g, dtype, x.data(), packed.data(), bias.data(), residual ? r.data() : nullptr,
                         y.data(), Activation::kRelu},
                        {plane * g.in.d, 1, plane, row, c},
                        k,
                        k,
                        scale.data(),
                        2,
                        choice};
  std::vector<char> scratch(size_t(sm80::workspace_bytes(call)));
  return failures + check("conv3d", sm80::run(call, scratch.data(), nullptr));
}

static int pool_and_head(int64_t c, DType dtype) {
  const int64_t bytes = element_size(dtype);
  const Dim3 in{3, 5, 4}, out{2, 3, 2};
  std::vector<char> x(2 * c * in.volume() * bytes), y(2 * c * out.volume() * bytes);
  const PoolArgs pool{2, c, in, {3, 3, 3}, {2, 2, 2}, {1, 1, 1}, out, dtype, x.data(), y.data()};
  std::vector<char> weight(7 * c * bytes), bias(7 * bytes), logits(2 * 7 * bytes);
  std::vector<float> means(2 * c);
  const HeadArgs head{2, c, in.volume(), 7, dtype, x.data(), weight.data(), bias.data(), logits.data()};
  return check("max_pool3d", cuda::max_pool3d(pool, nullptr)) +
         check("avg_pool_linear", cuda::avg_pool_linear(head, means.data(), nullptr));
}

int main(int argc, char**) {
  int failures = 0;
  for (bool late : {false, true}) {
    emu::settings().schedule = late ? emu::Schedule::ahead : emu::Schedule::lockstep;
    emu::settings().late_copies = late;
    if (argc > 1) {
      failures += convolution(geometry(1, 8, {2, 4, 4}, 8, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}), DType::kBFloat16,
                              true, {2, 1}, true);
      continue;
    }
    for (DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (sm80::Choice choice :
           {sm80::Choice{0, 1}, sm80::Choice{1, 1}, sm80::Choice{2, 1}, sm80::Choice{2, 2}}) {
        failures += convolution(geometry(2, 16, {2, 5, 6}, 45, {3, 3, 3}, {1, 2, 2}, {1, 0, 2}), dtype, late,
                                choice, false);
        failures += convolution(geometry(1, 45, {2, 3, 5}, 64, {3, 1, 1}, {1, 1, 1}, {1, 0, 0}), dtype, late,
                                choice, false);
        failures += convolution(geometry(1, 3, {2, 9, 11}, 24, {3, 7, 7}, {1, 2, 2}, {1, 3, 3}), dtype, late,
                                choice, false);
        failures += convolution(geometry(2, 45, {2, 3, 5}, 75, {3, 1, 3}, {1, 1, 2}, {1, 0, 1}), dtype, late,
                                choice, false, true);
      }
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      for (int64_t c : {1, 8, 45}) failures += pool_and_head(c, dtype);
  }
  return failures != 0;
}
