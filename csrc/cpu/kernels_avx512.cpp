// AVX-512 (F, BW, VL, DQ): float32 arithmetic on float32 or bfloat16 storage.
#include "kernels.h"

#if R3D_X86
#include <immintrin.h>

#include "parallel.h"
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
namespace r3d::cpu::avx512 {
#include "conv3d_kernel.inl"
#include "isa_avx512.inl"
#include "lanes.inl"
#include "pool_kernel.inl"
#include "winograd_kernel.inl"
}  // namespace r3d::cpu::avx512
#pragma GCC pop_options

R3D_DEFINE_KERNELS(avx512)
#endif
