// The CPU kernels without torch: runs on whatever processor, real or emulated, that it finds itself on, and
// holds every kernel that this processor offers against plain loops. Prints "best=ISA checks=N"; exit code 1
// on a wrong result.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/conv3d_plan.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/numbers.h"
#include "../../csrc/cpu/tiles.h"

using namespace r3d;

namespace {

int checks = 0, failures = 0;
unsigned state = 1;

float noise() {  // -1 to 1
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

// Values in the storage type, and as the doubles that they stand for.
struct Data {
  std::vector<double> exact;
  std::vector<char> stored;
};

Data make(size_t n, DType dtype) {
  Data data;
  data.stored.resize(n * static_cast<size_t>(element_size(dtype)) + 64);
  for (size_t i = 0; i < n; ++i) {
    const float v = noise();
    if (dtype == DType::kFloat32) {
      std::memcpy(data.stored.data() + 4 * i, &v, 4);
      data.exact.push_back(v);
    } else {
      const uint16_t h = cpu::to_bf16(v);
      std::memcpy(data.stored.data() + 2 * i, &h, 2);
      data.exact.push_back(cpu::widen(h));
    }
  }
  return data;
}

double stored(const void* p, size_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(p)[i];
  return cpu::widen(static_cast<const uint16_t*>(p)[i]);
}

void compare(const char* what, const void* y, const std::vector<double>& want, DType dtype) {
  const double limit = dtype == DType::kFloat32 ? 2e-4 : 2e-2;
  ++checks;
  for (size_t i = 0; i < want.size(); ++i) {
    const double got = stored(y, i, dtype);
    if (!(std::fabs(got - want[i]) <= limit * (1 + std::fabs(want[i])))) {
      std::printf("%s, %s: element %zu is %g, not %g\n", cpu::isa_name(cpu::active_isa()), what, i, got,
                  want[i]);
      ++failures;
      return;
    }
  }
}

enum class Way { kPacked, kDirect, kWinograd, kStem, kTiles };

// `tile`: a Winograd tile's code, the frames of a stem's tile, or 0
void convolution(Dim3 in, Dim3 kernel, Dim3 stride, int64_t c, int64_t k, DType dtype, Way way,
                 int tile = 0) {
  ConvArgs a{};
  ConvGeometry& g = a.g;
  g = {2, c, in, k, kernel, stride, {kernel.d / 2, kernel.h / 2, kernel.w / 2}, {1, 1, 1}, {}};
  g.out = {conv_out_size(in.d, kernel.d, stride.d, g.padding.d, 1),
           conv_out_size(in.h, kernel.h, stride.h, g.padding.h, 1),
           conv_out_size(in.w, kernel.w, stride.w, g.padding.w, 1)};
  const Data x = make(static_cast<size_t>(g.n * in.volume() * c), dtype);
  const DType weight_dtype = way == Way::kPacked ? DType::kFloat32 : dtype;
  const Data w = make(static_cast<size_t>(k * c * kernel.volume()), weight_dtype);  // [K, C, T, R, S]
  const Data residual = make(static_cast<size_t>(g.pixels() * k), dtype);
  const Data bias = make(static_cast<size_t>(k), DType::kFloat32);
  const std::vector<double> scale(static_cast<size_t>(k), 1 / std::sqrt(double(c * kernel.volume())));

  const cpu::KernelTraits traits = cpu::kernel_traits(cpu::active_isa(), dtype);
  void* packed =
      std::aligned_alloc(64, static_cast<size_t>((cpu::packed_bytes(k, c, kernel, traits) + 63) / 64 * 64));
  if (way == Way::kPacked)
    cpu::pack_weights(reinterpret_cast<const float*>(w.stored.data()), scale.data(), k, c, kernel, traits,
                      packed);
  std::vector<char> y(residual.stored.size());
  a.dtype = dtype;
  a.x = x.stored.data();
  a.weight = way == Way::kPacked ? packed : w.stored.data();
  a.bias = reinterpret_cast<const float*>(bias.stored.data());
  a.residual = residual.stored.data();
  a.y = y.data();
  a.activation = Activation::kRelu;
  const std::vector<float> factors(scale.begin(), scale.end());
  const cpu::WinogradTile outputs{tile / 100, tile / 10 % 10, tile % 10};
  switch (way) {
    case Way::kPacked:
      cpu::conv3d(a);
      break;
    case Way::kDirect:
      cpu::conv3d_direct({a, false, factors.data()});
      break;
    case Way::kWinograd:
      cpu::conv3d_winograd({a, factors.data(), false, outputs});
      break;
    case Way::kStem: {
      cpu::StemArgs stem{};
      stem.conv = a;
      stem.scale = factors.data();
      stem.tile = tile;
      stem.x_n = in.volume() * c;
      stem.x_c = 1;
      stem.x_d = in.h * in.w * c;
      stem.x_h = in.w * c;
      cpu::conv3d_stem(stem);
      break;
    }
    case Way::kTiles:
      cpu::conv3d_tiles({a, dtype, false, factors.data(), dtype == DType::kFloat32 ? 3 : 1,
                         tile ? outputs : cpu::WinogradTile{1, 1, 1}},
                        cpu::active_isa() == cpu::Isa::kAmx);
  }
  std::free(packed);

  std::vector<double> want;
  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t od = 0; od < g.out.d; ++od)
      for (int64_t oh = 0; oh < g.out.h; ++oh)
        for (int64_t ow = 0; ow < g.out.w; ++ow)
          for (int64_t f = 0; f < k; ++f) {
            double sum = 0;
            for (int64_t t = 0; t < kernel.d; ++t)
              for (int64_t r = 0; r < kernel.h; ++r)
                for (int64_t s = 0; s < kernel.w; ++s) {
                  const int64_t d = od * stride.d - g.padding.d + t, h = oh * stride.h - g.padding.h + r,
                                v = ow * stride.w - g.padding.w + s;
                  if (d < 0 || h < 0 || v < 0 || d >= in.d || h >= in.h || v >= in.w) continue;
                  for (int64_t i = 0; i < c; ++i)
                    sum += x.exact[size_t((((n * in.d + d) * in.h + h) * in.w + v) * c + i)] *
                           w.exact[size_t((((f * c + i) * kernel.d + t) * kernel.h + r) * kernel.w + s)];
                }
            const double out = sum * scale[size_t(f)] + bias.exact[size_t(f)] + residual.exact[want.size()];
            want.push_back(out > 0 ? out : 0);
          }
  char what[80];
  const char* names[] = {"packed", "direct", "Winograd", "stem", "tiles"};
  std::snprintf(what, sizeof what, "%ldx%ldx%ld %s %d", long(kernel.d), long(kernel.h), long(kernel.w),
                names[static_cast<int>(way)], tile);
  compare(what, y.data(), want, dtype);
}

void pooling(DType dtype) {
  const int64_t c = 21;
  const Dim3 in{3, 6, 7}, out{2, 3, 4};
  const Data x = make(static_cast<size_t>(in.volume() * c), dtype);
  std::vector<char> y(static_cast<size_t>(out.volume() * c * 4));
  cpu::max_pool3d(
      {1, c, in, {3, 3, 3}, {2, 2, 2}, {1, 1, 1}, out, dtype, x.stored.data(), static_cast<void*>(y.data())});
  std::vector<double> want;
  for (int64_t od = 0; od < out.d; ++od)
    for (int64_t oh = 0; oh < out.h; ++oh)
      for (int64_t ow = 0; ow < out.w; ++ow)
        for (int64_t i = 0; i < c; ++i) {
          double most = -INFINITY;
          for (int64_t d = 2 * od - 1; d < 2 * od + 2; ++d)
            for (int64_t h = 2 * oh - 1; h < 2 * oh + 2; ++h)
              for (int64_t w = 2 * ow - 1; w < 2 * ow + 2; ++w)
                if (d >= 0 && h >= 0 && w >= 0 && d < in.d && h < in.h && w < in.w)
                  most = std::fmax(most, x.exact[size_t(((d * in.h + h) * in.w + w) * c + i)]);
          want.push_back(most);
        }
  compare("max-pool", y.data(), want, dtype);
}

void head(DType dtype) {
  const int64_t n = 2, c = 37, pixels = 5, classes = 11;
  const Data x = make(size_t(n * pixels * c), dtype), weight = make(size_t(classes * c), dtype),
             bias = make(size_t(classes), dtype);
  std::vector<char> y(static_cast<size_t>(n * classes * 4));
  cpu::avg_pool_linear({n, c, pixels, classes, dtype, x.stored.data(), weight.stored.data(),
                        bias.stored.data(), static_cast<void*>(y.data())});
  std::vector<double> want;
  for (int64_t b = 0; b < n; ++b)
    for (int64_t j = 0; j < classes; ++j) {
      double out = bias.exact[size_t(j)];
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t i = 0; i < c; ++i)
          out += x.exact[size_t((b * pixels + p) * c + i)] * weight.exact[size_t(j * c + i)] / double(pixels);
      want.push_back(out);
    }
  compare("head", y.data(), want, dtype);
}

void norm(DType dtype) {
  const int64_t rows = 9, c = 35;
  const Data x = make(size_t(rows * c), dtype), residual = make(size_t(rows * c), dtype);
  const Data scale = make(size_t(c), DType::kFloat32), shift = make(size_t(c), DType::kFloat32);
  std::vector<char> y(x.stored.size());
  cpu::bn_act({rows, c, dtype, Activation::kRelu, x.stored.data(),
               reinterpret_cast<const float*>(scale.stored.data()),
               reinterpret_cast<const float*>(shift.stored.data()), residual.stored.data(), y.data()});
  std::vector<double> want;
  for (size_t i = 0; i < x.exact.size(); ++i) {
    const double out =
        x.exact[i] * scale.exact[i % size_t(c)] + shift.exact[i % size_t(c)] + residual.exact[i];
    want.push_back(out > 0 ? out : 0);
  }
  compare("batch norm", y.data(), want, dtype);
}

}  // namespace

int main() {
  const cpu::Isa best = cpu::best_isa();
  for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
    setenv("R3D_KERNELS_ISA", cpu::isa_name(static_cast<cpu::Isa>(isa)), 1);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (Way way : {Way::kPacked, Way::kDirect, Way::kTiles}) {
        convolution({3, 6, 7}, {3, 3, 3}, {1, 1, 1}, 19, 37, dtype, way);
        convolution({3, 7, 6}, {3, 3, 3}, {2, 2, 2}, 16, 32, dtype, way);
        convolution({4, 9, 11}, {7, 7, 7}, {1, 2, 2}, 3, 40, dtype, way);
        convolution({3, 9, 11}, {3, 7, 7}, {1, 2, 2}, 1, 40, dtype, way);
        convolution({2, 5, 5}, {1, 1, 1}, {2, 2, 2}, 40, 50, dtype, way);
      }
      for (const cpu::WinogradTile& tile : cpu::kWinogradTiles) {
        auto taps = [](int m) { return int64_t{m == 1 ? 1 : 3}; };
        for (int stride : {1, 2}) {
          auto step = [&](int m) { return int64_t{m == 1 ? 1 : stride}; };
          if (cpu::winograd_compiled(tile, stride))
            convolution({3, 6, 7}, {taps(tile.d), taps(tile.h), taps(tile.w)},
                        {step(tile.d), step(tile.h), step(tile.w)}, 19, 37, dtype, Way::kWinograd,
                        tile.code());
        }
      }
      for (int tile : {2, 4}) {
        convolution({5, 9, 11}, {7, 7, 7}, {1, 2, 2}, 3, 40, dtype, Way::kStem, tile);
        convolution({5, 9, 11}, {3, 7, 7}, {1, 2, 2}, 1, 40, dtype, Way::kStem, tile);
      }
      for (int tile : {211, 411, 121, 141, 221, 421})
        if (dtype == DType::kFloat32)
          convolution({3, 6, 7}, {3, 3, 3}, {1, 1, 1}, 19, 37, dtype, Way::kTiles, tile);
      pooling(dtype);
      head(dtype);
      norm(dtype);
    }
  }
  unsetenv("R3D_KERNELS_ISA");
  std::printf("best=%s checks=%d\n", cpu::isa_name(best), checks);
  return failures != 0;
}
