#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace r3d::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::kScalar;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kScalar;
#endif
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  const char* wanted =
      std::getenv("R3D_KERNELS_ISA");  // read at every call: tests switch it inside one process
  if (!wanted || !*wanted) return best_isa();
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) continue;
    if (i > static_cast<int>(best_isa()))
      throw std::runtime_error(std::string("R3D_KERNELS_ISA=") + wanted +
                               ", but this processor offers no more than " + isa_name(best_isa()));
    return static_cast<Isa>(i);
  }
  throw std::runtime_error(
      std::string("R3D_KERNELS_ISA: expected scalar, avx2, avx512 or avx512_bf16, got '") + wanted + "'");
}

}  // namespace r3d::cpu
