// Every piece of inline PTX that sm_90a alone has, behind a small named function; ../emu/hopper.h has the
// same functions for the CPU. Shared addresses are generic pointers here and 32-bit numbers to the hardware.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "../element.cuh"

// The shared memory that the launch asks for; the 128-byte swizzle repeats every 1024 bytes.
#define R3D_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]

#define R3D_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ::r3d::cuda::launch_with_shared((kernel), (grid), (block), (bytes), (stream), __VA_ARGS__)

namespace r3d::cuda {

inline const char* clear(void* p, size_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : launch_error();
}

// Whether what is enqueued on the stream goes into a graph; true as well where that cannot be asked now.
inline bool captures(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // of the question alone: the launch behind it reports its own
  return true;
}

// Those of the first 64 that a kernel is ready on.
using Devices = std::atomic<uint64_t>;

// Once for each kernel and device, as the runtime takes microseconds to answer: null where the kernel's code
// for this GPU is there and may have `bytes` of shared memory. For any other GPU it is compiled as an empty
// function, of a handful of registers, and would run without an error.
template <class... Parameters>
const char* prepare(Devices& ready, void (*kernel)(Parameters...), int bytes) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return launch_error();
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if (ready.load(std::memory_order_relaxed) & bit) return nullptr;
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return launch_error();
  if (attributes.numRegs < 64)
    return "was not compiled for this GPU, which must be of compute capability 9.0 (9.0a in "
           "TORCH_CUDA_ARCH_LIST)";
  // beyond 48 KiB only where it is asked for
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launch_error();
  ready.fetch_or(bit, std::memory_order_relaxed);
  return nullptr;
}

// Of a kernel that is ready and that begins with wait_for_earlier(): it may be launched before the kernel in
// front of it has ended, which hides what a launch takes. Drivers before CUDA 12.3 cannot put that into a
// graph. An error stays in the runtime for launch_error() to find.
template <class... Parameters, class... Arguments>
void launch_with_shared(void (*kernel)(Parameters...), dim3 grid, dim3 block, int bytes, void* stream,
                        const Arguments&... arguments) {
  static const bool early = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
  }();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = size_t(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = early;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

namespace hopper {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Addresses and not offsets are swizzled: a base that the linker moved would read everything wrong.
__device__ __forceinline__ void require_swizzle_alignment(const void* p) {
  if (shared_address(p) % 1024) __trap();
}

// Until the kernels in front of this one in its stream have ended and all that they wrote is there: before
// the first access to memory that another kernel may have written, or may still read.
__device__ __forceinline__ void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel in the stream may be launched as soon as all blocks of this one have said so.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" :::); }

// One lane of a converged warp, the same for the whole kernel.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}

// Registers of the calling warpgroup's threads, a multiple of 8; all its warps must say so.
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- barriers in shared memory: a phase ends when `count` threads have arrived and all expected bytes have
// landed

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
// Makes initialised barriers known to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; the first phase has parity 0, and the one before it counts as
// ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, int parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again_%=;}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// ---- TMA: one thread copies a whole tile. `map` is a tensor map in the kernel's parameters

__device__ __forceinline__ void prefetch(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void load_tile(void* to, const void* map, uint64_t* bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], "
      "[%4];" ::"r"(shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(shared_address(bar))
      : "memory");
}
__device__ __forceinline__ void load_tile(void* to, const void* map, uint64_t* bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4}], "
      "[%5];" ::"r"(shared_address(to)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(bar))
      : "memory");
}
// The coordinates are those of the first pixel under the filter's first tap; the offsets, 16-bit, are the
// tap's.
__device__ __forceinline__ void load_im2col(void* to, const void* map, uint64_t* bar, int c, int w, int h,
                                            int d, int n, int off_w, int off_h, int off_d) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4, %5, "
      "%6}], [%7], {%8, %9, %10};" ::"r"(shared_address(to)),
      "l"(map), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "r"(shared_address(bar)), "h"(uint16_t(off_w)),
      "h"(uint16_t(off_h)), "h"(uint16_t(off_d))
      : "memory");
}
// A run of memory, as it is: 16-byte aligned, whole 16 bytes.
__device__ __forceinline__ void load_run(void* to, const void* from, int bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}
__device__ __forceinline__ void store_tile(const void* map, const void* from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(c0), "r"(c1), "r"(shared_address(from))
               : "memory");
}
__device__ __forceinline__ void store_tile(const void* map, const void* from, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
      "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(from))
      : "memory");
}
// Stores since the last commit are a group of the committing thread.
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory has been read; the writes to global memory may still be under way.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// TMA sees what this thread has written to shared memory: between its writes and the barrier before the copy.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of some of the block's warps; number 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Of all lanes of a warp.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// Between barriers of a warpgroup, or a warp, by one of its kThreads threads: whoever takes a later ticket of
// the counter sees, behind its own second barrier, what all threads wrote before the first one. Releases and
// acquires are cumulative, so no other thread needs a fence. Several may take one each, of different
// counters.
template <int kThreads>
__device__ __forceinline__ unsigned take_ticket(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// ---- wgmma: a warpgroup multiplies tiles in shared memory

// K-major, 128-byte swizzle: address / 16, leading offset (unused), 1024 bytes from eight rows to the next
// eight. A step along K inside the 128 bytes of a row, and a step of whole rows, are steps of the address.
__device__ __forceinline__ uint64_t descriptor(const void* p) {
  return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(64) << 32 |
         uint64_t(1) << 62;
}
// K-major, no swizzle: pieces of eight rows of 16 bytes, which lie one after the other in a piece; the next
// 16 bytes of K are `along` bytes further on, the next eight rows `across` bytes. Pieces may overlap.
__device__ __forceinline__ uint64_t plain_descriptor(const void* p, int along, int across) {
  return uint64_t(shared_address(p) >> 4 & 0x3fff) | uint64_t(along >> 4) << 16 | uint64_t(across >> 4) << 32;
}
// The same so many bytes further on.
__device__ __forceinline__ uint64_t plus(uint64_t descriptor, int bytes) {
  return descriptor + uint64_t(bytes >> 4);
}
// Before the first wgmma after the accumulators were touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last N groups have finished.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// After the wait: keeps the compiler from reading the accumulators before it.
template <int N>
__device__ __forceinline__ void settle(float (&acc)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(acc[i])::"memory");
}

template <class T, int N>
struct Wgmma;

#define R3D_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define R3D_D32(i) R3D_D8(i), R3D_D8(i + 8), R3D_D8(i + 16), R3D_D8(i + 24)
#define R3D_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define R3D_R32 R3D_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R3D_R64                                                                                            \
  R3D_R32                                                                                                  \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%" \
  "57,%58"                                                                                                 \
  ",%59,%60,%61,%62,%63"
#define R3D_R88 \
  R3D_R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"
#define R3D_R96 R3D_R88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define R3D_R120                                                                                            \
  R3D_R96                                                                                                   \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%" \
  "117"                                                                                                     \
  ",%118,%119"
#define R3D_R128 R3D_R120 ",%120,%121,%122,%123,%124,%125,%126,%127"

// Scales of the inputs 1, both operands K-major; the predicate clears the accumulators when it is false.
#define R3D_WGMMA(T, type, N, registers, a, b, p, ...)                                                   \
  template <>                                                                                            \
  struct Wgmma<T, N> {                                                                                   \
    static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t da, uint64_t db, bool keep) { \
      asm volatile("{.reg .pred p; setp.ne.b32 p, " p ", 0; wgmma.mma_async.sync.aligned.m64n" #N        \
                   "k16.f32." type "." type " {" registers "}, " a ", " b ", p, 1, 1, 0, 0;}"            \
                   : __VA_ARGS__                                                                         \
                   : "l"(da), "l"(db), "r"(int(keep)));                                                  \
    }                                                                                                    \
  };
#define R3D_WGMMAS(T, type)                                                                              \
  R3D_WGMMA(T, type, 32, R3D_R16, "%16", "%17", "%18", R3D_D8(0), R3D_D8(8))                             \
  R3D_WGMMA(T, type, 64, R3D_R32, "%32", "%33", "%34", R3D_D32(0))                                       \
  R3D_WGMMA(T, type, 128, R3D_R64, "%64", "%65", "%66", R3D_D32(0), R3D_D32(32))                         \
  R3D_WGMMA(T, type, 176, R3D_R88, "%88", "%89", "%90", R3D_D32(0), R3D_D32(32), R3D_D8(64), R3D_D8(72), \
            R3D_D8(80))                                                                                  \
  R3D_WGMMA(T, type, 192, R3D_R96, "%96", "%97", "%98", R3D_D32(0), R3D_D32(32), R3D_D32(64))            \
  R3D_WGMMA(T, type, 240, R3D_R120, "%120", "%121", "%122", R3D_D32(0), R3D_D32(32), R3D_D32(64),        \
            R3D_D8(96), R3D_D8(104), R3D_D8(112))                                                        \
  R3D_WGMMA(T, type, 256, R3D_R128, "%128", "%129", "%130", R3D_D32(0), R3D_D32(32), R3D_D32(64), R3D_D32(96))
R3D_WGMMAS(BFloat16, "bf16")
R3D_WGMMAS(Float16, "f16")
#undef R3D_WGMMAS
#undef R3D_WGMMA

// acc[64, N] of a warpgroup += A[64, 16] * B[N, 16]^T. Thread t has rows t/32*16 + t%32/4 (+ 8) and two
// columns of every eight.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<T, N>::run(acc, a, b, accumulate);
}

// Four 8 x 8 matrices of two-byte elements whose rows lie where lanes 8 * m to 8 * m + 7 say, transposed:
// lane l gets of matrix m elements l/4 of its rows l%4*2 and l%4*2 + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The way back.
__device__ __forceinline__ void store_transposed(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace hopper
}  // namespace r3d::cuda
