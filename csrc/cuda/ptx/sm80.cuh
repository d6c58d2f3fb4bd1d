// What compute capability 8.0 brought: asynchronous copies to shared memory, matrix loads, tensor-core
// products. Every piece of inline PTX behind a small named function; ../emu/sm80.h has the same functions for
// the CPU.
#pragma once

#ifdef R3D_EMU
#include "../emu/sm80.h"
#else
#include <cstdint>

#include "../device.cuh"

// The block's dynamic shared memory; a kernel that has it is launched by launch_dynamic().
#define R3D_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace r3d::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies the first `real` of 16 bytes past the registers and writes zeros for the others, which are not read.
// Both addresses are multiples of 16; `from` may point anywhere where nothing is real.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(real)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N youngest groups of this thread are under way. Other threads see the bytes after a
// barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 8x8 matrices of 16-bit elements: lane 8*i + r gives the address of row r of matrix i; lane l gets from each
// matrix the 32-bit word l%4 of row l/4, or with _trans of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&d)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(d[0])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row)));
}

// c[16x8] += a[16x16] * b[16x8], accumulated in float32. With g = lane/4 and t = lane%4, c holds (g, 2t), (g,
// 2t+1), (g+8, 2t), (g+8, 2t+1); a's words are rows g, g+8, g, g+8 at k = 2t (the last two 8 further); b's
// are k = 2t and 2t+8 of column g.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with k = 8 and one TF32 number a word: k = t and t+4. The hardware ignores the low 13 bits.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounded to TF32, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32_bits(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
__device__ __forceinline__ float round_tf32(float v) {
  return __uint_as_float(round_tf32_bits(__float_as_uint(v)));
}

// Launches with `bytes` of dynamic shared memory. Returns null, or what went wrong.
template <class... Parameters, class... Arguments>
const char* launch_dynamic(void (*kernel)(Parameters...), dim3 grid, dim3 block, int bytes, void* stream,
                           const Arguments&... arguments) {
  // More than 48 KiB has to be asked for. No stream is touched, so this is allowed in a graph capture.
  if (bytes > 48 << 10 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launch_error();
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  // clang-format off
  kernel<<<grid, block, bytes, queue>>>(arguments...);
  // clang-format on
  return launch_error();
}

}  // namespace r3d::cuda
#endif
