// Which instruction set the CPU kernels use: the best that the processor and the operating system offer,
// or what R3D_KERNELS_ISA asks for.
#pragma once

namespace r3d::cpu {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

Isa best_isa();                 // what this machine can run
Isa active_isa();               // best_isa(), or R3D_KERNELS_ISA; throws std::runtime_error on a name that is
                                // unknown or that this machine cannot run
const char* isa_name(Isa isa);  // "scalar", "avx2", "avx512", "avx512_bf16", "amx"

}  // namespace r3d::cpu
