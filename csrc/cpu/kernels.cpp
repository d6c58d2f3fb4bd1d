#include "kernels.h"

#include <cstring>
#include <stdexcept>

namespace r3d::cpu {

const Kernels& kernels(Isa isa) {
#if R3D_X86
  if (isa >= Isa::kAvx512) return kernels_avx512();
  if (isa == Isa::kAvx2) return kernels_avx2();
#endif
  (void)isa;
  return kernels_scalar();
}

void conv3d(const ConvArgs& args) {
  if (args.g.pixels() == 0 || args.g.k == 0) return;
  const auto& header = *static_cast<const PackHeader*>(args.weight);
  const Isa isa = static_cast<Isa>(header.isa);
  const KernelTraits traits = kernel_traits(isa, args.dtype);
  const std::vector<Chunk> chunks = plan_chunks(args.g.c, args.g.kernel, traits);
  const int count = static_cast<int>(chunks.size());
  const int64_t steps = plan_steps(chunks);
#if R3D_X86
  if (traits.dot) return conv3d_dot_avx512_bf16(args, chunks.data(), count, steps, traits.chunk);
#endif
  const Kernels& k = kernels(isa);
  (args.dtype == DType::kBFloat16 ? k.conv3d_bf16 : k.conv3d_f32)(args, chunks.data(), count, steps,
                                                                  traits.chunk);
}

void conv3d_winograd(const WinogradArgs& args) {
  if (args.conv.g.pixels() && args.conv.g.k) kernels(active_isa()).winograd(args);
}

void conv3d_direct(const DirectArgs& args) {
  const ConvGeometry& g = args.conv.g;
  if (g.pixels() == 0 || g.k == 0) return;
  const KernelTraits traits = kernel_traits(active_isa(), args.conv.dtype);
  const std::vector<Chunk> chunks = plan_chunks(g.c, g.kernel, traits);
  const int count = static_cast<int>(chunks.size());
  const int64_t steps = plan_steps(chunks);
#if R3D_X86
  if (traits.dot) return direct_dot_avx512_bf16(args, chunks.data(), count, steps, traits.chunk);
#endif
  const Kernels& k = kernels(traits.isa);
  (args.conv.dtype == DType::kBFloat16 ? k.direct_bf16 : k.direct_f32)(args, chunks.data(), count, steps,
                                                                       traits.chunk);
}

int64_t keep_weights(const DirectArgs& args, void* out) {
  const ConvGeometry& g = args.conv.g;
  if (g.pixels() == 0 || g.k == 0) return 0;
  const KernelTraits traits = kernel_traits(active_isa(), args.conv.dtype);
  const std::vector<Chunk> chunks = plan_chunks(g.c, g.kernel, traits);
  const int count = static_cast<int>(chunks.size());
  const int64_t steps = plan_steps(chunks);
  int64_t bytes = 0;
#if R3D_X86
  if (traits.dot) bytes = keep_dot_avx512_bf16(args, chunks.data(), count, steps, traits.chunk, out);
#endif
  if (!traits.dot && args.conv.dtype == DType::kFloat32)
    bytes = kernels(traits.isa).keep_f32(args, chunks.data(), count, steps, traits.chunk, out);
  if (bytes && out) {
    static_cast<KeptHeader*>(out)->isa = static_cast<int32_t>(traits.isa);
    static_cast<KeptHeader*>(out)->dot = traits.dot;
  }
  return bytes;
}

const char* check_kept(const void* kept, int64_t bytes, const DirectArgs& args) {
  KeptHeader h;
  if (bytes < static_cast<int64_t>(sizeof h)) return "too small to hold kept weights";
  std::memcpy(&h, kept, sizeof h);
  if (h.magic != kKeptMagic) return "not made by conv3d_keep";
  if (h.bytes != bytes) return "truncated or extended";
  if (std::memcmp(&h.geometry, &args.conv.g, sizeof h.geometry) != 0) return "made for another convolution";
  const KernelTraits traits = kernel_traits(active_isa(), args.conv.dtype);
  if (h.isa != static_cast<int32_t>(traits.isa)) return "made for another instruction set";
  return h.dot == static_cast<int32_t>(traits.dot) ? nullptr : "made for another dtype";
}

void max_pool3d(const PoolArgs& args) { kernels(active_isa()).max_pool3d(args); }
void avg_pool_linear(const HeadArgs& args) { kernels(active_isa()).avg_pool_linear(args); }
void bn_act(const BnActArgs& args) { kernels(active_isa()).bn_act(args); }

}  // namespace r3d::cpu
