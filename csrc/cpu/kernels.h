// The entry points that every instruction set provides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../conv3d.h"
#include "../norm.h"
#include "conv3d_plan.h"
#include "recycle.h"
#include "stem.h"
#include "winograd.h"

#if defined(__x86_64__)
#define R3D_X86 1
#else
#define R3D_X86 0
#endif

// Functions between these two are compiled for the features; what stands before them is not.
#define R3D_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define R3D_TARGET_PUSH(features) \
  R3D_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define R3D_TARGET_POP R3D_PRAGMA(clang attribute pop)
#else
#define R3D_TARGET_PUSH(features) R3D_PRAGMA(GCC push_options) R3D_PRAGMA(GCC target(features))
#define R3D_TARGET_POP R3D_PRAGMA(GCC pop_options)
#endif

namespace r3d::cpu {

struct Kernels {
  void (*conv3d_f32)(const ConvArgs&, const Chunk*, int, int64_t, int);
  void (*conv3d_bf16)(const ConvArgs&, const Chunk*, int, int64_t, int);  // float32 arithmetic
  void (*direct_f32)(const DirectArgs&, const Chunk*, int, int64_t, int);
  void (*direct_bf16)(const DirectArgs&, const Chunk*, int, int64_t, int);  // float32 arithmetic
  int64_t (*keep_f32)(const DirectArgs&, const Chunk*, int, int64_t, int, void*);
  void (*winograd)(const WinogradArgs&);  // float32 arithmetic
  void (*stem)(const StemArgs&);
  void (*max_pool3d)(const PoolArgs&);
  void (*avg_pool_linear)(const HeadArgs&);
  void (*bn_act)(const BnActArgs&);
};

const Kernels& kernels_scalar();
#if R3D_X86
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
void conv3d_dot_avx512_bf16(const ConvArgs&, const Chunk*, int, int64_t, int);
void direct_dot_avx512_bf16(const DirectArgs&, const Chunk*, int, int64_t, int);
int64_t keep_dot_avx512_bf16(const DirectArgs&, const Chunk*, int, int64_t, int, void*);
#endif

const Kernels& kernels(Isa isa);

void bn_act(const BnActArgs& args);

}  // namespace r3d::cpu

// Defines kernels_ISA() from the templates that the namespace ISA has included.
#define R3D_DEFINE_KERNELS(ISA)                                                         \
  namespace r3d::cpu {                                                                  \
  const Kernels& kernels_##ISA() {                                                      \
    static const Kernels k{&ISA::run_packed<ISA::V, ISA::MathF32<ISA::V>, float>,       \
                           &ISA::run_packed<ISA::V, ISA::MathF32<ISA::V>, uint16_t>,    \
                           &ISA::run_parameter<ISA::V, ISA::MathF32<ISA::V>, float>,    \
                           &ISA::run_parameter<ISA::V, ISA::MathF32<ISA::V>, uint16_t>, \
                           &ISA::keep_parameter<ISA::V, ISA::MathF32<ISA::V>, float>,   \
                           &ISA::winograd_any,                                          \
                           &ISA::stem_any,                                              \
                           &ISA::max_pool3d_any,                                        \
                           &ISA::avg_pool_linear_any,                                   \
                           &ISA::bn_act_any};                                           \
    return k;                                                                           \
  }                                                                                     \
  }
