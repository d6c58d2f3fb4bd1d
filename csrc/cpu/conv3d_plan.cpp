#include "conv3d_plan.h"

#include <algorithm>
#include <cstring>

#include "numbers.h"
#include "parallel.h"

namespace r3d::cpu {
namespace {

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

}  // namespace

KernelTraits kernel_traits(Isa isa, DType dtype) {
  if (isa == Isa::kAmx) isa = Isa::kAvx512Bf16;  // packed weights are for the vector unit
  const bool dot = isa == Isa::kAvx512Bf16 && dtype == DType::kBFloat16;
  const int chunk = dot ? 768 : 576;
  switch (isa) {
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return {isa, dot, 16, 64, chunk};
    case Isa::kAvx2:
      return {isa, dot, 8, 24, chunk};
    default:
      return {isa, dot, 4, 8, chunk};
  }
}

std::vector<Chunk> plan_chunks(int64_t c, const Dim3& kernel, const KernelTraits& traits) {
  const int64_t row = kernel.w * c, step = traits.dot ? 2 : 1;
  std::vector<Chunk> chunks;
  int64_t packed = 0;
  auto add = [&](int64_t t, int64_t r, int64_t rows, int64_t pos, int64_t len) {
    const int64_t steps = (rows * len + step - 1) / step;
    chunks.push_back({static_cast<int32_t>(t), static_cast<int32_t>(r), static_cast<int32_t>(rows),
                      static_cast<int32_t>(pos), static_cast<int32_t>(len), packed,
                      static_cast<int32_t>(steps)});
    packed += steps;
  };
  for (int64_t t = 0; t < kernel.d; ++t) {
    if (row >= traits.chunk) {
      const int64_t pieces = (row + traits.chunk - 1) / traits.chunk;
      const int64_t piece = std::min<int64_t>(round_up((row + pieces - 1) / pieces, 2), traits.chunk);
      for (int64_t r = 0; r < kernel.h; ++r)
        for (int64_t pos = 0; pos < row; pos += piece) add(t, r, 1, pos, std::min(piece, row - pos));
    } else {
      const int64_t groups = (kernel.h * row + traits.chunk - 1) / traits.chunk;
      const int64_t rows =
          std::max<int64_t>(1, std::min((kernel.h + groups - 1) / groups, traits.chunk / row));
      for (int64_t r = 0; r < kernel.h; r += rows) add(t, r, std::min(rows, kernel.h - r), 0, row);
    }
  }
  return chunks;
}

int64_t plan_steps(const std::vector<Chunk>& chunks) {
  return chunks.empty() ? 0 : chunks.back().packed + chunks.back().steps;
}

int64_t packed_bytes(int64_t k, int64_t c, const Dim3& kernel, const KernelTraits& traits) {
  // One step holds one float32 or one bfloat16 pair a channel: four bytes either way.
  return static_cast<int64_t>(sizeof(PackHeader)) +
         4 * plan_steps(plan_chunks(c, kernel, traits)) * round_up(k, traits.lanes);
}

template <class T>
void pack_weights(const T* weight, const double* scale, int64_t k, int64_t c, const Dim3& kernel,
                  const KernelTraits& traits, void* out) {
  const std::vector<Chunk> chunks = plan_chunks(c, kernel, traits);
  const int64_t steps = plan_steps(chunks), taps = kernel.volume();
  PackHeader header{};
  header.magic = kPackMagic;
  header.isa = static_cast<int32_t>(traits.isa);
  header.dot = traits.dot;
  header.t = static_cast<int32_t>(kernel.d);
  header.r = static_cast<int32_t>(kernel.h);
  header.s = static_cast<int32_t>(kernel.w);
  header.c = c;
  header.k = k;
  header.bytes = packed_bytes(k, c, kernel, traits);
  std::memcpy(out, &header, sizeof header);
  char* payload = static_cast<char*>(out) + sizeof header;
  const int64_t padded = round_up(k, traits.lanes), panels = (k + traits.panel - 1) / traits.panel;
  // tasks: (panel, chunk)
  parallel_for(panels * static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k0 = task / static_cast<int64_t>(chunks.size()) * traits.panel;
      const Chunk& chunk = chunks[static_cast<size_t>(task % static_cast<int64_t>(chunks.size()))];
      const int64_t width = std::min<int64_t>(traits.panel, padded - k0);
      char* to = payload + 4 * (k0 * steps + chunk.packed * width);
      const int64_t elements = static_cast<int64_t>(chunk.rows) * chunk.len;
      for (int64_t step = 0; step < chunk.steps; ++step) {
        for (int64_t j = 0; j < width; ++j) {
          auto value = [&](int64_t e) -> double {
            if (k0 + j >= k || e >= elements) return 0.0;
            const int64_t pos = chunk.pos + e % chunk.len, r = chunk.r + e / chunk.len;
            const int64_t s = pos / c, ci = pos % c;
            const double w =
                widen(weight[((k0 + j) * c + ci) * taps + (chunk.t * kernel.h + r) * kernel.w + s]);
            return scale ? w * scale[k0 + j] : w;
          };
          if (traits.dot) {
            auto* o = reinterpret_cast<uint16_t*>(to) + (step * width + j) * 2;
            o[0] = to_bf16(static_cast<float>(value(2 * step)));
            o[1] = to_bf16(static_cast<float>(value(2 * step + 1)));
          } else {
            reinterpret_cast<float*>(to)[step * width + j] = static_cast<float>(value(step));
          }
        }
      }
    }
  });
}

template void pack_weights(const float*, const double*, int64_t, int64_t, const Dim3&, const KernelTraits&,
                           void*);
template void pack_weights(const double*, const double*, int64_t, int64_t, const Dim3&, const KernelTraits&,
                           void*);
template void pack_weights(const uint16_t*, const double*, int64_t, int64_t, const Dim3&, const KernelTraits&,
                           void*);

const char* check_packed(const void* packed, int64_t bytes, const ConvGeometry& g, DType dtype) {
  PackHeader h;
  if (bytes < static_cast<int64_t>(sizeof h)) return "too small to hold packed weights";
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kPackMagic) return "not made by conv3d_pack";
  if (h.bytes != bytes) return "truncated or extended";
  if (h.k != g.k || h.c != g.c || h.t != g.kernel.d || h.r != g.kernel.h || h.s != g.kernel.w)
    return "made for other channels or another kernel size";
  if (h.isa < 0 || h.isa > static_cast<int>(best_isa()))
    return "made for an instruction set that this machine lacks";
  const KernelTraits traits = kernel_traits(static_cast<Isa>(h.isa), dtype);
  if (traits.dot != static_cast<bool>(h.dot)) return "made for another dtype";
  return packed_bytes(g.k, g.c, g.kernel, traits) == bytes ? nullptr : "damaged";
}

}  // namespace r3d::cpu
