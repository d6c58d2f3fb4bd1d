// AVX-512 (F, BW, VL, DQ): float32 arithmetic on float32 or bfloat16 storage.
#include "kernels.h"

#if R3D_X86
#include <immintrin.h>

#include "parallel.h"

R3D_TARGET_PUSH("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
namespace r3d::cpu::avx512 {
#include "isa_avx512.inl"

// on the policy V
#include "conv3d_kernel.inl"
#include "lanes.inl"
#include "pool_kernel.inl"
#include "stem_kernel.inl"
#include "winograd_kernel.inl"
}  // namespace r3d::cpu::avx512
R3D_TARGET_POP

R3D_DEFINE_KERNELS(avx512)
#endif
