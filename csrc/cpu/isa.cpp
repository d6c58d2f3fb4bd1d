#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace r3d::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Leaf 7: AMX-BF16 is bit 22 and AMX-TILE bit 24 of edx. Linux gives the tiles' state to a process that asks.
bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 5) != 5) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::kScalar;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return has_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
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
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) continue;
    if (i > static_cast<int>(best_isa()))
      throw std::runtime_error(std::string("R3D_KERNELS_ISA=") + wanted +
                               ", but this processor offers no more than " + isa_name(best_isa()));
    return static_cast<Isa>(i);
  }
  throw std::runtime_error(
      std::string("R3D_KERNELS_ISA: expected scalar, avx2, avx512, avx512_bf16 or amx, got '") + wanted +
      "'");
}

}  // namespace r3d::cpu
